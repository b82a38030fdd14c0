"""Export of a policy to the settings of a serving engine, which has fewer of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsetune.attention.policy import Policy
from sparsetune.attention.thresholds import PVTHRESHD_OFF, HeadThresholds
from sparsetune.checkpoint.manifest import Checkpoint, Manifest
from sparsetune.errors import CheckpointError

LIGHTX2V_SIMTHRESHD1 = -0.1
"""The default of the kernel that LightX2V calls with nothing but `topk`."""

_SETTINGS = {
    "num_inference_steps": "infer_steps",
    "num_frames": "target_video_length",
    "height": "target_height",
    "width": "target_width",
    "guidance_scale": "sample_guide_scale",
}
"""LightX2V's names of what a checkpoint was tuned for."""


@dataclass(frozen=True)
class Export:
    """An engine's settings as JSON values, and what they lack of the policy, in words."""

    settings: Mapping[str, Any]
    lost: tuple[str, ...]


def export_lightx2v(checkpoint: Checkpoint, *, allow_loss: bool = False) -> Export:
    """Return the keys of a configuration of LightX2V (`--config_json`) that a checkpoint of a Wan model decides.

    LightX2V has one fraction for all heads, layers and steps: `sparsity_ratio`, 1 − topk. A policy that is more than
    that is exported with `allow_loss` as the uniform one of the same sparsity, whose videos differ.

    Raises:
        CheckpointError: it is of another model, its sparsity isn't known, or something is lost without `allow_loss`.
    """
    policy, manifest = checkpoint.policy, checkpoint.manifest
    if manifest.transformer_class is not None and not manifest.transformer_class.startswith("Wan"):
        raise CheckpointError(
            f"LightX2V has this setting for Wan models, but the checkpoint is of {manifest.transformer_class}"
        )
    lost = _lost(policy)
    if lost and not allow_loss:
        raise CheckpointError(
            "LightX2V has one sparsity for all heads, layers and steps, so videos would differ; "
            f"lost: {'; '.join(lost)}; use --allow-loss to export the mean sparsity"
        )
    tuned_for = {
        name: getattr(manifest, field) for field, name in _SETTINGS.items() if getattr(manifest, field) is not None
    }
    attention = {
        "self_attn_1_type": "sparge_attn",
        "sparge_attn_setting": {"sparsity_ratio": round(_sparsity_ratio(policy, manifest, lost), 4)},
    }
    return Export(tuned_for | attention, lost)


def _sparsity_ratio(policy: Policy, manifest: Manifest, lost: tuple[str, ...]) -> float:
    if not lost:
        return 1.0 - (next(iter(_heads(policy))).topk or 0.0)
    if "sparsity" not in manifest.metrics:
        raise CheckpointError("the checkpoint's sparsity isn't known; use one that `sparsetune tune` made")
    return manifest.metrics["sparsity"]


def _heads(policy: Policy) -> set[HeadThresholds]:
    return {head for layer in policy.layers for head in layer.heads}


def _lost(policy: Policy) -> tuple[str, ...]:
    heads = _heads(policy)
    sparse = [head for head in heads if head.is_sparse]
    topk = {head.topk for head in sparse}
    orders = [order for order in policy.order_names if order != "raster"]
    found = {
        "cdfthreshd": any(head.topk is None for head in sparse),
        f"{len(topk)} values of topk": len(topk) > 1,
        "simthreshd1": any(head.simthreshd1 != LIGHTX2V_SIMTHRESHD1 for head in sparse),
        "pvthreshd": any(head.pvthreshd != PVTHRESHD_OFF for head in sparse),
        "dense heads": len(sparse) < len(heads),
        f"dense first steps ({policy.schedule.dense_fraction:g} of all)": policy.schedule.dense_fraction,
        "drop_scale": policy.schedule.drop_scale,
        f"token order {', '.join(orders)}": orders,
        "select_partial": policy.select_partial,
        f"cache {policy.cache}": policy.cache,
    }
    return tuple(name for name, is_lost in found.items() if is_lost)
