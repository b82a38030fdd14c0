"""The attribution ladder: which part of the error is noise, which the kernel's, and which the policy's."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sparsetune.attention.policy import Policy
from sparsetune.attention.thresholds import HeadThresholds, LayerThresholds
from sparsetune.evaluation.prompt import Frames, Watch, render, rendering_dense, running
from sparsetune.evaluation.result import PromptRow, Rung
from sparsetune.metrics import compute_available
from sparsetune.models.prompts import AnyPrompt

if TYPE_CHECKING:
    from sparsetune.attention.handle import SparseHandle
    from sparsetune.models.generation import Renderer

PSNR_CAP = 100.0
"""The PSNR that stands for identical videos."""


@dataclass(frozen=True)
class Attribution:
    """Means over the prompts that have a ladder, and whose part of the squared error is whose.

    Args:
        psnr: mean PSNR in dB against the dense baseline, of each rung and of the policy.
        mse: mean squared error of the same, on frames scaled to [0, 1].
        shares: fraction in [0, 1] of the policy's squared error that each step up the ladder adds; None where
            there is no error at all. Errors of different causes partly cancel or add up, so this is the increase
            from rung to rung, not a decomposition.
        num_prompts: prompts counted.
    """

    psnr: dict[str, float]
    mse: dict[str, float]
    shares: dict[str, float] | None
    num_prompts: int


def full_density(policy: Policy) -> Policy:
    """Give the policy that runs the same calls through the same kernel, with every block computed."""
    return replace(policy, layers=tuple(_full_layer(layer) for layer in policy.layers))


def climb(
    renderer: "Renderer",
    handle: "SparseHandle",
    prompt: AnyPrompt,
    seed: int,
    dense: Frames,
    metrics: Sequence[str],
    watch: Watch | None = None,
) -> tuple[dict[Rung, dict[str, float]], float]:
    """Render the two lower rungs of a prompt and measure them against its dense video.

    Args:
        renderer: of the pipeline that the handle is installed on.
        handle: the policy at work; it is put back afterwards.
        prompt: what is rendered.
        seed: of every rendering.
        dense: the dense baseline.
        metrics: names of registered metrics; those that can't be computed are left out.
        watch: told of every step.

    Returns:
        For `dense_again` and `kernel` each metric's value, and the seconds that rendering took.

    Raises:
        GenerationError: rendering failed.
    """
    with rendering_dense(handle):
        again = render(renderer, prompt, seed, "dense_again", watch)
    with running(handle, full_density(handle.policy)):
        kernel = render(renderer, prompt, seed, "kernel", watch)
    rungs: dict[Rung, dict[str, float]] = {
        "dense_again": compute_available(dense, again.frames, metrics)[0],
        "kernel": compute_available(dense, kernel.frames, metrics)[0],
    }
    return rungs, again.seconds + kernel.seconds


def attribute(rows: Sequence[PromptRow]) -> Attribution | None:
    """Tell whose part of the error is whose, over the rows that have a ladder; None where none has."""
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


def _full_layer(layer: LayerThresholds) -> LayerThresholds:
    # simthreshd1 1 computes every block; the heads stay sparse, so that the layer stays on the kernel.
    if layer.rule == "cdf":
        full = HeadThresholds(simthreshd1=1.0, cdfthreshd=1.0)
    else:
        full = HeadThresholds(simthreshd1=1.0, topk=1.0)
    return replace(layer, heads=tuple(full if head.is_sparse else head for head in layer.heads))


def _mse(psnr: float) -> float:
    return 0.0 if psnr >= PSNR_CAP else float(10.0 ** (-psnr / 10.0))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
