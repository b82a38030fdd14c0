"""The policy with the most sparsity for an error of the video: every head buys sparsity at the same price.

Within one budget, a head that gets much sparsity for little error should take more of it than one that gets little.
At the best allocation no head could trade with another: each stands at the point that maximises sparsity − error /
price, with one price for all (Lagrange), and the price is set so that the whole error is the budget.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from sparsetune.attention.policy import Policy
from sparsetune.attention.schedule import DenseSchedule, phase
from sparsetune.attention.thresholds import PVTHRESHD_OFF, HeadThresholds, LayerThresholds, Rule
from sparsetune.tuning.bounds import DENSE, in_one_order
from sparsetune.tuning.curves import Curves
from sparsetune.tuning.sensitivity import Sensitivity, head_shares

Floats = npt.NDArray[np.float64]

_BISECTIONS = 40
_CHEAPEST, _DEAREST = 1e-9, 1e9


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


def allocate(
    curves: Curves,
    sensitivity: Sensitivity,
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
    """Read off the policy that gets the most sparsity within an error budget, or a sparsity at the least error.

    Args:
        curves: the calibration.
        sensitivity: what an error does to the video, by part of the generation and layer.
        budget: root mean square of the heads' relative L1 errors, weighted by sensitivity and by the head's share of
            its layer's output. With the same error everywhere it is that error.
        sparsity: as much as is wanted, in [0, 1], over a whole generation as calibration predicts it.
        orders: token orders to choose from, a layer at a time; None for all that were calibrated.
        keep_text: whether the text's key blocks are always computed.
        rule: cdf or topk.
        dense_fraction: fraction of the steps that run dense.
        steepness: how far sensitive parts of the generation are spared, see `Sensitivity.drop_scale`.
        weights: factors on the sensitivity of equal groups of consecutive layers.

    Raises:
        TuningError: an order wasn't calibrated.
    """
    places = curves.places(orders, keep_text)
    schedule = sensitivity.schedule(dense_fraction, steepness)
    offers = _offers(curves, sensitivity, places, rule, schedule, weights)
    taken, order = _take(offers, _price(offers, budget, sparsity))
    layers = []
    for index, (name, num_heads) in enumerate(curves.layers):
        chosen = taken[order[index], index, :num_heads]
        heads = tuple(offers.points[point] if point >= 0 else DENSE[rule] for point in chosen)
        layers.append(LayerThresholds(name, heads, curves.arrangements[places[order[index]]].order))
    return in_one_order(Policy(tuple(layers), schedule, "raster", keep_text, curves.select_partial))


def best_order(curves: Curves, orders: Sequence[str], keep_text: bool, budget: float = 0.1) -> str:
    """Pick the one token order that gives all layers together the most sparsity within an error budget."""

    def sparsity(order: str) -> float:
        rule = curves.points[0].rule
        offers = _offers(curves, Sensitivity(), curves.places([order], keep_text), rule, DenseSchedule(), (1.0,))
        taken, first = _take(offers, _price(offers, budget))
        return _sum(offers.gain, taken, first)

    return max(orders, key=sparsity)


def predict(curves: Curves, sensitivity: Sensitivity, policy: Policy) -> float | None:
    """Give the error that a policy would have been allocated for, as `allocate` measures its budget.

    None where the policy has thresholds or an arrangement that weren't calibrated, e.g. SpargeAttn's defaults.
    """
    arrangements = [(order, policy.keep_text) for order in policy.orders]
    if policy.select_partial != curves.select_partial or not set(arrangements) <= set(curves.arrangements):
        return None
    places = sorted({curves.arrangements.index(each) for each in arrangements})
    offers = _offers(curves, sensitivity, places, policy.layers[0].rule, policy.schedule, (1.0,))
    known = {point: index for index, point in enumerate(offers.points)}
    spent = 0.0
    for index, layer in enumerate(policy.layers):
        order = places.index(curves.arrangements.index(arrangements[index]))
        for head, thresholds in enumerate(layer.heads):
            point = known.get(replace(thresholds, pvthreshd=PVTHRESHD_OFF))
            if point is None and thresholds.is_sparse:
                return None
            spent += 0.0 if point is None else float(offers.cost[order, index, head, point])
    return float(np.sqrt(spent / offers.unit))


def _take(offers: Offers, price: float) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Each head's best point at a price, (orders, layers, heads), -1 is dense; and each layer's best order."""
    profit: Floats = offers.gain - offers.cost / (price * offers.unit)
    best = profit.argmax(axis=-1)
    most = np.take_along_axis(profit, best[..., None], axis=-1)[..., 0]
    order = np.maximum(most, 0.0).sum(axis=-1).argmax(axis=0)
    return np.where(most > 0, best, -1), order


def _price(offers: Offers, budget: float, sparsity: float = 1.0) -> float:
    """The highest price at which neither the whole error exceeds the budget nor the sparsity what is wanted."""
    low, high = np.log(_CHEAPEST), np.log(_DEAREST)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        taken = _take(offers, float(np.exp(middle)))
        error = np.sqrt(_sum(offers.cost, *taken) / offers.unit)
        within = error <= budget and _sum(offers.gain, *taken) <= sparsity * offers.num_heads
        low, high = (middle, high) if within else (low, middle)
    return float(np.exp(low))


def _sum(figures: Floats, taken: npt.NDArray[np.int64], order: npt.NDArray[np.int64]) -> float:
    """Add up the figures, (orders, layers, heads, points), of what is taken in each layer's order."""
    layers = np.arange(len(order))
    chosen = taken[order, layers]  # (layers, heads)
    of_points = np.take_along_axis(figures[order, layers], np.maximum(chosen, 0)[..., None], axis=-1)[..., 0]
    return float(np.where(chosen >= 0, of_points, 0.0).sum())


def _offers(
    curves: Curves,
    sensitivity: Sensitivity,
    places: Sequence[int],
    rule: Rule,
    schedule: DenseSchedule,
    weights: Sequence[float],
) -> Offers:
    num_layers = len(curves.layers)
    usable = [index for index, point in enumerate(curves.points) if point.rule == rule]
    points = tuple(curves.points[index] for index in usable)
    of_layer = sensitivity.of_layers(num_layers)
    of_layer = of_layer * np.array([weights[phase(index, num_layers, len(weights))] for index in range(num_layers)])
    shares = head_shares(curves)
    table = (len(places), num_layers, shares.shape[-1], len(points))
    cost, gain, unit = np.zeros(table), np.zeros(table), 0.0
    for step in range(curves.num_steps):
        sensitive = of_layer * sensitivity.phases[phase(step, curves.num_steps, len(sensitivity.phases))]
        place = min(range(len(curves.steps)), key=lambda place: abs(curves.steps[place] - step))
        power = sensitive[:, None] * shares[:, place] ** 2  # (layers, heads)
        unit += float(power.sum())
        factor = schedule.scale(step, curves.num_steps)
        if factor == 0.0:
            continue
        shifted = _shift(points, factor)
        error = np.nan_to_num(curves.error_rms[places, :, place][..., usable].astype(np.float64), posinf=1e3)
        sparsity = np.nan_to_num(curves.sparsity[places, :, place][..., usable].astype(np.float64))
        cost += power[..., None] * (error @ shifted) ** 2
        gain += sparsity @ shifted / curves.num_steps
    return Offers(points, cost, gain, unit, sum(num_heads for _, num_heads in curves.layers))


def _shift(points: Sequence[HeadThresholds], factor: float) -> Floats:
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
