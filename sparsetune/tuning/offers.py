"""What every head could take for its error and sparsity, read off calibrated curves.

A search reads hundreds of policies off the same curves. What they share is worked out once, and a search's trials are
no function of that: every sum is added up in the same order whether its terms are known already or not.
"""

import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sparsetune.attention.schedule import DenseSchedule, phase
from sparsetune.attention.thresholds import HeadThresholds, Rule
from sparsetune.tuning.curves import Curves
from sparsetune.tuning.sensitivity import Sensitivity, head_shares

Floats = npt.NDArray[np.float64]

_UNBOUNDED = 1e3
"""What stands for an infinite relative error."""


@dataclass(frozen=True)
class Offers:
    """What every head could take: its points' error and sparsity over a whole generation.

    Args:
        points: the grid's points.
        cost: squared error, weighted by sensitivity, float64 (orders, layers, heads, points).
        gain: sparsity, the same shape.
        unit: the cost if every head's relative error were 1.
        num_heads: of all layers.
    """

    points: tuple[HeadThresholds, ...]
    cost: Floats
    gain: Floats
    unit: float
    num_heads: int


@dataclass(frozen=True)
class Table:
    """The curves of some arrangements under one rule, in float64.

    Args:
        points: the grid's points of that rule, without `pvthreshd`.
        error: for each sampled step (orders, layers, heads, points).
        sparsity: the same.
    """

    points: tuple[HeadThresholds, ...]
    error: tuple[Floats, ...]
    sparsity: tuple[Floats, ...]


class Taken(NamedTuple):
    """A point that a head takes, by the places of all four in a table."""

    order: int
    layer: int
    head: int
    point: int


class _Kind(NamedTuple):
    """All that tells the denoising steps apart: two of one kind cost and earn the same.

    Args:
        part: of the generation, as sensitivity tells them apart.
        place: of the nearest step that was sampled.
        factor: on what is dropped; 0 is dense.
    """

    part: int
    place: int
    factor: float


class Catalogue:
    """The offers of a calibration, for any schedule and weights.

    Args:
        curves: the calibration; its arrays must stay as they are.
        sensitivity: what an error does to the video.
    """

    def __init__(self, curves: Curves, sensitivity: Sensitivity) -> None:
        self.curves, self.sensitivity = curves, sensitivity
        self._squared_shares = head_shares(curves) ** 2
        self._nearest = [
            min(range(len(curves.steps)), key=lambda place: abs(curves.steps[place] - step))
            for step in range(curves.num_steps)
        ]
        self._tables: dict[tuple[tuple[int, ...], Rule], Table] = {}

    def offers(
        self, places: Sequence[int], rule: Rule, schedule: DenseSchedule, weights: Sequence[float] = (1.0,)
    ) -> Offers:
        """Add up what every point costs and earns over the generation.

        Args:
            places: of the arrangements to choose from.
            rule: cdf or topk.
            schedule: how much each step drops.
            weights: factors on the sensitivity of equal groups of consecutive layers.
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
        num_heads = sum(num_heads for _, num_heads in self.curves.layers)
        return Offers(table.points, cost, gain, _total(kinds, powers), num_heads)

    def error(self, places: Sequence[int], rule: Rule, schedule: DenseSchedule, taken: Sequence[Taken]) -> float:
        """Give the whole error of what heads take, as a budget measures it; heads that take nothing are left out."""
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
        return float(np.sqrt(_sum(cost.tolist()) / _total(kinds, powers)))

    def table(self, places: Sequence[int], rule: Rule) -> Table:
        """Give the curves of some arrangements under a rule."""
        key = tuple(places), rule
        if key not in self._tables:
            self._tables[key] = self._read(*key)
        return self._tables[key]

    def _kinds(self, schedule: DenseSchedule) -> list[_Kind]:
        """Give the kind of each denoising step."""
        num_steps, num_parts = len(self._nearest), len(self.sensitivity.phases)
        return [
            _Kind(phase(step, num_steps, num_parts), place, schedule.scale(step, num_steps))
            for step, place in enumerate(self._nearest)
        ]

    def _powers(self, kinds: Sequence[_Kind], weights: Sequence[float]) -> dict[_Kind, Floats]:
        """Give what a squared error of 1 costs in each kind of step, (layers, heads)."""
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
    return _sum(sums[kind] for kind in kinds)


def _sum(figures: Iterable[float]) -> float:
    """Add up one by one, as Python's `sum` did before 3.12."""
    return functools.reduce(operator.add, figures, 0.0)


@functools.lru_cache(maxsize=256)
def _shift(points: tuple[HeadThresholds, ...], factor: float) -> Floats:
    """Weights that interpolate the grid where each point drops `factor` times as much, (points, points).

    A column holds the two points of the same similarity threshold on either side, linear in the logarithm of what
    is dropped; beyond the grid's end it is the last point.
    """
    weights = np.zeros((len(points), len(points)))
    for sim in {point.simthreshd1 for point in points}:
        family = sorted(
            (index for index, point in enumerate(points) if point.simthreshd1 == sim),
            key=lambda index: _dropped(points[index]),
        )
        known = np.log([_dropped(points[index]) for index in family])
        for place, index in enumerate(family):
            at = float(np.interp(known[place] + np.log(factor), known, np.arange(len(family))))
            below, rest = int(at), at - int(at)
            weights[family[below], index] += 1.0 - rest
            if rest:
                weights[family[below + 1], index] += rest
    return weights


def _dropped(point: HeadThresholds) -> float:
    kept = point.cdfthreshd if point.cdfthreshd is not None else point.topk
    return 1.0 - (kept or 0.0)
