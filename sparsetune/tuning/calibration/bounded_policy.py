"""Policies within a bound on every head's error, read off calibrated curves."""

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
"""In place of an infinite error, so that one can be interpolated to."""

_Gains = Callable[[Array, Array], Array]
"""From errors and sparsities, (orders, heads, points) each, to what each point gains; 0 where it breaks the bound."""


@dataclass(frozen=True)
class Bounds:
    """What is asked of each head.

    Args:
        l1: bound on the relative L1 error Σ|o − o'| / Σ|o| of a head's output, above 0.
        pv_l1: the same with `pvthreshd` at work.

    Raises:
        TuningError: the second leaves no room above the first.
    """

    l1: float
    pv_l1: float

    def __post_init__(self) -> None:
        if self.pv_l1 <= self.l1:
            raise TuningError(
                "pv_l1 must exceed l1, since it bounds the error of both, "
                f"but they are {self.pv_l1:g} and {self.l1:g}; raise --pv-l1"
            )


def bounded_policy(
    curves: Curves,
    l1: float,
    *,
    orders: Sequence[str] | None = None,
    keep_text: bool = True,
    rule: Rule = "cdf",
    dense_fraction: float = 0.0,
) -> Policy:
    """Give every head the point with the most sparsity whose error was within the bound wherever it was measured.

    That is on every input and at every sampled step that runs sparse; the point itself was measured, nothing is
    interpolated. A head without such a point runs dense. Each head takes the token order that gives it the most.

    Args:
        curves: the calibration.
        l1: bound on the relative L1 error of a head's output, as SpargeAttn's tuner has it.
        orders: token orders to choose from, None for all that were calibrated.
        keep_text: whether the text's key blocks are always computed.
        rule: cdf or topk.
        dense_fraction: fraction of the steps that run dense; their errors don't count.

    Raises:
        TuningError: an order wasn't calibrated.
    """

    def gains(error: Array, sparsity: Array) -> Array:
        return np.where(error <= l1, sparsity, 0.0).astype(np.float32)

    return _chosen(curves, gains, DENSE[rule], orders, keep_text, rule, dense_fraction)


def starting_policy(
    curves: Curves, l1: float, *, orders: Sequence[str] | None = None, keep_text: bool = True, rule: Rule = "cdf"
) -> Policy:
    """Choose what stays fixed while each head's threshold is searched: its `simthreshd1` and token order.

    Each is the one with the most sparsity at the bound, interpolated between the measured points; the other threshold
    is that of the nearest point within the bound. A head without one gets the point with the least error: the kernel
    has the last word on whether it can run sparse.

    Args:
        curves: the calibration.
        l1: see `bounded_policy`.
        orders: see `bounded_policy`.
        keep_text: see `bounded_policy`.
        rule: see `bounded_policy`.

    Raises:
        TuningError: an order wasn't calibrated.
    """
    points = [point for point in curves.points if point.rule == rule]
    families = [
        sorted(
            (place for place, point in enumerate(points) if point.simthreshd1 == sim), key=lambda at: _kept(points[at])
        )
        for sim in sorted({point.simthreshd1 for point in points})
    ]

    def gains(error: Array, sparsity: Array) -> Array:
        gained = np.zeros_like(sparsity)
        for family in families:
            gained[..., family] = _gains_at(l1, error[..., family], sparsity[..., family])
        return gained

    return _chosen(curves, gains, None, orders, keep_text, rule, 0.0)


def in_one_order(policy: Policy) -> Policy:
    """Write the order that all sparse layers share, where they share one, as the policy's."""
    used = {order for order, layer in zip(policy.orders, policy.layers, strict=True) if layer.is_sparse}
    shared = used.pop() if len(used) == 1 else None
    if not isinstance(shared, str):
        return policy
    return replace(policy, order=shared, layers=tuple(replace(layer, order=None) for layer in policy.layers))


def _chosen(
    curves: Curves,
    gains: _Gains,
    otherwise: HeadThresholds | None,
    orders: Sequence[str] | None,
    keep_text: bool,
    rule: Rule,
    dense_fraction: float,
) -> Policy:
    """Give each head the order in which it gains the most, and there its point with the most gain.

    A head that gains nothing gets `otherwise`, or, where that is None, its point with the least error.
    """
    places = curves.arrangement_indices(orders, keep_text)
    names = [curves.arrangements[place].order for place in places]
    schedule = DenseSchedule(dense_fraction)
    active = curves.active_steps(schedule)
    usable = [place for place, point in enumerate(curves.points) if point.rule == rule]
    points = [curves.points[place] for place in usable]
    layers = []
    for index, (name, num_heads) in enumerate(curves.layers):
        error = curves.error[places, index][:, active, :num_heads][..., usable].max(axis=1)  # (orders, heads, points)
        sparsity = curves.sparsity[places, index][:, active, :num_heads][..., usable].mean(axis=1)
        gained = gains(error, sparsity)
        order = gained.max(axis=2).argmax(axis=0)
        heads = [
            points[int(of_head.argmax())] if of_head.max() > 0 else otherwise or points[int(missed.argmin())]
            for of_head, missed in zip(gained[order, range(num_heads)], error[order, range(num_heads)], strict=True)
        ]
        layers.append(LayerThresholds.in_orders(name, heads, [names[place] for place in order]))
    return in_one_order(Policy(tuple(layers), schedule, "raster", keep_text, curves.select_partial))


def _gains_at(l1: float, error: Array, sparsity: Array) -> Array:
    """The sparsity at the bound of curves over ever denser points, given to the first point from which all hold it.

    Args:
        l1: the bound.
        error: (..., points), the densest last; sparsity alike.
        sparsity: see error.

    Returns:
        The same shape, 0 but at one point of each curve; 0 throughout where not even the densest point holds.
    """
    error = np.minimum(error, _LARGE)
    holds = np.maximum.accumulate(error[..., ::-1], axis=-1)[..., ::-1] <= l1
    first = holds.argmax(axis=-1)[..., None]
    before = np.maximum(first - 1, 0)

    def at(table: npt.NDArray[np.float32], place: npt.NDArray[np.intp]) -> Array:
        return np.take_along_axis(table, place, axis=-1)

    span = at(error, before) - at(error, first)
    share = np.where(span > 0, (l1 - at(error, first)) / np.where(span > 0, span, 1.0), 0.0)
    gain = at(sparsity, first) + np.clip(share, 0.0, 1.0) * (at(sparsity, before) - at(sparsity, first))
    gained = np.zeros_like(sparsity)
    np.put_along_axis(gained, first, np.where(holds[..., -1:], gain, 0.0).astype(np.float32), axis=-1)
    return gained


def _kept(point: HeadThresholds) -> float:
    return (point.cdfthreshd if point.cdfthreshd is not None else point.topk) or 0.0
