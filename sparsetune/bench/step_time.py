"""Time of one denoising step: dense, at forced sparsities, and without self-attention."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsetune.attention.backends import Backend
from sparsetune.attention.handle import SparseHandle
from sparsetune.attention.interception import AttentionCall, Interception
from sparsetune.attention.ordering import ORDERS
from sparsetune.attention.policy import Policy
from sparsetune.attention.thresholds import HeadThresholds, LayerThresholds
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
    ordered: StepTime | None  # the first of them with a token order for each head; None if it wasn't asked for
    without: StepTime  # without self-attention
    after: StepTime  # dense again, when everything was removed
    fallbacks: dict[str, int]  # why calls of the sparse variants ran dense, and how many did
    num_layers: int  # with self-attention

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
        ordered = () if self.ordered is None else (self.ordered,)
        return (self.dense, *self.sparse, *ordered, self.without, self.after)


@dataclass(frozen=True)
class StepSeconds:
    """What a denoising step of a model costs on a GPU, in seconds; figures of attention are of one layer.

    Sparse attention takes `overhead + pairs * (1 - sparsity)`, and `order` more where any head has a token order other
    than raster.
    """

    rest: float  # without self-attention
    dense: float
    overhead: float
    pairs: float
    order: float
    num_layers: int

    @classmethod
    def of(cls, times: StepTimes) -> "StepSeconds":
        """Fit a line through a step's times at several sparsities.

        A step so short that launching its kernels takes longer than running them can be as fast dense as without
        attention: attention then costs nothing.
        """
        rest = min(times.without.ms, times.dense.ms)

        def of_layer(row: StepTime) -> float:
            return (row.ms - rest) / 1e3 / times.num_layers

        sparsity = [row.sparsity for row in times.sparse]
        slope, intercept = np.polyfit(sparsity, [of_layer(row) for row in times.sparse], 1)
        pairs = max(-float(slope), 1e-9)
        order = 0.0
        if times.ordered is not None:
            order = of_layer(times.ordered) - (float(intercept) - pairs * times.ordered.sparsity)
        return cls(
            rest=rest / 1e3,
            dense=of_layer(times.dense),
            overhead=float(intercept) - pairs,
            pairs=pairs,
            order=max(0.0, order),
            num_layers=times.num_layers,
        )

    @property
    def step(self) -> float:
        """Of a dense step."""
        return self.rest + self.num_layers * self.dense

    @property
    def attention_share(self) -> float:
        """Fraction of a dense step's time that self-attention takes."""
        return self.num_layers * self.dense / self.step

    @property
    def ceiling(self) -> float:
        """Upper bound of the speed-up by any attention method: 1 / (1 − share)."""
        return self.step / self.rest

    @property
    def break_even(self) -> float:
        """Sparsity from which on a layer is faster sparse than dense; above 1 where it never is."""
        return max(0.0, (self.overhead + self.pairs - self.dense) / self.pairs)

    def saved(self, sparsity: float, ordered: bool = False) -> float:
        """Seconds that a layer at a sparsity saves against dense; negative where it is slower."""
        return self.dense - self.overhead - self.pairs * (1.0 - sparsity) - (self.order if ordered else 0.0)


def time_step(
    step: Step,
    backend: Backend,
    device: torch.device,
    *,
    topk: Sequence[float] = (0.5, 0.3, 0.15),
    ordered: bool = False,
    repeats: int = 10,
    on_time: Callable[[StepTime], None] = lambda row: None,
) -> StepTimes:
    """Time all variants of a step, alternating, so that a drift of the clock rate affects them equally.

    The sparse variants compute the fractions `topk` of the key blocks, the same for all heads; `ordered` adds one with
    the first of these fractions and a token order for each head.
    """
    layers = [(layer.name, layer.num_heads) for layer in step.sites.layers]
    fallbacks: dict[str, int] = {}

    def sparse(fraction: float) -> Callable[[], SparseHandle]:
        policy = Policy.uniform(layers, HeadThresholds(-1.0, topk=fraction))
        return lambda: SparseHandle(step.sites, policy, backend)

    def in_orders() -> SparseHandle:
        head, names = HeadThresholds(-1.0, topk=topk[0]), list(ORDERS)
        in_layer = [
            LayerThresholds.in_orders(name, [head] * count, [names[index % len(names)] for index in range(count)])
            for name, count in layers
        ]
        return SparseHandle(step.sites, Policy(tuple(in_layer)), backend)

    variants: list[tuple[str, Callable[[], AbstractContextManager[SparseHandle | None]]]] = [
        ("dense", nullcontext),
        *((f"{backend.name}, topk {fraction:g}", sparse(fraction)) for fraction in topk),
        *([("token orders", in_orders)] if ordered else []),
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
    others = rows[len(topk) + 1 : -2]
    return StepTimes(
        dense=rows[0],
        sparse=tuple(rows[1 : len(topk) + 1]),
        ordered=others[0] if others else None,
        without=rows[-2],
        after=rows[-1],
        fallbacks=fallbacks,
        num_layers=step.num_layers,
    )


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
