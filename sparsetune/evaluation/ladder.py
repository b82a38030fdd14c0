"""Attribution ladder: separates the error into noise, kernel rounding and sparsity."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sparsetune.attention.policy import Policy
from sparsetune.attention.thresholds import HeadThresholds, LayerThresholds
from sparsetune.evaluation.result import PromptRow, Rung
from sparsetune.metrics import compute_available
from sparsetune.metrics.frames import PSNR_CAP_DB

if TYPE_CHECKING:
    from sparsetune.attention.handle import SparseHandle
    from sparsetune.evaluation.prompt import Frames, StepCallback
    from sparsetune.models.generation import Renderer, Rendering
    from sparsetune.models.prompts import AnyPrompt


@dataclass(frozen=True)
class Attribution:
    """Means over the prompts that have a ladder, by rung and `policy`.

    `shares` are fractions in [0, 1] of the policy's squared error that each rung adds to the one below; None where
    there is no error. Errors of different causes partly cancel, so this is an increase, not a decomposition.
    """

    psnr: dict[str, float]  # in dB against the dense baseline
    mse: dict[str, float]  # the same, on frames scaled to [0, 1]
    shares: dict[str, float] | None
    num_prompts: int


def render_ladder(
    renderer: "Renderer",
    handle: "SparseHandle",
    prompt: "AnyPrompt",
    seed: int,
    dense: "Frames",
    metrics: Sequence[str],
    on_step: "StepCallback | None" = None,
) -> tuple[dict[Rung, dict[str, float]], float]:
    """Render both lower rungs; return their metrics that can be computed against `dense`, and the rendering seconds."""
    from sparsetune.evaluation.prompt import render, rendering_dense, with_policy  # which loads torch

    with rendering_dense(handle):
        again = render(renderer, prompt, seed, "dense_again", on_step)
    with with_policy(handle, _full_density(handle.policy)):
        kernel = render(renderer, prompt, seed, "kernel", on_step)
    renderings: dict[Rung, Rendering] = {"dense_again": again, "kernel": kernel}
    rungs = {rung: compute_available(dense, video.frames, metrics)[0] for rung, video in renderings.items()}
    return rungs, again.seconds + kernel.seconds


def attribute(rows: Sequence[PromptRow]) -> Attribution | None:
    with_ladder = [row for row in rows if row.ladder and row.psnr is not None]
    if not with_ladder:
        return None
    psnr: dict[str, list[float]] = {"dense_again": [], "kernel": [], "policy": []}
    for row in with_ladder:
        for rung, metrics in (row.ladder or {}).items():
            psnr[rung].append(metrics["psnr"])
        psnr["policy"].append(row.psnr or 0.0)
    mse = {rung: _mean([_mse(value) for value in values]) for rung, values in psnr.items()}
    shares = None
    if mse["policy"] > 0:
        noise = min(mse["dense_again"] / mse["policy"], 1.0)
        kernel = min(max(mse["kernel"] / mse["policy"] - noise, 0.0), 1.0 - noise)
        shares = {"dense_again": noise, "kernel": kernel, "policy": 1.0 - noise - kernel}
    return Attribution({rung: _mean(values) for rung, values in psnr.items()}, mse, shares, len(with_ladder))


def _full_density(policy: Policy) -> Policy:
    return replace(policy, layers=tuple(_full_layer(layer) for layer in policy.layers), cache=None)


def _full_layer(layer: LayerThresholds) -> LayerThresholds:
    # simthreshd1 1 computes every block; the heads stay sparse so that the layer stays on the kernel.
    cdf = layer.rule == "cdf"
    full = HeadThresholds(simthreshd1=1.0, cdfthreshd=1.0 if cdf else None, topk=None if cdf else 1.0)
    return replace(layer, heads=tuple(full if head.is_sparse else head for head in layer.heads))


def _mse(psnr: float) -> float:
    return 0.0 if psnr >= PSNR_CAP_DB else float(10.0 ** (-psnr / 10.0))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
