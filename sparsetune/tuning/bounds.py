"""The sparsest policy within a bound on every head's error, read off calibrated curves."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from sparsetune.attention.policy import Policy
from sparsetune.attention.schedule import DenseSchedule
from sparsetune.attention.thresholds import PVTHRESHD_OFF, HeadThresholds, LayerThresholds, Rule
from sparsetune.errors import TuningError
from sparsetune.tuning.curves import Curves

DENSE = {
    "cdf": HeadThresholds(1.0, cdfthreshd=1.0, is_sparse=False),
    "topk": HeadThresholds(1.0, topk=1.0, is_sparse=False),
}


def check_bounds(l1: float, pv_l1: float | None) -> None:
    """Check that the second bound leaves room above the first.

    Raises:
        TuningError: it doesn't.
    """
    if pv_l1 is not None and pv_l1 <= l1:
        raise TuningError(
            f"pv_l1 must exceed l1, since it bounds the error of both, but they are {pv_l1:g} and {l1:g}; raise --pv-l1"
        )


def bounded_policy(
    curves: Curves,
    l1: float,
    pv_l1: float | None = None,
    *,
    orders: Sequence[str] | None = None,
    keep_text: bool = True,
    rule: Rule = "cdf",
    dense_fraction: float = 0.0,
) -> Policy:
    """Give every head the point with the most sparsity whose error was within the bound wherever it was measured.

    That is on every input and at every sampled step that runs sparse; the point itself was measured, nothing is
    interpolated. A head without such a point runs dense. Each layer takes the token order that gives it the most.

    Args:
        curves: the calibration.
        l1: bound on the relative L1 error of a head's output, as SpargeAttn's tuner has it.
        pv_l1: bound with `pvthreshd` at work, above `l1`; None leaves it off. The lowest measured value that holds.
        orders: token orders to choose from, None for all that were calibrated.
        keep_text: whether the text's key blocks are always computed.
        rule: cdf or topk.
        dense_fraction: fraction of the steps that run dense; their errors don't count.

    Raises:
        TuningError: an order wasn't calibrated, or the bounds are out of order.
    """
    check_bounds(l1, pv_l1)
    places = curves.places(orders, keep_text)
    schedule = DenseSchedule(dense_fraction)
    active = curves.active_steps(schedule)
    plain = np.array([point.rule == rule and point.pvthreshd == PVTHRESHD_OFF for point in curves.points])
    layers = []
    for index, (name, num_heads) in enumerate(curves.layers):
        error = curves.error[places, index][:, active, :num_heads].max(axis=1)  # (orders, heads, points)
        sparsity = curves.sparsity[places, index][:, active, :num_heads].mean(axis=1)
        allowed = (error <= l1) & plain & (sparsity > 0)
        gained = np.where(allowed, sparsity, 0.0).max(axis=2).sum(axis=1)
        order = int(gained.argmax())
        best = np.where(allowed[order], sparsity[order], -1.0).argmax(axis=1)
        heads = []
        for head, point in enumerate(best):
            if not allowed[order, head, point]:
                heads.append(DENSE[rule])
                continue
            chosen = curves.points[point]
            heads.append(chosen if pv_l1 is None else _with_pv(curves, chosen, error[order, head], pv_l1))
        layers.append(LayerThresholds(name, tuple(heads), curves.arrangements[places[order]].order))
    return in_one_order(Policy(tuple(layers), schedule, "raster", keep_text, curves.select_partial))


def in_one_order(policy: Policy) -> Policy:
    """Write the order that all layers share, where they share one, as the policy's."""
    if len(set(policy.orders)) > 1:
        return policy
    return replace(policy, order=policy.orders[0], layers=tuple(replace(layer, order=None) for layer in policy.layers))


def _with_pv(curves: Curves, chosen: HeadThresholds, error: npt.NDArray[np.float32], pv_l1: float) -> HeadThresholds:
    """The lowest measured `pvthreshd` with which a point holds the second bound."""
    variants = [
        (point.pvthreshd, point)
        for index, point in enumerate(curves.points)
        if replace(point, pvthreshd=PVTHRESHD_OFF) == chosen and error[index] <= pv_l1
    ]
    return min(variants, default=(PVTHRESHD_OFF, chosen), key=lambda variant: variant[0])[1]
