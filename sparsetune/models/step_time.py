"""How long one denoising step takes: dense, at forced sparsities, and without attention."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetune.attention.backends import Backend
from sparsetune.attention.interception import AttentionCall, Interception
from sparsetune.attention.latency import time_calls
from sparsetune.attention.policy import Policy
from sparsetune.attention.sparsify import SparseHandle
from sparsetune.attention.thresholds import HeadThresholds
from sparsetune.models.step import Step

TOPK = (0.5, 0.3, 0.15)
"""Fractions of the key blocks that are computed."""


@dataclass(frozen=True)
class StepTime:
    """The time of one step.

    Args:
        name: what ran, e.g. `dense`.
        ms: median.
        fastest_ms: of the timings.
        slowest_ms: likewise.
        peak_gib: the most memory that was allocated on the GPU; None without one.
        sparsity: fraction of block pairs not computed.
    """

    name: str
    ms: float
    fastest_ms: float
    slowest_ms: float
    peak_gib: float | None
    sparsity: float = 0.0


@dataclass(frozen=True)
class StepTimes:
    """All that was measured of one step; `without` is the step with its self-attention taken out."""

    dense: StepTime
    sparse: tuple[StepTime, ...]
    without: StepTime
    after: StepTime
    fallbacks: dict[str, int]

    @property
    def attention_share(self) -> float:
        """Fraction of the dense step that is spent in self-attention."""
        return 1.0 - self.without.ms / self.dense.ms

    @property
    def ceiling(self) -> float:
        """The speed-up of the whole step that no attention method can exceed: 1 / (1 − share)."""
        return self.dense.ms / self.without.ms

    @property
    def rows(self) -> tuple[StepTime, ...]:
        """Every timing, in the order of measurement."""
        return (self.dense, *self.sparse, self.without, self.after)


def time_step(
    step: Step,
    backend: Backend,
    device: torch.device,
    *,
    topk: Sequence[float] = TOPK,
    repeats: int = 10,
    on_time: Callable[[StepTime], None] | None = None,
) -> StepTimes:
    """Time a step.

    Args:
        step: what is run.
        backend: the kernel of the sparse rows.
        device: where the model computes.
        topk: fractions of the key blocks that the sparse rows compute, all heads alike.
        repeats: timings of which the median is taken.
        on_time: told of every row.
    """
    tell = on_time or (lambda row: None)

    def row(name: str, sparsity: Callable[[], float] = lambda: 0.0) -> StepTime:
        measured = _time(step, name, device, repeats, sparsity)
        tell(measured)
        return measured

    dense = row("dense")
    layers = [(layer.name, layer.num_heads) for layer in step.sites.layers]
    sparse = []
    fallbacks: dict[str, int] = {}
    for fraction in topk:
        policy = Policy.uniform(layers, HeadThresholds(-1.0, topk=fraction))
        with SparseHandle(step.sites, policy, backend) as handle:
            sparse.append(row(f"{backend.name}, topk {fraction:g}", lambda: handle.stats().sparsity))
            fallbacks |= handle.stats().fallbacks
    interception = Interception(step.sites, _nothing)
    try:
        without = row("self-attention removed")
    finally:
        interception.remove()
    return StepTimes(dense, tuple(sparse), without, row("dense, everything taken off"), fallbacks)


def _time(step: Step, name: str, device: torch.device, repeats: int, sparsity: Callable[[], float]) -> StepTime:
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    times = time_calls(step.run, device, repeats=repeats, at_once=1)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else None
    return StepTime(name, statistics.median(times), min(times), max(times), peak, sparsity())


def _nothing(call: AttentionCall) -> Tensor:
    """Stand in for attention at no cost; where values aren't shaped like the output, the queries are."""
    return call.v if call.v.shape == call.q.shape else call.q
