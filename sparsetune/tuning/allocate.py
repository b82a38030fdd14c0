"""The policy with the most sparsity for an error of the video: every head buys sparsity at the same price.

Within one budget, a head that gets much sparsity for little error should take more of it than one that gets little.
At the best allocation no head could trade with another: each stands at the point that maximises sparsity − error /
price, with one price for all (Lagrange), and the price is set so that the whole error is the budget.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from sparsetune.attention.policy import Policy
from sparsetune.attention.schedule import DenseSchedule
from sparsetune.attention.thresholds import PVTHRESHD_OFF, LayerThresholds, Rule
from sparsetune.tuning.bounds import DENSE, in_one_order
from sparsetune.tuning.curves import Arrangement, Curves
from sparsetune.tuning.offers import Catalogue, Floats, Offers, Taken
from sparsetune.tuning.sensitivity import Sensitivity

_BISECTIONS = 40
_CHEAPEST, _DEAREST = 1e-9, 1e9


def allocate(
    catalogue: Catalogue,
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
        catalogue: the calibration, and what an error does to the video.
        budget: root mean square of the heads' relative L1 errors, weighted by sensitivity and by the head's share of
            its layer's output. With the same error everywhere it is that error.
        sparsity: as much as is wanted, in [0, 1], over a whole generation as calibration predicts it.
        orders: token orders to choose from, a head at a time; None for all that were calibrated.
        keep_text: whether the text's key blocks are always computed.
        rule: cdf or topk.
        dense_fraction: fraction of the steps that run dense.
        steepness: how far sensitive parts of the generation are spared, see `Sensitivity.drop_scale`.
        weights: factors on the sensitivity of equal groups of consecutive layers.

    Raises:
        TuningError: an order wasn't calibrated.
    """
    curves, schedule = catalogue.curves, catalogue.sensitivity.schedule(dense_fraction, steepness)
    places = curves.places(orders, keep_text)
    offers = catalogue.offers(places, rule, schedule, weights)
    taken, order = _take(offers, _price(offers, budget, sparsity))
    names = [curves.arrangements[place].order for place in places]
    layers = []
    for index, (name, num_heads) in enumerate(curves.layers):
        heads = [offers.points[point] if point >= 0 else DENSE[rule] for point in taken[index, :num_heads]]
        layers.append(LayerThresholds.in_orders(name, heads, [names[place] for place in order[index, :num_heads]]))
    return in_one_order(Policy(tuple(layers), schedule, "raster", keep_text, curves.select_partial))


def best_order(curves: Curves, orders: Sequence[str], keep_text: bool, budget: float = 0.1) -> str:
    """Pick the one token order that gives all layers together the most sparsity within an error budget."""
    catalogue = Catalogue(curves, Sensitivity())

    def sparsity(order: str) -> float:
        offers = catalogue.offers(curves.places([order], keep_text), curves.points[0].rule, DenseSchedule())
        taken, first = _take(offers, _price(offers, budget))
        return _sum(offers.gain, taken, first)

    return max(orders, key=sparsity)


def predict(catalogue: Catalogue, policy: Policy) -> float | None:
    """Give the error that a policy would have been allocated for, as `allocate` measures its budget.

    None where the policy has thresholds or an arrangement that weren't calibrated, e.g. SpargeAttn's defaults.
    """
    curves, rule = catalogue.curves, policy.layers[0].rule
    needed = {order: Arrangement(order, policy.keep_text) for order in policy.order_names}
    if policy.select_partial != curves.select_partial or not set(needed.values()) <= set(curves.arrangements):
        return None
    place_of = {order: curves.arrangements.index(arrangement) for order, arrangement in needed.items()}
    places = sorted(place_of.values())
    known = {point: index for index, point in enumerate(catalogue.table(places, rule).points)}
    of_thresholds = {
        thresholds: known.get(replace(thresholds, pvthreshd=PVTHRESHD_OFF))
        for thresholds in {thresholds for layer in policy.layers for thresholds in layer.heads}
    }
    if any(thresholds.is_sparse and point is None for thresholds, point in of_thresholds.items()):
        return None
    taken = [
        Taken(places.index(place_of[order]), index, head, point)
        for index, (layer, orders) in enumerate(zip(policy.layers, policy.head_orders, strict=True))
        for head, (thresholds, order) in enumerate(zip(layer.heads, orders, strict=True))
        if (point := of_thresholds[thresholds]) is not None
    ]
    return catalogue.error(places, rule, policy.schedule, taken)


def _take(offers: Offers, price: float) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Each head's best point at a price, -1 is dense, and the order that it has it in, both (layers, heads)."""
    profit: Floats = offers.gain - offers.cost / (price * offers.unit)
    best = profit.argmax(axis=-1)
    most = np.take_along_axis(profit, best[..., None], axis=-1)[..., 0]
    taken = np.where(most > 0, best, -1)
    order = most.argmax(axis=0)
    return np.take_along_axis(taken, order[None], axis=0)[0], order


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
    """Add up the figures, (orders, layers, heads, points), of what each head takes in its order."""
    layers, heads = np.ogrid[: taken.shape[0], : taken.shape[1]]
    return float(np.where(taken >= 0, figures[order, layers, heads, np.maximum(taken, 0)], 0.0).sum())
