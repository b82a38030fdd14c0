import pytest

from sparsetune.attention.policy import Policy
from sparsetune.attention.thresholds import HeadThresholds, LayerThresholds
from sparsetune.checkpoint import Checkpoint, Manifest, summarize


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
