"""The MLflow python_function model: renders prompts under a checkpoint."""

import logging
import tempfile
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sparsetune.checkpoint import Checkpoint, Manifest
from sparsetune.config import Config, resolve
from sparsetune.errors import ConfigError, PromptError

if TYPE_CHECKING:
    from sparsetune.models.pipelines import VideoPipeline

_LOG = logging.getLogger(__name__)

ENGINE_DEFAULTS: Final[Mapping[str, str | None]] = {
    "base_source": None,
    "device": "auto",
    "dtype": "auto",
    "offload": "none",
    "backend": "auto",
    "output_dir": None,
}
"""What `mlflow.pyfunc.load_model(model_config=...)` may change: where the base model is and how it runs."""

_GENERATION = ("num_frames", "height", "width", "num_inference_steps", "guidance_scale", "guidance_scale_2", "fps")


class SparseVideoModel:
    """Renders prompts under a checkpoint; the base model is loaded at the first call.

    Args:
        checkpoint: its manifest names the base model and the generation it was tuned for.
        model_config: any of `ENGINE_DEFAULTS`; `base_source` is for a base model that has moved, `output_dir` for
            the videos (None makes a temporary one).

    Raises ConfigError where `model_config` has another key or a value out of range.
    """

    def __init__(self, checkpoint: Checkpoint, model_config: Mapping[str, Any]) -> None:
        unknown = sorted(set(model_config) - set(ENGINE_DEFAULTS))
        if unknown:
            raise ConfigError(f"unknown model_config keys {', '.join(unknown)}; use {', '.join(ENGINE_DEFAULTS)}")
        self.checkpoint = checkpoint
        self._output_dir = model_config.get("output_dir")
        self._config = base_config(checkpoint.manifest, model_config)
        self._pipeline: VideoPipeline | None = None
        # MLflow's server answers each request in a thread of its own, and a diffusers pipeline renders one at a time.
        self._rendering = threading.Lock()

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> list[str]:
        """Render each prompt to an MP4 file; return the paths in order. Calls from several threads take turns.

        Args:
            model_input: prompts, as text, a list of texts, or a table with a column of them.
            params: `seed` and generation settings; left out they are as tuned. Who serves the model chooses the folder.

        Raises PromptError where there is no prompt or an empty one, and what loading and rendering raise.
        """
        from sparsetune.video import write_video

        prompts = _prompts(model_input)
        given = {name: value for name, value in (params or {}).items() if value is not None}
        seed, folder = given.pop("seed", None), self._output_dir
        if given.pop("output_dir", None):  # a parameter of models of earlier versions
            raise ConfigError("output_dir is set where the model is loaded, by model_config, not by callers")
        fps = int(given.pop("fps", self._config.generation.fps))
        target = Path(folder) if folder else Path(tempfile.mkdtemp(prefix="sparsetune-videos-"))
        paths = []
        for prompt in prompts:
            with self._rendering:
                frames = self._loaded()(prompt, seed=None if seed is None else int(seed), **given).frames[0]
            # A server answers several calls at once, with one folder for all: no two files may have one name.
            path = (target / f"{uuid.uuid4().hex}.mp4").absolute()
            write_video(path, frames, fps)
            paths.append(str(path))
        return paths

    def _loaded(self) -> "VideoPipeline":
        from sparsetune.models.loading import load_pipeline
        from sparsetune.models.pipelines import VideoPipeline
        from sparsetune.models.sparsify import policy_for

        if self._pipeline is None:
            loaded = load_pipeline(self._config.model)
            tuned = self.checkpoint.manifest.base_fingerprint
            if tuned not in (None, loaded.identity.fingerprint):
                _LOG.warning("the base model's weights are not those that the checkpoint was tuned for")
            self._pipeline = VideoPipeline(loaded, self._config, policy_for(loaded.pipe, self.checkpoint))
        return self._pipeline


def base_config(manifest: Manifest, model_config: Mapping[str, Any]) -> Config:
    """Resolve the configuration that a checkpoint was tuned for; raises ConfigError where no base model is named."""
    source = model_config.get("base_source") or manifest.base_source
    if source is None:
        raise ConfigError("the checkpoint's manifest does not name its base model; set base_source in model_config")
    flags: dict[str, Any] = {"model.source": source}
    if manifest.base_model is not None:
        flags["model.name"] = manifest.base_model
    if manifest.base_revision is not None and source == manifest.base_source:
        flags["model.revision"] = manifest.base_revision
    if manifest.base_lora is not None:
        flags |= {"model.lora": manifest.base_lora, "model.lora_scale": manifest.base_lora_scale}
    if manifest.flow_shift is not None:
        flags["model.flow_shift"] = manifest.flow_shift
    flags["generation.sigmas"] = manifest.sigmas
    for name in ("device", "dtype", "offload"):
        flags[f"model.{name}"] = model_config.get(name) or ENGINE_DEFAULTS[name]
    flags["backend"] = model_config.get("backend") or ENGINE_DEFAULTS["backend"]
    tuned = {name: getattr(manifest, name, None) for name in _GENERATION}
    flags |= {f"generation.{name}": value for name, value in tuned.items() if value is not None}
    return resolve(flags=flags)


def call_parameters(manifest: Manifest) -> dict[str, int | float | str]:
    if manifest.base_source is None:
        return {"seed": Config().eval.seed}
    config = base_config(manifest, {})
    generation = {name: getattr(config.generation, name) for name in _GENERATION}
    known = {name: value for name, value in generation.items() if value is not None}
    return {"seed": config.eval.seed, **known}


def _prompts(model_input: Any) -> list[str]:
    if isinstance(model_input, str):
        prompts = [model_input]
    elif hasattr(model_input, "columns"):
        columns = list(model_input.columns)
        if "prompt" not in columns and len(columns) != 1:
            raise PromptError(f"the table has no column prompt, only {', '.join(map(str, columns))}; add one")
        prompts = model_input["prompt" if "prompt" in columns else columns[0]].tolist()
    else:
        prompts = list(model_input)
    if not prompts:
        raise PromptError("predict needs at least one prompt; give a list of texts")
    for prompt in prompts:
        if not isinstance(prompt, str) or not prompt.strip():
            raise PromptError(f"each prompt must be a non-empty text, got {prompt!r}")
    return prompts
