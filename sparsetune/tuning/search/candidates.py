"""The candidate thresholds of every head: their error and sparsity over a generation, read off the curves."""

import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sparsetune.attention.schedule import DenseSchedule, phase
from sparsetune.attention.thresholds import HeadThresholds, Rule
from sparsetune.tuning.calibration.curves import Curves
from sparsetune.tuning.calibration.sensitivity import Sensitivity, head_shares

Floats = npt.NDArray[np.float64]

_UNBOUNDED = 1e3
"""Replaces an infinite relative error."""


@dataclass(frozen=True)
class CandidateCosts:
    """Error and sparsity of every candidate threshold of each head, over a whole generation."""

    points: tuple[HeadThresholds, ...]
    cost: Floats  # squared error, weighted by sensitivity, float64 (orders, layers, heads, points)
    gain: Floats  # sparsity, the same shape
    unit: float  # the cost if every head's relative error were 1
    heads: npt.NDArray[np.int64]  # (layers,), heads of each
    sparse_share: float  # fraction of the steps that run sparse

    @property
    def num_heads(self) -> int:
        return int(self.heads.sum())


@dataclass(frozen=True)
class Table:
    """The curves of some arrangements under one rule, in float64."""

    points: tuple[HeadThresholds, ...]  # those of the rule, without `pvthreshd`
    error: tuple[Floats, ...]  # for each sampled step (orders, layers, heads, points)
    sparsity: tuple[Floats, ...]


Choice = tuple[int, int, int, int]
"""A head's point in a table: indices of order, layer, head and point."""


class _Kind(NamedTuple):
    """Kind of denoising step: steps of one kind have the same error and sparsity."""

    part: int  # index among the phases of `Sensitivity`
    place: int  # index of the nearest sampled step
    factor: float  # on the dropped fraction; 0 is dense


class CandidateTable:
    """The candidate thresholds of a calibration, for any schedule and weights; caches values of its curves."""

    def __init__(self, curves: Curves, sensitivity: Sensitivity) -> None:
        self.curves, self.sensitivity = curves, sensitivity
        self._squared_shares = head_shares(curves) ** 2
        self._nearest = [
            min(range(len(curves.steps)), key=lambda place: abs(curves.steps[place] - step))
            for step in range(curves.num_steps)
        ]
        self._tables: dict[tuple[tuple[int, ...], Rule], Table] = {}

    def costs(
        self, places: Sequence[int], rule: Rule, schedule: DenseSchedule, weights: Sequence[float] = (1.0,)
    ) -> CandidateCosts:
        """Sum the error and sparsity of every point over the generation.

        `places` are indices of arrangements, `weights` factors on the sensitivity of equal groups of layers.
        """
        table, kinds = self.table(places, rule), self._kinds(schedule)
        cost, gain = np.zeros(table.error[0].shape), np.zeros(table.error[0].shape)
        powers = self._powers(kinds, weights)
        known: dict[_Kind, tuple[Floats, Floats]] = {}
        for kind in (kind for kind in kinds if kind.factor):
            if kind not in known:
                shifted = _shift(table.points, kind.factor)
                of_cost = powers[kind][..., None] * (table.error[kind.place] @ shifted) ** 2
                known[kind] = of_cost, table.sparsity[kind.place] @ shifted / len(kinds)
            cost += known[kind][0]
            gain += known[kind][1]
        heads = np.array([num_heads for _, num_heads in self.curves.layers])
        sparse_share = sum(kind.factor > 0 for kind in kinds) / len(kinds)
        return CandidateCosts(table.points, cost, gain, _total(kinds, powers), heads, sparse_share)

    def sparsity(
        self, places: Sequence[int], rule: Rule, schedule: DenseSchedule, taken: Sequence[Choice]
    ) -> tuple[Floats, ...]:
        """Return the sparsity of each layer, float64 (layers,), at each denoising step; 0 where it is dense."""
        table, num_layers = self.table(places, rule), len(self.curves.layers)
        heads = np.array([num_heads for _, num_heads in self.curves.layers])
        order, layer, head, point = np.array(taken, dtype=np.int64).reshape(-1, 4).T
        known: dict[_Kind, Floats] = {}
        kinds = self._kinds(schedule)
        for kind in set(kinds):
            of_head = np.zeros(len(taken))
            if kind.factor:
                shifted = table.sparsity[kind.place] @ _shift(table.points, kind.factor)
                of_head = shifted[order, layer, head, point]
            known[kind] = np.bincount(layer, of_head, minlength=num_layers) / heads
        return tuple(known[kind] for kind in kinds)

    def error(self, places: Sequence[int], rule: Rule, schedule: DenseSchedule, taken: Sequence[Choice]) -> float:
        """Return the total error of the heads' choices, in the unit of a budget; dense heads are left out."""
        table, kinds = self.table(places, rule), self._kinds(schedule)
        powers = self._powers(kinds, (1.0,))
        order, layer, head, point = np.array(taken, dtype=np.int64).reshape(-1, 4).T
        cost = np.zeros(len(taken))
        known: dict[_Kind, Floats] = {}
        for kind in (kind for kind in kinds if kind.factor):
            if kind not in known:
                shifted = table.error[kind.place] @ _shift(table.points, kind.factor)
                known[kind] = powers[kind][layer, head] * shifted[order, layer, head, point] ** 2
            cost += known[kind]
        return float(np.sqrt(_add_up(cost.tolist()) / _total(kinds, powers)))

    def table(self, places: Sequence[int], rule: Rule) -> Table:
        key = tuple(places), rule
        if key not in self._tables:
            self._tables[key] = self._read(*key)
        return self._tables[key]

    def _kinds(self, schedule: DenseSchedule) -> list[_Kind]:
        num_steps, num_parts = len(self._nearest), len(self.sensitivity.phases)
        return [
            _Kind(phase(step, num_steps, num_parts), place, schedule.scale(step, num_steps))
            for step, place in enumerate(self._nearest)
        ]

    def _powers(self, kinds: Sequence[_Kind], weights: Sequence[float]) -> dict[_Kind, Floats]:
        """Cost of a squared error of 1 in each kind of step, (layers, heads)."""
        num_layers = len(self.curves.layers)
        weight = np.array([weights[phase(index, num_layers, len(weights))] for index in range(num_layers)])
        of_layer = self.sensitivity.of_layers(num_layers) * weight
        return {
            kind: (of_layer * self.sensitivity.phases[kind.part])[:, None] * self._squared_shares[:, kind.place]
            for kind in set(kinds)
        }

    def _read(self, places: tuple[int, ...], rule: Rule) -> Table:
        curves, steps = self.curves, range(len(self.curves.steps))
        usable = [index for index, point in enumerate(curves.points) if point.rule == rule]

        def of_step(figures: npt.NDArray[np.float32], step: int, infinite: float | None) -> Floats:
            read = figures[list(places), :, step][..., usable].astype(np.float64)
            return np.nan_to_num(read, posinf=infinite)

        return Table(
            tuple(curves.points[index] for index in usable),
            tuple(of_step(curves.error_rms, step, _UNBOUNDED) for step in steps),
            tuple(of_step(curves.sparsity, step, None) for step in steps),
        )


def _total(kinds: Sequence[_Kind], powers: Mapping[_Kind, Floats]) -> float:
    sums = {kind: float(power.sum()) for kind, power in powers.items()}
    return _add_up(sums[kind] for kind in kinds)


def _add_up(figures: Iterable[float]) -> float:
    """Sum without compensation, as Python's `sum` did before 3.12."""
    return functools.reduce(operator.add, figures, 0.0)


@functools.lru_cache(maxsize=256)
def _shift(points: tuple[HeadThresholds, ...], factor: float) -> Floats:
    """Weights, (points, points), that interpolate the grid where each point drops `factor` times as much.

    Linear in the logarithm of the dropped fraction, between points of one simthreshd1; clipped at the grid's ends.
    """
    weights = np.zeros((len(points), len(points)))
    for sim in {point.simthreshd1 for point in points}:
        family = sorted(
            (index for index, point in enumerate(points) if point.simthreshd1 == sim),
            key=lambda index: dropped(points[index]),
        )
        known = np.log([dropped(points[index]) for index in family])
        for place, index in enumerate(family):
            at = float(np.interp(known[place] + np.log(factor), known, np.arange(len(family))))
            below, rest = int(at), at - int(at)
            weights[family[below], index] += 1.0 - rest
            if rest:
                weights[family[below + 1], index] += rest
    return weights


def dropped(point: HeadThresholds) -> float:
    kept = point.cdfthreshd if point.cdfthreshd is not None else point.topk
    return 1.0 - (kept or 0.0)
