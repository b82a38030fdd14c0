"""Installation of a policy or checkpoint on a diffusers pipeline."""

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsetune.attention.backends import backend_choice
from sparsetune.attention.breakeven import BreakEvenTable, load_table
from sparsetune.attention.device import device_name
from sparsetune.attention.handle import SparseHandle
from sparsetune.attention.policy import Policy, check_fits
from sparsetune.attention.sites import AttentionSites
from sparsetune.checkpoint import Checkpoint, Manifest, load_checkpoint
from sparsetune.config import GenerationConfig
from sparsetune.errors import CheckpointError, ModelError
from sparsetune.models.families import Family, attention_sites, family_of, main_transformer


def sparsify(
    pipe: Any,
    policy: Policy | Checkpoint | str | Path,
    backend: str = "auto",
    break_even: BreakEvenTable | str | Path | None = None,
) -> SparseHandle:
    """Install a policy on a pipeline; use it as a context manager, or call `remove()` on what it returns.

    Args:
        pipe: a diffusers pipeline of a supported family, loaded and placed as you like.
        policy: the policy, a checkpoint, or a checkpoint's folder or file.
        backend: `auto`, `sparge`, `flex`, `reference` or `dense`.
        break_even: table that `sparsetune bench` measured on this machine, or its file: layers that would be slower
            sparse then run dense. None runs every layer as the policy says.

    Returns:
        The handle, with statistics of what ran (`handle.stats()`); `handle.remove()` restores the pipeline exactly.

    Raises:
        ModelError: the family is unknown, or the pipeline is sparse already or context-parallel.
        CheckpointError: it can't be read, or is another model's; the message lists the differences.
        BackendError: the backend can't run here, or the table is missing or another machine's.
    """
    sites = attention_sites(pipe)
    _check_not_parallel(sites)
    # With offloading the weights lie on the CPU until they are needed; _execution_device is where they will run.
    device = torch.device(pipe._execution_device)
    if isinstance(break_even, str | Path):
        break_even = load_table(Path(break_even), device_name(device))
    choice = backend_choice(backend, device)
    return SparseHandle(sites, _matching_policy(pipe, sites, policy), choice.backend, break_even, choice.reason)


def policy_for(pipe: Any, policy: Policy | Checkpoint | str | Path) -> Policy:
    """Return the policy of a checkpoint, or of its folder or file, checked against a pipeline's model.

    Raises:
        CheckpointError: it can't be read, or is another model's; the message lists the differences.
    """
    sites = attention_sites(pipe)
    matching = _matching_policy(pipe, sites, policy)
    check_fits(matching, [(layer.name, layer.num_heads) for layer in sites.layers])
    return matching


def _matching_policy(pipe: Any, sites: AttentionSites, policy: Policy | Checkpoint | str | Path) -> Policy:
    """Return a checkpoint's policy with diffusers' layer names; its layers aren't checked yet."""
    if isinstance(policy, str | Path):
        policy = load_checkpoint(policy)
    if isinstance(policy, Checkpoint):
        _check_manifest(pipe, sites, policy.manifest)
        policy = policy.policy
    return _with_diffusers_names(policy, family_of(pipe))


def _with_diffusers_names(policy: Policy, family: Family) -> Policy:
    """Rename layers that have the module paths of the model's own code to those of diffusers."""

    def renamed(name: str) -> str:
        root, _, path = name.partition(".")
        for pattern, diffusers_path in family.upstream:
            if match := re.fullmatch(pattern, path):
                return f"{root}.{match.expand(diffusers_path)}"
        return name

    layers = tuple(replace(layer, name=renamed(layer.name)) for layer in policy.layers)
    return policy if layers == policy.layers else replace(policy, layers=layers)


def _check_not_parallel(sites: AttentionSites) -> None:
    """Raise ModelError for context parallelism: block maps need all tokens of a sequence on one device."""
    for transformer in sites.transformers:
        modules = [transformer.module, *(getattr(layer.module, "processor", None) for layer in transformer.layers)]
        if any(getattr(module, "_parallel_config", None) is not None for module in modules):
            raise ModelError(
                f"{transformer.name} runs context-parallel, which sparse attention doesn't support: a block map needs "
                "all keys on one device; don't call enable_parallelism"
            )


def _check_manifest(pipe: Any, sites: AttentionSites, manifest: Manifest) -> None:
    differing = []
    found = type(main_transformer(pipe)).__name__
    if manifest.transformer_class not in (None, found):
        differing.append(f"transformer {manifest.transformer_class}, the model has {found}")
    tuned = {layer.name: layer.head_dim for layer in manifest.layers}
    other = [layer for layer in sites.layers if tuned.get(layer.name) not in (None, layer.head_dim)]
    if other:
        differing.append(f"head_dim {tuned[other[0].name]} in {other[0].name}, the model has {other[0].head_dim}")
    if differing:
        raise CheckpointError(
            f"the checkpoint was tuned for another model: {'; '.join(differing)}; use one that was tuned for this model"
        )


def default_policy(pipe: Any) -> Policy:
    """Return SpargeAttn's default thresholds for every head of a pipeline: an untuned policy.

    simthreshd1 0.6, cdfthreshd 0.98, no dense steps, raster order; the first key block is kept (its `attention_sink`).
    """
    return Policy.uniform([(layer.name, layer.num_heads) for layer in attention_sites(pipe).layers])


_LOG = logging.getLogger(__name__)


def warn_of_other_settings(manifest: Manifest, settings: GenerationConfig) -> None:
    """Warn where a checkpoint was tuned for another size, or number of frames or steps."""
    _warn(manifest, settings.model_dump(include={"num_frames", "height", "width", "num_inference_steps"}))


def warn_at_first_call(pipe: Any, manifest: Manifest) -> None:
    """Warn as `warn_of_other_settings` at the first call of a pipeline's transformer.

    Size and frames are computed from the latent video, so packed latents (a sequence of tokens) go unchecked.
    """

    def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hook.remove()
        latents = kwargs.get("hidden_states", args[0] if args else None)
        found = {"num_inference_steps": getattr(pipe.scheduler, "num_inference_steps", None)}
        if isinstance(latents, Tensor) and latents.ndim == 5:
            found |= _pixels(pipe, module, latents, manifest)
        _warn(manifest, found)

    hook = pipe.transformer.register_forward_pre_hook(check, with_kwargs=True)


def _pixels(pipe: Any, transformer: nn.Module, latents: Tensor, manifest: Manifest) -> dict[str, int | None]:
    """Compute a video's size from its latents, (batch, frames, channels, h, w) or (batch, channels, frames, h, w)."""
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
        # Pipelines pad latent frames to whole patches, and crop the video afterwards.
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
            "the checkpoint was tuned for %s: its sparsity and quality here are unknown; tune or evaluate with these "
            "settings",
            ", ".join(differing),
        )
