"""How long one denoising step takes: dense, at forced sparsities, and without attention."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsetune.attention.backends import Backend
from sparsetune.attention.handle import SparseHandle
from sparsetune.attention.interception import AttentionCall, Interception
from sparsetune.attention.policy import Policy
from sparsetune.attention.thresholds import HeadThresholds
from sparsetune.bench.latency import time_calls
from sparsetune.bench.step import Step

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
    """Time a step every way in turn, round after round, so that a drift of the clock meets all ways alike.

    Args:
        step: what is run.
        backend: the kernel of the sparse rows.
        device: where the model computes.
        topk: fractions of the key blocks that the sparse rows compute, all heads alike.
        repeats: rounds, of whose timings the medians are taken.
        on_time: told of every row.
    """
    layers = [(layer.name, layer.num_heads) for layer in step.sites.layers]
    fallbacks: dict[str, int] = {}

    def sparse(fraction: float) -> Callable[[], AbstractContextManager[SparseHandle | None]]:
        policy = Policy.uniform(layers, HeadThresholds(-1.0, topk=fraction))
        return lambda: SparseHandle(step.sites, policy, backend)

    ways: list[tuple[str, Callable[[], AbstractContextManager[SparseHandle | None]]]] = [
        ("dense", nullcontext),
        *((f"{backend.name}, topk {fraction:g}", sparse(fraction)) for fraction in topk),
        ("self-attention removed", lambda: _without_attention(step)),
        ("dense, everything taken off", nullcontext),
    ]
    timings = [_Timings(name) for name, _ in ways]
    for number in range(repeats):
        for (_, way), timing in zip(ways, timings, strict=True):
            with way() as handle:
                timing.add(step, device, warm_up=1 if number else 2)
                if handle is not None:
                    stats = handle.stats()
                    timing.sparsity = stats.sparsity
                    fallbacks |= stats.fallbacks
    rows = [timing.median() for timing in timings]
    if on_time is not None:
        for row in rows:
            on_time(row)
    return StepTimes(rows[0], tuple(rows[1:-2]), rows[-2], rows[-1], fallbacks)


@dataclass
class _Timings:
    """What one way of running a step took, round after round."""

    name: str
    ms: list[float] = field(default_factory=list)
    peak_gib: float | None = None
    sparsity: float = 0.0

    def add(self, step: Step, device: torch.device, warm_up: int) -> None:
        """Time the step once more."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.ms += time_calls(step.run, device, repeats=1, warm_up=warm_up, at_once=1)
        if device.type == "cuda":
            self.peak_gib = max(self.peak_gib or 0.0, torch.cuda.max_memory_allocated(device) / 2**30)

    def median(self) -> StepTime:
        """Sum it up."""
        return StepTime(self.name, statistics.median(self.ms), min(self.ms), max(self.ms), self.peak_gib, self.sparsity)


@contextmanager
def _without_attention(step: Step) -> Iterator[None]:
    interception = Interception(step.sites, _nothing)
    try:
        yield
    finally:
        interception.remove()


def _nothing(call: AttentionCall) -> Tensor:
    """Stand in for attention at no cost; where values aren't shaped like the output, the queries are."""
    return call.v if call.v.shape == call.q.shape else call.q
