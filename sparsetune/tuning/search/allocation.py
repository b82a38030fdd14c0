"""Allocation of an error budget to heads by a Lagrange multiplier, for the most seconds saved.

Each head takes the point that maximises sparsity − error / multiplier; one multiplier for all heads is optimal, and it
is bisected until the total error is the budget. On a GPU a layer's sparsity saves seconds only beyond what its kernel
and its token orders cost: a layer or step for which that isn't so runs dense, and a layer whose token orders don't earn
their cost keeps raster. Where the kernel computes every pair, these costs are 0 and sparsity itself is maximised.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from sparsetune.attention.policy import Policy
from sparsetune.attention.schedule import DenseSchedule
from sparsetune.attention.thresholds import PVTHRESHD_OFF, HeadThresholds, LayerThresholds, Rule
from sparsetune.bench.step_time import StepSeconds
from sparsetune.tuning.calibration.bounded_policy import DENSE, in_one_order
from sparsetune.tuning.calibration.curves import Arrangement, Curves
from sparsetune.tuning.calibration.sensitivity import Sensitivity
from sparsetune.tuning.search.candidates import CandidateCosts, CandidateTable, Choice, Floats, dropped


@dataclass(frozen=True)
class KernelCost:
    """What a sparse call costs beyond the pairs that it computes, in units of a layer's sparsity.

    Args:
        break_even: sparsity at which a layer is as fast as dense.
        order: sparsity that a layer with token orders other than raster must have beyond that.
    """

    break_even: float = 0.0
    order: float = 0.0

    @classmethod
    def of(cls, step: StepSeconds | None) -> "KernelCost":
        return cls() if step is None else cls(step.break_even, step.order / step.pairs)

    def needed(self, policy: Policy) -> Floats:
        """Return the sparsity from which on each layer saves time, (layers,); 0 for a dense one."""
        sparse = np.array([layer.is_sparse for layer in policy.layers])
        ordered = np.array([_has_order(orders) for orders in policy.sparse_orders])
        needed: Floats = sparse * (self.break_even + self.order * ordered)
        return needed


Sharing = Literal["none", "sparse_layers", "all_layers"]
"""Whether each head has thresholds of its own, or all heads of the sparse layers, or of all layers, have one."""

_NEAR_BEST = 0.98
"""Of the most that one threshold can save: what saves so much is told apart by its error."""

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
    kernel: KernelCost = KernelCost(),
    dense_last: float = 0.0,
    sharing: Sharing = "none",
) -> Policy:
    """Return the policy that saves most within an error budget, or has the least error at a sparsity.

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
        kernel: what a sparse call costs beyond its pairs.
        dense_last: fraction of the last steps that run dense.
        sharing: which heads have one threshold together, as serving engines take it.

    Raises:
        TuningError: an order wasn't calibrated.
    """
    curves, schedule = candidates.curves, candidates.sensitivity.schedule(dense_fraction, steepness)
    schedule = schedule.ending_dense(dense_last, curves.num_steps)
    places = curves.arrangement_indices(orders, keep_text)
    names = [curves.arrangements[place].order for place in places]
    costs = candidates.costs(places, rule, schedule, weights)
    raster = names.index("raster") if "raster" in names else None
    if sharing == "none":
        taken, order = _best(costs, budget, sparsity, kernel, raster)
    else:
        taken, order = _shared(costs, budget, sparsity, kernel, raster, every_layer=sharing == "all_layers")
    layers = []
    for index, (name, num_heads) in enumerate(curves.layers):
        heads = [costs.points[point] if point >= 0 else DENSE[rule] for point in taken[index, :num_heads]]
        layers.append(LayerThresholds.in_orders(name, heads, [names[place] for place in order[index, :num_heads]]))
    policy = in_one_order(Policy(tuple(layers), schedule, "raster", keep_text, curves.select_partial))
    return only_paying_steps(candidates, policy, kernel)


def only_paying_steps(candidates: CandidateTable, policy: Policy, kernel: KernelCost) -> Policy:
    """Run those steps of a calibrated policy dense in which its sparse layers together cost more than they save."""
    sparsity = predicted_sparsity(candidates, policy)
    if kernel == KernelCost() or sparsity is None:
        return policy
    needed = kernel.needed(policy)
    num_steps = candidates.curves.num_steps
    scales = [policy.schedule.scale(step, num_steps) for step in range(num_steps)]
    pays = [bool((of_layer - needed).sum() > 0) for of_layer in sparsity]
    kept = tuple(scale if worth else 0.0 for scale, worth in zip(scales, pays, strict=True))
    return policy if list(kept) == scales else replace(policy, schedule=DenseSchedule(0.0, kept))


def only_paying_layers(candidates: CandidateTable, policy: Policy, kernel: KernelCost) -> Policy:
    """Run those layers of a policy dense whose sparsity, as calibrated, costs more than it saves."""
    nearest = replace(policy, layers=tuple(_on_grid(candidates, layer) for layer in policy.layers))
    sparsity = predicted_sparsity(candidates, nearest)
    if sparsity is None:
        return policy
    pays = np.mean(sparsity, axis=0) > kernel.needed(policy)
    layers = tuple(
        layer if worth else replace(layer, heads=(DENSE[layer.rule],) * len(layer.heads), order=None)
        for layer, worth in zip(policy.layers, pays, strict=True)
    )
    return replace(policy, layers=layers)


def _on_grid(candidates: CandidateTable, layer: LayerThresholds) -> LayerThresholds:
    """Replace thresholds by the nearest calibrated ones of the same simthreshd1."""

    def nearest(head: HeadThresholds) -> HeadThresholds:
        points = [point for point in candidates.curves.points if point.rule == head.rule]
        sims = {point.simthreshd1 for point in points}
        sim = min(sims, key=lambda value: abs(value - head.simthreshd1))
        same = [point for point in points if point.simthreshd1 == sim]
        kept = min(same, key=lambda point: abs(dropped(point) - dropped(head)))
        return replace(kept, is_sparse=head.is_sparse)

    return replace(layer, heads=tuple(nearest(head) for head in layer.heads))


def best_order(curves: Curves, orders: Sequence[str], keep_text: bool, budget: float = 0.1) -> str:
    """Return the token order with the most sparsity, over all layers, within an error budget."""
    candidates = CandidateTable(curves, Sensitivity())

    def sparsity(order: str) -> float:
        costs = candidates.costs(curves.arrangement_indices([order], keep_text), curves.points[0].rule, DenseSchedule())
        taken, first = _best(costs, budget)
        return float(_by_layer(costs.gain, taken, first).sum())

    return max(orders, key=sparsity)


def predict(candidates: CandidateTable, policy: Policy) -> float | None:
    """Return the error of a policy in the unit of `allocate`'s budget.

    None if its thresholds or arrangement weren't calibrated, e.g. SpargeAttn's defaults.
    """
    found = _calibrated(candidates, policy)
    return None if found is None else candidates.error(found[0], policy.layers[0].rule, policy.schedule, found[1])


def predicted_sparsity(candidates: CandidateTable, policy: Policy) -> tuple[Floats, ...] | None:
    """Return the sparsity of each layer, (layers,), at each step; None where `predict` is None."""
    found = _calibrated(candidates, policy)
    return None if found is None else candidates.sparsity(found[0], policy.layers[0].rule, policy.schedule, found[1])


def predict_seconds(candidates: CandidateTable, policy: Policy, step: StepSeconds) -> float | None:
    """Return the seconds of a generation's denoising under a policy; None where `predict` is None."""
    sparsity = predicted_sparsity(candidates, policy)
    if sparsity is None:
        return None
    share = step.num_layers / len(policy.layers)  # below 1 where two transformers take turns
    saved = 0.0
    for number, of_layers in enumerate(sparsity):
        if not policy.schedule.is_dense(number, len(sparsity)):
            saved += sum(
                share * step.saved(float(of_layer), ordered=_has_order(orders))
                for of_layer, layer, orders in zip(of_layers, policy.layers, policy.sparse_orders, strict=True)
                if layer.is_sparse
            )
    return len(sparsity) * step.step - saved


def _has_order(orders: Sequence[str]) -> bool:
    """Whether the token orders of a layer's sparse heads make it reorder tokens."""
    return any(order != "raster" for order in orders)


def _calibrated(candidates: CandidateTable, policy: Policy) -> tuple[list[int], list[Choice]] | None:
    """Return the arrangements and the calibrated point of each sparse head; None where one wasn't calibrated."""
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
    return places, taken


_Taken = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""Each head's point, -1 is dense, and its order, both (layers, heads)."""


def _best(
    costs: CandidateCosts,
    budget: float,
    sparsity: float = 1.0,
    kernel: KernelCost = KernelCost(),
    raster: int | None = None,
) -> _Taken:
    """Choose every head's point; layers that earn less than the kernel costs run dense, or in raster order.

    `raster` is the index of that order, None where there is none. Layers are given up a few at a time, since what they
    leave of the budget lets the others earn more.
    """
    num_orders, num_layers = costs.gain.shape[:2]
    allowed = np.ones((num_orders, num_layers), dtype=bool)
    price = costs.sparse_share * costs.heads  # of a layer, where a call costs a sparsity of 1
    best, most = None, -np.inf
    while True:
        multiplier = _multiplier(costs, allowed, budget, sparsity)
        taken, order = _take(costs, multiplier, allowed)
        if kernel == KernelCost():
            return taken, order
        is_sparse = (taken >= 0).any(axis=-1)
        ordered = ((taken >= 0) & (order != raster)).any(axis=-1)
        needed = is_sparse * (kernel.break_even + kernel.order * ordered) * price
        earned = _by_layer(costs.gain, taken, order) - needed
        if best is None or earned.sum() > most:
            best, most = (taken, order), float(earned.sum())
        if raster is not None:
            worth = np.maximum(_values(costs, multiplier).max(axis=-1), 0.0)  # (orders, layers, heads)
            by_order = worth.max(axis=0).sum(axis=-1) - worth[raster].sum(axis=-1)
            plain = ordered & (by_order < kernel.order * price)
            if plain.any():
                allowed[:, plain] &= (np.arange(num_orders) == raster)[:, None]
                continue
        losing = np.flatnonzero(is_sparse & (earned <= 0))
        if not losing.size:
            return best
        worst = losing[np.argsort(earned[losing] / price[losing])]
        allowed[:, worst[: -(-losing.size // 4)]] = False


def _shared(
    costs: CandidateCosts, budget: float, sparsity: float, kernel: KernelCost, raster: int | None, every_layer: bool
) -> _Taken:
    """Choose one order and point for all heads, and the layers that have them: those that earn most for their error."""
    gain, cost = costs.gain.sum(axis=2), costs.cost.sum(axis=2)  # (orders, layers, points)
    ordered = (np.arange(len(gain)) != raster)[:, None]
    earned = gain - ((kernel.break_even + kernel.order * ordered) * costs.sparse_share * costs.heads)[..., None]
    pays = (earned > 0) | every_layer
    ranked = np.where(pays, cost / np.maximum(earned, 1e-12), np.inf).argsort(axis=1, kind="stable")
    gains, paid, earnings = (
        np.take_along_axis(np.where(pays, figures, np.inf), ranked, axis=1).cumsum(axis=1)
        for figures in (gain, cost, earned)
    )
    within = (paid <= budget**2 * costs.unit) & (gains <= sparsity * costs.num_heads) & np.isfinite(earnings)
    count = np.where(within[:, -1], len(costs.heads), 0) if every_layer else within.sum(axis=1)  # (orders, points)
    last = np.maximum(count - 1, 0)[:, None]
    most = np.where(count > 0, np.take_along_axis(earnings, last, axis=1)[:, 0], 0.0)
    error = np.where(most >= _NEAR_BEST * most.max(), np.take_along_axis(paid, last, axis=1)[:, 0], np.inf)
    order, point = np.unravel_index(int(error.argmin()), error.shape)
    taken = np.full(costs.gain.shape[1:3], -1)
    if most.max() > 0:
        taken[ranked[order, : count[order, point], point]] = point
    return taken, np.full_like(taken, order)


def _values(costs: CandidateCosts, multiplier: float) -> Floats:
    """Return what each point is worth at a multiplier, (orders, layers, heads, points)."""
    value: Floats = costs.gain - costs.cost / (multiplier * costs.unit)
    return value


def _take(costs: CandidateCosts, multiplier: float, allowed: npt.NDArray[np.bool_]) -> _Taken:
    """Choose each head's best point at a multiplier in the orders that are allowed for its layer, (orders, layers)."""
    value = _values(costs, multiplier)
    best = value.argmax(axis=-1)
    most = np.take_along_axis(value, best[..., None], axis=-1)[..., 0]
    most = np.where(allowed[..., None], most, -np.inf)
    taken = np.where(most > 0, best, -1)
    order = most.argmax(axis=0)
    return np.take_along_axis(taken, order[None], axis=0)[0], order


def _multiplier(costs: CandidateCosts, allowed: npt.NDArray[np.bool_], budget: float, sparsity: float) -> float:
    """The highest multiplier at which the total error is within the budget and the sparsity within its limit."""
    low, high = np.log(_MIN_MULTIPLIER), np.log(_MAX_MULTIPLIER)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        taken = _take(costs, float(np.exp(middle)), allowed)
        error = np.sqrt(_by_layer(costs.cost, *taken).sum() / costs.unit)
        within = error <= budget and _by_layer(costs.gain, *taken).sum() <= sparsity * costs.num_heads
        low, high = (middle, high) if within else (low, middle)
    return float(np.exp(low))


def _by_layer(figures: Floats, taken: npt.NDArray[np.int64], order: npt.NDArray[np.int64]) -> Floats:
    """Sum figures, (orders, layers, heads, points), over the heads' choices, (layers,)."""
    layers, heads = np.ogrid[: taken.shape[0], : taken.shape[1]]
    found: Floats = np.where(taken >= 0, figures[order, layers, heads, np.maximum(taken, 0)], 0.0).sum(axis=-1)
    return found
