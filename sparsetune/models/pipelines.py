"""A dense and a sparse pipeline over one set of weights, as two callables."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsetune.attention.policy import Policy
from sparsetune.checkpoint import Checkpoint
from sparsetune.config import Config
from sparsetune.models.generation import Frames, Renderer
from sparsetune.models.loading import LoadedModel, load_pipeline
from sparsetune.models.sparse import default_policy, sparsify


@dataclass(frozen=True)
class VideoOutput:
    """What a call returns: `frames[0]` is the video, RGB uint8 of shape (frames, height, width, 3)."""

    frames: tuple[Frames, ...]


class VideoPipeline:
    """Renders a prompt, dense or under a policy.

    Args:
        loaded: the model; several pipelines may share it.
        config: its generation settings are the defaults of a call, `eval.seed` is the default seed.
        policy: None renders dense.
    """

    def __init__(self, loaded: LoadedModel, config: Config, policy: Policy | None = None) -> None:
        self._loaded = loaded
        self._config = config
        self._policy = policy

    def __call__(self, prompt: str, *, seed: int | None = None, **settings: Any) -> VideoOutput:
        """Render one prompt.

        Args:
            prompt: the text.
            seed: of the noise; the configuration's `eval.seed` where None.
            settings: any of `GenerationConfig`'s fields, e.g. `num_inference_steps=30`.

        Raises:
            GenerationError: the model can't do the size, memory ran out, or the frames are NaN or black.
        """
        generation = type(self._config.generation)(**(self._config.generation.model_dump() | settings))
        renderer = Renderer(self._loaded, generation)
        seed = self._config.eval.seed if seed is None else seed
        if self._policy is None:
            return VideoOutput((renderer.render(prompt, seed).frames,))
        with sparsify(self._loaded.pipe, self._policy, self._config.backend):
            return VideoOutput((renderer.render(prompt, seed).frames,))


def create_pipelines(
    config: Config | None = None, checkpoint: Policy | Checkpoint | str | Path | None = None
) -> tuple[VideoPipeline, VideoPipeline]:
    """Load a model once and give it as two callables, `pipe_dense(prompt)` and `pipe_sparse(prompt)`.

    Args:
        config: what to load and how to render; None is the embedded demo model with its own settings.
        checkpoint: what `pipe_sparse` runs under; None is SpargeAttn's default thresholds.

    Raises:
        ModelError, CheckpointError: as `load_pipeline` and `sparsify` raise them.
    """
    config = config or demo_config()
    loaded = load_pipeline(config.model)
    policy = default_policy(loaded.pipe) if checkpoint is None else _policy(checkpoint)
    return VideoPipeline(loaded, config), VideoPipeline(loaded, config, policy)


def demo_config(overrides: Mapping[str, Any] | None = None) -> Config:
    """Resolve the embedded demo model's configuration, with dotted keys such as `tune.n_trials` overridden."""
    from sparsetune.config import resolve

    return resolve("demo", (), {}, overrides or {})


def _policy(checkpoint: Policy | Checkpoint | str | Path) -> Policy:
    from sparsetune.checkpoint import load_checkpoint

    if isinstance(checkpoint, Policy):
        return checkpoint
    return checkpoint.policy if isinstance(checkpoint, Checkpoint) else load_checkpoint(checkpoint).policy
