"""Installation of a policy or checkpoint on a diffusers pipeline."""

import logging
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsetune.attention.backends import backend_choice
from sparsetune.attention.breakeven import BreakEvenTable, load_table
from sparsetune.attention.device import device_name
from sparsetune.attention.handle import SparseHandle
from sparsetune.attention.interception import AttentionCall
from sparsetune.attention.ordering import Grid, TokenLayout
from sparsetune.attention.policy import Policy, check_fits
from sparsetune.attention.schedule import DenseSchedule
from sparsetune.attention.sites import AttentionSites
from sparsetune.checkpoint import Checkpoint, Manifest, load_checkpoint
from sparsetune.config import GenerationConfig
from sparsetune.errors import CheckpointError, ModelError
from sparsetune.models.calls import patch_of
from sparsetune.models.families import (
    ONE_STEP,
    LoneTransformer,
    attention_sites,
    family_of,
    is_known,
    main_transformer,
    token_side,
    with_layout,
)
from sparsetune.models.family import Family

_LOG = logging.getLogger(__name__)


def sparsify(
    pipe: Any,
    policy: Policy | Checkpoint | str | Path,
    backend: str = "auto",
    break_even: BreakEvenTable | str | Path | None = None,
    layout: TokenLayout | None = None,
    scheduler: Any = None,
) -> SparseHandle:
    """Install a policy on a pipeline; use it as a context manager, or call `remove()` on what it returns.

    A checkpoint that was tuned for another size, number of frames or steps warns when the pipeline first runs.

    Args:
        pipe: a diffusers pipeline, loaded and placed as you like, or its transformer alone.
        policy: the policy, a checkpoint, or a checkpoint's folder or file.
        backend: `auto`, `sparge`, `flex`, `reference` or `dense`.
        break_even: table that `sparsetune bench` measured on this machine, or its file: layers that would be slower
            sparse then run dense. None runs every layer as the policy says.
        layout: where the video's and the text's tokens lie in the sequence of each self-attention call. None is the
            family's; of an unknown family the tokens are one row, and the first key block is kept.
        scheduler: the one that sets the timesteps of a transformer alone, for a policy that treats steps differently.

    Returns:
        The handle, with statistics of what ran (`handle.stats()`); `handle.remove()` restores the pipeline exactly.

    Raises:
        ModelError: the model is known not to work, or the pipeline is sparse already or context-parallel.
        CheckpointError: it can't be read, or is another model's; the message lists the differences.
        BackendError: the backend can't run here, or the table is missing or another machine's.
    """
    if isinstance(policy, str | Path):
        policy = load_checkpoint(policy)
    if isinstance(pipe, nn.Module):
        pipe = _lone(pipe, policy.policy if isinstance(policy, Checkpoint) else policy, scheduler)
    family = family_of(pipe)
    if not is_known(family) and layout is None:
        _LOG.warning(
            "%s is of no known family: its tokens count as one row, so token orders and keep_text have no effect; "
            "pass layout=, or register a family",
            family.transformer_class,
        )
    sites = attention_sites(pipe, family if layout is None else with_layout(family, layout))
    _check_not_parallel(sites)
    # With offloading the weights lie on the CPU until they are needed; _execution_device is where they will run.
    device = torch.device(pipe._execution_device)
    if isinstance(break_even, str | Path):
        break_even = load_table(Path(break_even), device_name(device))
    choice = backend_choice(backend, device)
    check = partial(_warn_of_other_call, pipe, policy.manifest) if isinstance(policy, Checkpoint) else None
    matching = _matching_policy(pipe, sites, policy)
    return SparseHandle(sites, matching, choice.backend, break_even, choice.reason, check)


def _lone(transformer: nn.Module, policy: Policy, scheduler: Any) -> LoneTransformer:
    """Check that a policy can run on a transformer without its pipeline."""
    if policy.cache is not None:
        raise ModelError(f"the policy has a step cache ({policy.cache}), which needs the pipeline; pass that instead")
    if policy.schedule != DenseSchedule() and scheduler is None:
        raise ModelError(
            "the policy treats denoising steps differently, and a transformer alone doesn't know them; pass the "
            "pipeline, or scheduler=pipe.scheduler"
        )
    return LoneTransformer(transformer, ONE_STEP if scheduler is None else scheduler)


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


def warn_of_other_settings(manifest: Manifest, settings: GenerationConfig) -> None:
    """Warn where a checkpoint was tuned for another size, or number of frames or steps."""
    _warn(manifest, settings.model_dump(include={"num_frames", "height", "width", "num_inference_steps"}))


def _warn_of_other_call(pipe: Any, manifest: Manifest, call: AttentionCall) -> None:
    """Warn as `warn_of_other_settings` of what a pipeline renders, read from an attention call of its transformer."""
    found: dict[str, int | None] = {"num_inference_steps": getattr(pipe.scheduler, "num_inference_steps", None)}
    if call.transformer is not None:
        found |= _pixels(pipe, call.transformer.grid_and_tail()[0], manifest)
    _warn(manifest, found)


def _pixels(pipe: Any, grid: Grid, manifest: Manifest) -> dict[str, int | None]:
    """Compute a video's size from its grid of tokens; empty where that isn't known."""
    if grid[:2] == (1, 1) or isinstance(pipe, LoneTransformer):
        return {}
    side, temporal = token_side(pipe), getattr(pipe, "vae_scale_factor_temporal", None)
    found: dict[str, int | None] = {"height": grid[1] * side, "width": grid[2] * side}
    if temporal is not None and manifest.num_frames is not None:
        unit = patch_of(main_transformer(pipe))[0]
        # Pipelines pad latent frames to whole patches, and crop the video afterwards.
        if -(-((manifest.num_frames - 1) // temporal + 1) // unit) != grid[0]:
            found["num_frames"] = (grid[0] * unit - 1) * temporal + 1
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
