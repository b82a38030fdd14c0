"""Policies with a bound on every head's error, chosen from calibrated curves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from sparsetune.attention.policy import Policy
from sparsetune.attention.schedule import DenseSchedule
from sparsetune.attention.thresholds import HeadThresholds, LayerThresholds, Rule
from sparsetune.errors import TuningError
from sparsetune.tuning.calibration.curves import Array, Curves

DENSE = {
    "cdf": HeadThresholds(1.0, cdfthreshd=1.0, is_sparse=False),
    "topk": HeadThresholds(1.0, topk=1.0, is_sparse=False),
}

_LARGE = 1e3
"""Replaces an infinite error, so that one can be interpolated."""

_Scores = Callable[[Array, Array], Array]
"""From errors and sparsities, (orders, heads, points) each, to a score of each point; 0 where it exceeds the bound."""


@dataclass(frozen=True)
class Bounds:
    """Bounds on the relative L1 error Σ|o − o'| / Σ|o| of each head's output."""

    l1: float
    pv_l1: float  # with `pvthreshd` in use; must exceed `l1`

    def __post_init__(self) -> None:
        if self.pv_l1 <= self.l1:
            raise TuningError(f"pv_l1 must exceed l1 ({self.l1:g}), got {self.pv_l1:g}; raise --pv-l1")


def bounded_policy(
    curves: Curves,
    l1: float,
    *,
    orders: Sequence[str] | None = None,
    keep_text: bool = True,
    rule: Rule = "cdf",
) -> Policy:
    """Choose each head's sparsest point whose error is within the bound for every prompt and sampled step.

    Points are as measured, not interpolated. A head without such a point runs dense. Each head has the token order
    with which it is sparsest, of `orders` or of all that were calibrated.
    """

    def scores(error: Array, sparsity: Array) -> Array:
        return np.where(error <= l1, sparsity, 0.0).astype(np.float32)

    return _choose_points(curves, scores, DENSE[rule], orders, keep_text, rule)


def starting_policy(
    curves: Curves, l1: float, *, orders: Sequence[str] | None = None, keep_text: bool = True, rule: Rule = "cdf"
) -> Policy:
    """Choose what is fixed during refinement: each head's `simthreshd1` and token order.

    They are those with the highest sparsity at the bound, interpolated between the measured points; the other
    threshold is that of the nearest point within the bound. A head without one gets the point with the lowest error:
    only the kernel's own error decides whether it can run sparse. Arguments are as of `bounded_policy`.
    """
    points = [point for point in curves.points if point.rule == rule]
    families = [
        sorted(
            (index for index, point in enumerate(points) if point.simthreshd1 == sim),
            key=lambda index: points[index].cdfthreshd or points[index].topk or 0.0,
        )
        for sim in sorted({point.simthreshd1 for point in points})
    ]

    def scores(error: Array, sparsity: Array) -> Array:
        at_bound = np.zeros_like(sparsity)
        for family in families:
            at_bound[..., family] = _sparsity_at_bound(l1, error[..., family], sparsity[..., family])
        return at_bound

    return _choose_points(curves, scores, None, orders, keep_text, rule)


def in_one_order(policy: Policy) -> Policy:
    """Move a token order that all sparse layers share from the layers to the policy."""
    used = {order for order, layer in zip(policy.orders, policy.layers, strict=True) if layer.is_sparse}
    shared = used.pop() if len(used) == 1 else None
    if not isinstance(shared, str):
        return policy
    return replace(policy, order=shared, layers=tuple(replace(layer, order=None) for layer in policy.layers))


def _choose_points(
    curves: Curves,
    scores: _Scores,
    fallback: HeadThresholds | None,
    orders: Sequence[str] | None,
    keep_text: bool,
    rule: Rule,
) -> Policy:
    """Choose each head's token order and point with the highest score.

    A head whose scores are all 0 gets `fallback`, or, where that is None, its point with the lowest error.
    """
    arrangements = curves.arrangement_indices(orders, keep_text)
    names = [curves.arrangements[index].order for index in arrangements]
    usable = [index for index, point in enumerate(curves.points) if point.rule == rule]
    points = [curves.points[index] for index in usable]
    steps, layers = list(range(len(curves.steps))), []
    for index, (name, num_heads) in enumerate(curves.layers):
        # (orders, heads, points)
        error = curves.error[arrangements, index][:, steps, :num_heads][..., usable].max(axis=1)
        sparsity = curves.sparsity[arrangements, index][:, steps, :num_heads][..., usable].mean(axis=1)
        score = scores(error, sparsity)
        order = score.max(axis=2).argmax(axis=0)
        heads = [
            points[int(of_head.argmax())] if of_head.max() > 0 else fallback or points[int(errors.argmin())]
            for of_head, errors in zip(score[order, range(num_heads)], error[order, range(num_heads)], strict=True)
        ]
        layers.append(LayerThresholds.in_orders(name, heads, [names[each] for each in order]))
    return in_one_order(Policy(tuple(layers), DenseSchedule(), "raster", keep_text, curves.select_partial))


def _sparsity_at_bound(l1: float, error: Array, sparsity: Array) -> Array:
    """Interpolate the sparsity of curves, (..., points) from the sparsest to the densest point, at a bound.

    In the same shape: the sparsity at the bound for the first point from which on all are within it, 0 for the other
    points, and throughout where the densest point exceeds the bound.
    """
    error = np.minimum(error, _LARGE)
    within = np.maximum.accumulate(error[..., ::-1], axis=-1)[..., ::-1] <= l1
    first = within.argmax(axis=-1)[..., None]
    before = np.maximum(first - 1, 0)

    def at(table: Array, index: npt.NDArray[np.intp]) -> Array:
        return np.take_along_axis(table, index, axis=-1)

    span = at(error, before) - at(error, first)
    share = np.where(span > 0, (l1 - at(error, first)) / np.where(span > 0, span, 1.0), 0.0)
    value = at(sparsity, first) + np.clip(share, 0.0, 1.0) * (at(sparsity, before) - at(sparsity, first))
    scores = np.zeros_like(sparsity)
    np.put_along_axis(scores, first, np.where(within[..., -1:], value, 0.0).astype(np.float32), axis=-1)
    return scores
