"""What a checkpoint was tuned for, beside what is rendered with it."""

import logging
from typing import Any

from torch import Tensor, nn

from sparsetune.checkpoint import Manifest
from sparsetune.config import GenerationConfig

_LOG = logging.getLogger(__name__)

_SIZE = ("num_frames", "height", "width")


def warn_of_other_settings(manifest: Manifest, settings: GenerationConfig) -> None:
    """Warn where size, frames or steps of a generation aren't those that a checkpoint was tuned for."""
    names = (*_SIZE, "num_inference_steps")
    _warn(manifest, {name: getattr(settings, name) for name in names})


def warn_at_first_call(pipe: Any, manifest: Manifest) -> None:
    """Let the first call of a pipeline's transformer warn as `warn_of_other_settings` does, whatever its settings are.

    Size and frames are read off the latent video, so packed latents (a sequence of tokens) go unchecked; the number
    of steps is the scheduler's. Nothing stays behind on the pipeline after that call.
    """

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hook.remove()
        latents = kwargs.get("hidden_states", args[0] if args else None)
        found = {"num_inference_steps": getattr(pipe.scheduler, "num_inference_steps", None)}
        if isinstance(latents, Tensor) and latents.ndim == 5:
            found |= _pixels(pipe, module, latents, manifest)
        _warn(manifest, found)

    hook = pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)


def _pixels(pipe: Any, transformer: nn.Module, latents: Tensor, manifest: Manifest) -> dict[str, int | None]:
    """Tell a video's size from its latents, (batch, frames, channels, h, w) or (batch, channels, frames, h, w)."""
    spatial = getattr(pipe, "vae_scale_factor_spatial", None)
    temporal = getattr(pipe, "vae_scale_factor_temporal", None)
    config: Any = transformer.config
    found: dict[str, int | None] = {}
    if spatial is not None:
        found |= {"height": latents.shape[-2] * spatial, "width": latents.shape[-1] * spatial}
    if temporal is not None and config.in_channels in latents.shape[1:3]:
        frames = latents.shape[1] if latents.shape[2] == config.in_channels else latents.shape[2]
        unit = getattr(config, "patch_size_t", None) or 1
        tuned = None if manifest.num_frames is None else (manifest.num_frames - 1) // temporal + 1
        # A pipeline pads the latent frames to whole patches, and cuts the video afterwards.
        if tuned is not None and -(-tuned // unit) * unit != frames:
            found["num_frames"] = (frames - 1) * temporal + 1
    return found


def _warn(manifest: Manifest, found: dict[str, int | None]) -> None:
    differing = [
        f"{name} {tuned} and renders {found[name]}"
        for name in found
        if (tuned := getattr(manifest, name)) is not None and found[name] not in (None, tuned)
    ]
    if differing:
        _LOG.warning(
            "the checkpoint was tuned for %s: its sparsity and quality aren't known here; tune for these settings, "
            "or evaluate with them",
            ", ".join(differing),
        )
