from dataclasses import replace

import pytest

from sparsetune.attention.policy import Policy
from sparsetune.attention.schedule import DenseSchedule
from sparsetune.attention.thresholds import HeadThresholds, LayerThresholds
from sparsetune.checkpoint import Checkpoint, Manifest, difference, summarize

POLICY = Policy.uniform([("transformer.a", 2), ("transformer.b", 2)])


def test_a_policy_doesnt_differ_from_itself() -> None:
    assert difference(POLICY, POLICY).is_empty


def test_rules_layers_and_thresholds_that_differ_are_told() -> None:
    half = HeadThresholds(0.6, cdfthreshd=0.5)
    changed = LayerThresholds("transformer.b", (POLICY.layers[1].heads[0], replace(half, is_sparse=False)))
    other = Policy((changed, LayerThresholds.uniform("transformer.c", 2, half)), DenseSchedule(0.2))
    found = difference(POLICY, other)
    assert found.rules == {"dense_fraction": (0.0, 0.2)}
    assert (found.only_first, found.only_second) == (("transformer.a",), ("transformer.c",))
    (layer,) = found.layers
    assert (layer.name, layer.changed_heads, layer.sparse_heads) == ("transformer.b", 1, (2, 1))
    assert layer.means == {"cdfthreshd": (0.98, 0.74)}


def test_a_head_in_another_token_order_has_changed() -> None:
    first, second = POLICY.layers
    by_head = Policy((first, replace(second, order=("raster", "whf"))))
    assert [layer.changed_heads for layer in difference(POLICY, by_head).layers] == [1]
    assert [layer.changed_heads for layer in difference(POLICY, replace(POLICY, order="tiles")).layers] == [2, 2]


def test_an_order_that_is_written_out_is_the_same_order() -> None:
    first, second = POLICY.layers
    assert difference(POLICY, Policy((first, replace(second, order="raster")))).is_empty
    assert difference(POLICY, Policy((first, replace(second, order=("raster", "raster"))))).is_empty


def test_means_are_over_sparse_heads_only() -> None:
    heads = (
        HeadThresholds(simthreshd1=0.25, cdfthreshd=0.5, pvthreshd=10),
        HeadThresholds(simthreshd1=0.75, cdfthreshd=1.0, pvthreshd=20),
        HeadThresholds(simthreshd1=-1, cdfthreshd=0.0, pvthreshd=0, is_sparse=False),
    )
    dense = LayerThresholds("b", (HeadThresholds(simthreshd1=-1, topk=0.5, is_sparse=False),))
    layer = LayerThresholds("a", heads, ("whf", "raster", "hilbert"))
    first, second = summarize(Checkpoint(Policy((layer, dense)), Manifest(tuner="x")))
    assert (first.name, first.rule, first.num_heads, first.sparse_heads) == ("a", "cdf", 3, 2)
    assert (first.simthreshd1, first.cdfthreshd, first.pvthreshd) == pytest.approx((0.5, 0.75, 15))
    assert first.topk is None
    assert (second.rule, second.sparse_heads, second.topk, second.pvthreshd) == ("topk", 0, None, None)
    assert (first.orders, second.orders) == (("raster", "whf"), ())
