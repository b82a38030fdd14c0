"""A dense and a sparse pipeline with shared weights, as two callables."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sparsetune.attention.policy import Policy
from sparsetune.checkpoint import Checkpoint
from sparsetune.config import Config, GenerationConfig, resolve
from sparsetune.errors import ConfigError
from sparsetune.models.generation import Frames, Renderer
from sparsetune.models.loading import LoadedModel, load_pipeline
from sparsetune.models.prompts import AnyPrompt
from sparsetune.models.sparsify import default_policy, policy_for, sparsify


@dataclass(frozen=True)
class VideoOutput:
    """Output of a `VideoPipeline` call.

    Args:
        frames: `frames[0]` is the video, RGB uint8 of shape (frames, height, width, 3).
        sparsity: fraction of block pairs not computed, over all self-attention calls; 0 for dense.
    """

    frames: tuple[Frames, ...]
    sparsity: float = 0.0


class VideoPipeline:
    """Renders prompts, dense or under a policy.

    Args:
        loaded: the model; several pipelines may share it.
        config: its generation settings are the defaults of a call, `eval.seed` is the default seed.
        policy: None renders dense.
    """

    def __init__(self, loaded: LoadedModel, config: Config, policy: Policy | None = None) -> None:
        self._loaded = loaded
        self._config = config
        self._policy = policy

    def __call__(self, prompt: AnyPrompt, *, seed: int | None = None, **settings: Any) -> VideoOutput:
        """Render one prompt.

        Args:
            prompt: the text, or a `Prompt` with its own image, seed or negative prompt.
            seed: of the noise; the configuration's `eval.seed` where None.
            settings: any of `GenerationConfig`'s fields, e.g. `num_inference_steps=30`.

        Raises:
            ConfigError: a setting is unknown or out of its range.
            GenerationError: as `Renderer` and its `render` raise it.
        """
        renderer = Renderer(self._loaded, _changed(self._config.generation, settings))
        seed = self._config.eval.seed if seed is None else seed
        if self._policy is None:
            return VideoOutput((renderer.render(prompt, seed).frames,))
        with sparsify(self._loaded.pipe, self._policy, self._config.backend, self._config.break_even) as handle:
            frames = renderer.render(prompt, seed).frames
            return VideoOutput((frames,), handle.stats().sparsity)


def create_pipelines(
    config: Config | str | None = None, checkpoint: Policy | Checkpoint | str | Path | None = None
) -> tuple[VideoPipeline, VideoPipeline]:
    """Load a model once and return two callables, `pipe_dense(prompt)` and `pipe_sparse(prompt)`.

        pipe_dense, pipe_sparse = create_pipelines("demo", "results/demo/checkpoint")
        for prompt in load_prompts("my_prompts.txt"):
            dense = pipe_dense(prompt).frames[0]
            sparse = pipe_sparse(prompt).frames[0]
            print(my_metric(dense, sparse))

    Args:
        config: a configuration, or a model as `--model` takes it, with its packaged settings; None is the demo model.
        checkpoint: the policy of `pipe_sparse`; None is SpargeAttn's default thresholds.

    Raises:
        ConfigError, ModelError, CheckpointError: as `resolve`, `load_pipeline` and `sparsify` raise them.
    """
    if config is None:
        config = demo_config()
    elif isinstance(config, str):
        config = resolve(flags={"model.source": config})
    loaded = load_pipeline(config.model)
    policy = default_policy(loaded.pipe) if checkpoint is None else policy_for(loaded.pipe, checkpoint)
    return VideoPipeline(loaded, config), VideoPipeline(loaded, config, policy)


def demo_config(overrides: Mapping[str, Any] | None = None) -> Config:
    """Resolve the embedded demo model's configuration, with dotted keys such as `tune.n_trials` overridden."""
    return resolve("demo", (), {}, overrides or {})


def _changed(generation: GenerationConfig, settings: dict[str, Any]) -> GenerationConfig:
    try:
        return GenerationConfig(**(generation.model_dump() | settings))
    except ValidationError as error:
        first = error.errors()[0]
        name = first["loc"][0]
        if name not in GenerationConfig.model_fields:
            known = ", ".join(GenerationConfig.model_fields)
            raise ConfigError(f"unknown setting {name}; settings of a call are seed and {known}") from error
        message = first["msg"].replace("Input should", "must", 1)
        raise ConfigError(f"{name} {message}, got {first['input']!r}") from error
