"""Export of a policy to the settings of a serving engine, which has fewer of them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sparsetune.attention.policy import Policy
from sparsetune.attention.schedule import DenseSchedule
from sparsetune.attention.thresholds import PVTHRESHD_OFF, HeadThresholds, Rule
from sparsetune.checkpoint.manifest import Checkpoint, Manifest
from sparsetune.errors import CheckpointError
from sparsetune.files import json_text


class Export(NamedTuple):
    """An engine's settings as text, what they lack of the policy, and what the engine does otherwise in any case.

    `differs` is no setting's doing and at most one key block of each row of blocks; empty for nothing.
    """

    text: str
    lost: tuple[str, ...]
    differs: str


def export(checkpoint: Checkpoint, engine: str, *, allow_loss: bool = False) -> Export:
    """Return the settings of an engine, one of `ENGINES`, that a checkpoint decides.

    A policy that is more than the engine's settings is exported with `allow_loss` as the uniform one of the same
    sparsity, whose videos differ.

    Raises:
        CheckpointError: the engine has no setting that a policy can be exported to, or not for this model; the
            sparsity isn't known; or something is lost without `allow_loss`.
    """
    if engine in NOT_EXPORTED:
        raise CheckpointError(NOT_EXPORTED[engine], is_usage=True)
    target, manifest = ENGINES[engine], checkpoint.manifest
    transformer = manifest.transformer_class
    if target.models and transformer is not None and not transformer.startswith(target.models):
        raise CheckpointError(f"{target.name} has this setting for Wan models, but the checkpoint is of {transformer}")
    lost = target.lost(checkpoint)
    if lost and not allow_loss:
        raise CheckpointError(
            f"{target.name} has {target.has}, so videos would differ; lost: {'; '.join(lost)}; use --allow-loss to "
            "export what it has"
        )
    tuned_for = {name: getattr(manifest, field) for field, name in target.tuned_for.items()}
    settings = {name: value for name, value in tuned_for.items() if value is not None}
    differs = "" if _keeps_text(checkpoint) else f"{target.name} doesn't always compute the first key block"
    return Export(target.write(settings | target.attention(checkpoint, bool(lost))), lost, differs)


@dataclass(frozen=True)
class Engine:
    """A serving engine that runs SpargeAttn's rule.

    Args:
        name, has: the engine's name, and what it has instead of a policy, in a message.
        models: what the transformer classes that it has this for begin with; empty for any.
        tuned_for: its names of the manifest's fields.
        attention: settings of its attention for a checkpoint, and whether something is lost.
        lost: what these lack of the policy.
        write: formats all settings.
    """

    name: str
    has: str
    models: str
    tuned_for: Mapping[str, str]
    attention: Callable[[Checkpoint, bool], dict[str, Any]]
    lost: Callable[[Checkpoint], tuple[str, ...]]
    write: Callable[[Mapping[str, Any]], str]


def _lightx2v(checkpoint: Checkpoint, is_lossy: bool) -> dict[str, Any]:
    ratio = round(1.0 - _topk(checkpoint, is_lossy), 4)
    return {"self_attn_1_type": "sparge_attn", "sparge_attn_setting": {"sparsity_ratio": ratio}}


def _sglang(checkpoint: Checkpoint, is_lossy: bool) -> dict[str, Any]:
    topk = round(_topk(checkpoint, is_lossy), 4)
    return {"attention_backend": "sparge_attn", "attention_backend_config": {"topk": topk}}


def _topk(checkpoint: Checkpoint, is_lossy: bool) -> float:
    if not is_lossy:
        return next(iter(_heads(checkpoint.policy))).topk or 1.0
    return 1.0 - _sparsity(checkpoint.manifest)


def _lost_by_topk(checkpoint: Checkpoint) -> tuple[str, ...]:
    policy = checkpoint.policy
    sparse = [head for head in _heads(policy) if head.is_sparse]
    found = {
        # The kernel's own is -0.1, and a block's mean similarity is never negative: it is a mean's squared length.
        "simthreshd1": any(head.simthreshd1 >= 0.0 for head in sparse),
        f"dense first steps ({policy.schedule.dense_fraction:g} of all)": policy.schedule.dense_fraction,
        "drop_scale": policy.schedule.drop_scale,
    }
    return _lost_thresholds(policy, "topk") + _named(found) + _lost_beside(checkpoint)


def _xdit(checkpoint: Checkpoint, is_lossy: bool) -> dict[str, Any]:
    policy, manifest = checkpoint.policy, checkpoint.manifest
    thresholds = next(iter(_heads(policy)))
    schedule = policy.schedule
    if _lost_thresholds(policy, "cdf"):
        thresholds, schedule = _nearest_pair(manifest), DenseSchedule()
    dense = [scale == 0.0 for scale in _scales(schedule, manifest)]
    backends = ["sdpa" if is_dense else "flex_block_sparge" for is_dense in dense]
    # Its steps are the transformer's calls, two a step with guidance.
    calls = 2 if (manifest.guidance_scale or 0.0) > 1.0 else 1
    names = [name for name in backends for _ in range(calls)]
    where = {"use_hybrid_attn_schedule": True, "hybrid_attn_schedule": ",".join(names)}
    return {
        **(where if any(dense) else {"attention_backend": "flex_block_sparge"}),
        "cross_attention_backend": "sdpa",
        "spargeattn_simthreshold": thresholds.simthreshd1,
        "spargeattn_cdfthreshold": round(thresholds.cdfthreshd or 1.0, 4),
        "spargeattn_reorder_sequence": False,
        "use_spargeattn_static_block_mask": False,
    }


def _lost_by_xdit(checkpoint: Checkpoint) -> tuple[str, ...]:
    policy = checkpoint.policy
    lost = _lost_thresholds(policy, "cdf")
    scales = set(_scales(policy.schedule, checkpoint.manifest))
    found = {
        "SpargeAttn's blocks (xDiT's are of 256 × 256 tokens)": True,
        "dense steps": lost and 0.0 in scales,
        "drop_scale": scales - {0.0, 1.0},
    }
    return lost + _named(found) + _lost_beside(checkpoint)


def _nearest_pair(manifest: Manifest) -> HeadThresholds:
    """Interpolate the hand-set pair of the checkpoint's sparsity, in doublings of what is dropped."""
    if not manifest.hand_set:
        raise CheckpointError(
            "the checkpoint has no pair of thresholds for all heads of its sparsity; use one that "
            "`sparsetune tune --tuner optuna` made"
        )
    simthreshd1, cdfthreshds, sparsities = zip(*manifest.hand_set, strict=True)
    dropped = [math.log2(max(1.0 - cdfthreshd, 1e-4)) for cdfthreshd in cdfthreshds]
    doublings = float(np.interp(_sparsity(manifest), sparsities, dropped))
    return HeadThresholds(simthreshd1[0], cdfthreshd=1.0 - 2.0**doublings)


def _scales(schedule: DenseSchedule, manifest: Manifest) -> list[float]:
    num_steps = manifest.num_inference_steps
    if schedule == DenseSchedule():
        return []
    if num_steps is None or manifest.guidance_scale is None:
        raise CheckpointError(
            "the checkpoint's steps or guidance aren't known, so its dense steps can't be listed; use one that "
            "`sparsetune tune` made"
        )
    return [schedule.scale(step, num_steps) for step in range(num_steps)]


def _sparsity(manifest: Manifest) -> float:
    if "sparsity" not in manifest.metrics:
        raise CheckpointError("the checkpoint's sparsity isn't known; use one that `sparsetune tune` made")
    return manifest.metrics["sparsity"]


def _heads(policy: Policy) -> set[HeadThresholds]:
    return {head for layer in policy.layers for head in layer.heads}


def _keeps_text(checkpoint: Checkpoint) -> bool:
    transformer = checkpoint.manifest.transformer_class or ""
    return checkpoint.policy.keep_text and not transformer.startswith("Wan")  # whose self-attention has no text


def _lost_thresholds(policy: Policy, rule: Rule) -> tuple[str, ...]:
    """What the thresholds of all heads are more than one of `rule`."""
    sparse = [head for head in _heads(policy) if head.is_sparse]
    pairs = {(head.simthreshd1, head.cdfthreshd) if rule == "cdf" else head.topk for head in sparse}
    other, values = ("topk", "pairs of thresholds") if rule == "cdf" else ("cdfthreshd", "values of topk")
    return _named(
        {
            other: any(head.rule != rule for head in sparse),
            f"{len(pairs)} {values}": len(pairs) > 1,
            "pvthreshd": any(head.pvthreshd != PVTHRESHD_OFF for head in sparse),
            "dense heads": len(sparse) < len(_heads(policy)),
        }
    )


def _lost_beside(checkpoint: Checkpoint) -> tuple[str, ...]:
    policy = checkpoint.policy
    orders = [order for order in policy.order_names if order != "raster"]
    return _named(
        {
            f"token order {', '.join(orders)}": orders,
            "keep_text": _keeps_text(checkpoint),
            "select_partial": policy.select_partial,
            f"cache {policy.cache}": policy.cache,
        }
    )


def _named(found: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(name for name, is_lost in found.items() if is_lost)


def _arguments(settings: Mapping[str, Any]) -> str:
    """Format as arguments of a command line."""

    def argument(name: str, value: Any) -> str:
        if isinstance(value, bool):
            return f"--{name}" if value else f"--no-{name}"
        return f"--{name}={value:g}" if isinstance(value, float) else f"--{name}={value}"

    return " ".join(argument(name, value) for name, value in settings.items())


_SIZES = ("num_frames", "height", "width", "num_inference_steps", "guidance_scale")

ENGINES = {
    "lightx2v": Engine(
        "LightX2V",
        "one sparsity for all heads, layers and steps",
        "Wan",
        {
            "num_inference_steps": "infer_steps",
            "num_frames": "target_video_length",
            "height": "target_height",
            "width": "target_width",
            "guidance_scale": "sample_guide_scale",
        },
        _lightx2v,
        _lost_by_topk,
        json_text,
    ),
    "sglang": Engine(
        "SGLang",
        "one topk for all heads, layers and steps",
        "",
        {name: name for name in _SIZES},
        _sglang,
        _lost_by_topk,
        json_text,
    ),
    "xdit": Engine(
        "xDiT",
        "one pair of thresholds for all heads and layers, and blocks of another size",
        "WanTransformer3DModel",
        {name: name for name in (*_SIZES, "guidance_scale_2", "flow_shift")},
        _xdit,
        _lost_by_xdit,
        _arguments,
    ),
}
"""Engines by name, as read from their sources: docs/export.md names the commits and files."""

NOT_EXPORTED = {
    "diffusers": (
        "diffusers has only dense attention kernels, so there is nothing to export; "
        "sparsetune.sparsify(pipe, CHECKPOINT) runs the whole policy on its pipelines"
    ),
    "tensorrt-llm": (
        "TensorRT-LLM's sparse attention (skip-softmax, Sol-Attn, VSA) has other rules than SpargeAttn's, whose "
        "thresholds mean nothing to them; export to sglang, xdit or lightx2v"
    ),
    "comfyui": (
        "ComfyUI's sparse attention (Sol-Attn, SLA, VSA) has other rules than SpargeAttn's, whose thresholds mean "
        "nothing to them; export to sglang, xdit or lightx2v"
    ),
}
"""Why a policy isn't exported to these."""
