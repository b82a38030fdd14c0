"""Allocation of an error budget to heads by a Lagrange multiplier, for the most sparsity.

Each head takes the point that maximises sparsity − error / multiplier; one multiplier for all heads is optimal, and it
is bisected until the total error is the budget.
"""

import functools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sparsetune.attention.policy import Policy
from sparsetune.attention.schedule import DenseSchedule, phase
from sparsetune.attention.thresholds import PVTHRESHD_OFF, HeadThresholds, LayerThresholds, Rule
from sparsetune.tuning.calibration.bounded_policy import DENSE, in_one_order
from sparsetune.tuning.calibration.curves import Arrangement, Curves
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
    num_heads: int  # of all layers


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
        num_heads = sum(num_heads for _, num_heads in self.curves.layers)
        return CandidateCosts(table.points, cost, gain, _total(kinds, powers), num_heads)

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


_BISECTIONS = 40
_MIN_MULTIPLIER, _MAX_MULTIPLIER = 1e-9, 1e9


def allocate(
    candidates: CandidateTable,
    budget: float = math.inf,
    *,
    sparsity: float = 1.0,
    orders: Sequence[str] | None = None,
    keep_text: bool = True,
    rule: Rule = "cdf",
    dense_fraction: float = 0.0,
    steepness: float = 0.5,
    weights: Sequence[float] = (1.0,),
) -> Policy:
    """Return the policy with the most sparsity within an error budget, or the least error at a sparsity.

    Args:
        candidates: the calibration, and the effect of errors on the video.
        budget: root mean square of the heads' relative L1 errors, weighted by sensitivity and by the head's share of
            its layer's output. With the same error everywhere it is that error.
        sparsity: upper limit in [0, 1], over a whole generation as calibration predicts it.
        orders: token orders to choose from, for each head; None for all calibrated ones.
        keep_text: whether the text's key blocks are always computed.
        rule: cdf or topk.
        dense_fraction: fraction of the steps that run dense.
        steepness: see `Sensitivity.drop_scale`.
        weights: factors on the sensitivity of equal groups of consecutive layers.

    Raises:
        TuningError: an order wasn't calibrated.
    """
    curves, schedule = candidates.curves, candidates.sensitivity.schedule(dense_fraction, steepness)
    places = curves.arrangement_indices(orders, keep_text)
    costs = candidates.costs(places, rule, schedule, weights)
    taken, order = _take(costs, _multiplier(costs, budget, sparsity))
    names = [curves.arrangements[place].order for place in places]
    layers = []
    for index, (name, num_heads) in enumerate(curves.layers):
        heads = [costs.points[point] if point >= 0 else DENSE[rule] for point in taken[index, :num_heads]]
        layers.append(LayerThresholds.in_orders(name, heads, [names[place] for place in order[index, :num_heads]]))
    return in_one_order(Policy(tuple(layers), schedule, "raster", keep_text, curves.select_partial))


def best_order(curves: Curves, orders: Sequence[str], keep_text: bool, budget: float = 0.1) -> str:
    """Return the token order with the most sparsity, over all layers, within an error budget."""
    candidates = CandidateTable(curves, Sensitivity())

    def sparsity(order: str) -> float:
        costs = candidates.costs(curves.arrangement_indices([order], keep_text), curves.points[0].rule, DenseSchedule())
        taken, first = _take(costs, _multiplier(costs, budget))
        return _sum(costs.gain, taken, first)

    return max(orders, key=sparsity)


def predict(candidates: CandidateTable, policy: Policy) -> float | None:
    """Return the error of a policy in the unit of `allocate`'s budget.

    None if its thresholds or arrangement weren't calibrated, e.g. SpargeAttn's defaults.
    """
    curves, rule = candidates.curves, policy.layers[0].rule
    needed = {order: Arrangement(order, policy.keep_text) for order in policy.order_names}
    if policy.select_partial != curves.select_partial or not set(needed.values()) <= set(curves.arrangements):
        return None
    place_of = {order: curves.arrangements.index(arrangement) for order, arrangement in needed.items()}
    places = sorted(place_of.values())
    known = {point: index for index, point in enumerate(candidates.table(places, rule).points)}
    of_thresholds = {
        thresholds: known.get(replace(thresholds, pvthreshd=PVTHRESHD_OFF))
        for thresholds in {thresholds for layer in policy.layers for thresholds in layer.heads}
    }
    if any(thresholds.is_sparse and point is None for thresholds, point in of_thresholds.items()):
        return None
    taken = [
        (places.index(place_of[order]), index, head, point)
        for index, (layer, orders) in enumerate(zip(policy.layers, policy.head_orders, strict=True))
        for head, (thresholds, order) in enumerate(zip(layer.heads, orders, strict=True))
        if (point := of_thresholds[thresholds]) is not None
    ]
    return candidates.error(places, rule, policy.schedule, taken)


def _take(costs: CandidateCosts, multiplier: float) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Each head's best point at a multiplier, -1 is dense, and its order, both (layers, heads)."""
    objective: Floats = costs.gain - costs.cost / (multiplier * costs.unit)
    best = objective.argmax(axis=-1)
    most = np.take_along_axis(objective, best[..., None], axis=-1)[..., 0]
    taken = np.where(most > 0, best, -1)
    order = most.argmax(axis=0)
    return np.take_along_axis(taken, order[None], axis=0)[0], order


def _multiplier(costs: CandidateCosts, budget: float, sparsity: float = 1.0) -> float:
    """The highest multiplier at which the total error is within the budget and the sparsity within its limit."""
    low, high = np.log(_MIN_MULTIPLIER), np.log(_MAX_MULTIPLIER)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        taken = _take(costs, float(np.exp(middle)))
        error = np.sqrt(_sum(costs.cost, *taken) / costs.unit)
        within = error <= budget and _sum(costs.gain, *taken) <= sparsity * costs.num_heads
        low, high = (middle, high) if within else (low, middle)
    return float(np.exp(low))


def _sum(figures: Floats, taken: npt.NDArray[np.int64], order: npt.NDArray[np.int64]) -> float:
    """Sum figures, (orders, layers, heads, points), over the heads' choices."""
    layers, heads = np.ogrid[: taken.shape[0], : taken.shape[1]]
    return float(np.where(taken >= 0, figures[order, layers, heads, np.maximum(taken, 0)], 0.0).sum())
