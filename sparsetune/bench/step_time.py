"""Time of one denoising step: dense, at forced sparsities, and without self-attention."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetune.attention.backends import Backend
from sparsetune.attention.handle import SparseHandle
from sparsetune.attention.interception import AttentionCall, Interception
from sparsetune.attention.policy import Policy
from sparsetune.attention.thresholds import HeadThresholds
from sparsetune.bench.latency import peak_memory, time_calls
from sparsetune.bench.step import Step


@dataclass(frozen=True)
class StepTime:
    name: str  # the variant, e.g. `dense`
    ms: float  # median
    fastest_ms: float
    slowest_ms: float
    peak_gib: float | None  # the most memory that was allocated on the GPU; None without one
    sparsity: float = 0.0  # fraction of block pairs not computed


@dataclass(frozen=True)
class StepTimes:
    dense: StepTime
    sparse: tuple[StepTime, ...]  # at each forced sparsity
    without: StepTime  # without self-attention
    after: StepTime  # dense again, when everything was removed
    fallbacks: dict[str, int]  # why calls of the sparse variants ran dense, and how many did

    @property
    def attention_share(self) -> float:
        """Fraction of the dense step's time that self-attention takes."""
        return 1.0 - self.without.ms / self.dense.ms

    @property
    def ceiling(self) -> float:
        """Upper bound of the step's speed-up by any attention method: 1 / (1 − share)."""
        return self.dense.ms / self.without.ms

    @property
    def rows(self) -> tuple[StepTime, ...]:
        return (self.dense, *self.sparse, self.without, self.after)


def time_step(
    step: Step,
    backend: Backend,
    device: torch.device,
    *,
    topk: Sequence[float] = (0.5, 0.3, 0.15),
    repeats: int = 10,
    on_time: Callable[[StepTime], None] = lambda row: None,
) -> StepTimes:
    """Time all variants of a step, alternating, so that a drift of the clock rate affects them equally.

    The sparse variants compute the fractions `topk` of the key blocks, the same for all heads.
    """
    layers = [(layer.name, layer.num_heads) for layer in step.sites.layers]
    fallbacks: dict[str, int] = {}

    def sparse(fraction: float) -> Callable[[], SparseHandle]:
        policy = Policy.uniform(layers, HeadThresholds(-1.0, topk=fraction))
        return lambda: SparseHandle(step.sites, policy, backend)

    variants: list[tuple[str, Callable[[], AbstractContextManager[SparseHandle | None]]]] = [
        ("dense", nullcontext),
        *((f"{backend.name}, topk {fraction:g}", sparse(fraction)) for fraction in topk),
        ("self-attention removed", lambda: _without_attention(step)),
        ("dense, everything taken off", nullcontext),
    ]
    milliseconds: dict[str, list[float]] = {name: [] for name, _ in variants}
    peaks: dict[str, float] = {}
    sparsity: dict[str, float] = {}
    for number in range(repeats):
        for name, install in variants:
            with install() as handle:
                with peak_memory(device) as peak:
                    milliseconds[name] += time_calls(step.run, device, repeats=1, warm_up=1 if number else 2, at_once=1)
                peaks[name] = max(peaks.get(name, 0.0), peak())
                if handle is not None:
                    stats = handle.stats()
                    sparsity[name] = stats.sparsity
                    fallbacks |= stats.fallbacks
    rows = []
    for name, ms in milliseconds.items():
        peak_gib = peaks[name] if device.type == "cuda" else None
        rows.append(StepTime(name, statistics.median(ms), min(ms), max(ms), peak_gib, sparsity.get(name, 0.0)))
        on_time(rows[-1])
    return StepTimes(rows[0], tuple(rows[1:-2]), rows[-2], rows[-1], fallbacks)


@contextmanager
def _without_attention(step: Step) -> Iterator[None]:
    interception = Interception(step.sites, _skip)
    try:
        yield
    finally:
        interception.remove()


def _skip(call: AttentionCall) -> Tensor:
    """Replace attention at no cost: by the values, or the queries where the values aren't shaped like the output."""
    return call.v if call.v.shape == call.q.shape else call.q
