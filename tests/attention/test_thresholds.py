import pytest
import torch

from sparsetune.attention.policy import Policy
from sparsetune.attention.thresholds import SPARGE_DEFAULTS, HeadThresholds, LayerThresholds
from sparsetune.errors import ThresholdError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"simthreshd1": 1.5, "cdfthreshd": 0.9}, r"simthreshd1 must be in \[-1, 1\], got 1.5"),
        ({"simthreshd1": float("nan"), "cdfthreshd": 0.9}, "simthreshd1 must be"),
        ({"simthreshd1": 0.0, "cdfthreshd": 1.01}, r"cdfthreshd must be in \[0, 1\]"),
        ({"simthreshd1": 0.0, "topk": 0.0}, "topk must be above 0"),
        ({"simthreshd1": 0.0, "cdfthreshd": 0.9, "pvthreshd": -1.0}, "pvthreshd must be at least 0"),
        ({"simthreshd1": 0.0, "cdfthreshd": 0.9, "pvthreshd": float("inf")}, "pvthreshd must be at least 0"),
        ({"simthreshd1": 0.0}, "set either cdfthreshd or topk"),
        ({"simthreshd1": 0.0, "cdfthreshd": 0.9, "topk": 0.5}, "set either cdfthreshd or topk"),
    ],
)
def test_values_out_of_range_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ThresholdError, match=message):
        HeadThresholds(**values)


def test_heads_of_a_layer_follow_one_rule() -> None:
    with pytest.raises(ThresholdError, match="all heads of a must follow one rule"):
        LayerThresholds("a", (HeadThresholds(0.0, cdfthreshd=0.9), HeadThresholds(0.0, topk=0.5)))
    with pytest.raises(ThresholdError, match="got no heads"):
        LayerThresholds("a", ())


def test_a_dense_head_lets_no_block_be_similar() -> None:
    layer = LayerThresholds("a", (SPARGE_DEFAULTS, HeadThresholds(0.1, cdfthreshd=0.2, pvthreshd=3.0, is_sparse=False)))
    tensors = layer.tensors(torch.device("cpu"))
    torch.testing.assert_close(tensors.simthreshd1, torch.tensor([0.6, 2.0]))
    torch.testing.assert_close(tensors.select, torch.tensor([0.98, 1.0]))
    torch.testing.assert_close(tensors.pvthreshd, torch.tensor([50.0, 50.0]))


@pytest.mark.parametrize(
    ("drop_scale", "select"), [(1.0, [0.98, 0.5]), (2.0, [0.96, 0.0]), (0.5, [0.99, 0.75]), (100.0, [0.0, 0.0])]
)
def test_a_drop_scale_multiplies_what_is_left_out(drop_scale: float, select: list[float]) -> None:
    layer = LayerThresholds("a", (SPARGE_DEFAULTS, HeadThresholds(0.1, cdfthreshd=0.5)))
    torch.testing.assert_close(layer.tensors(torch.device("cpu"), drop_scale).select, torch.tensor(select))
    blocks = LayerThresholds("a", (HeadThresholds(0.1, topk=0.98), HeadThresholds(0.1, topk=0.5)))
    torch.testing.assert_close(blocks.tensors(torch.device("cpu"), drop_scale).select, torch.tensor(select))


def test_a_policy_names_each_layer_once() -> None:
    with pytest.raises(ThresholdError, match="must name each layer once"):
        Policy.uniform([("a", 1), ("a", 1)])
    with pytest.raises(ThresholdError, match="order must be one of"):
        Policy.uniform([("a", 1)], order="spiral")
    assert Policy.uniform([("a", 2)]).layer("a").heads == (SPARGE_DEFAULTS, SPARGE_DEFAULTS)


def test_dense_heads_take_an_order_that_a_sparse_one_has() -> None:
    sparse, dense = HeadThresholds(0.3, cdfthreshd=0.9), HeadThresholds(1.0, cdfthreshd=1.0, is_sparse=False)
    for heads, orders, wanted in (
        ((sparse, sparse), ("whf", "raster"), ("whf", "raster")),
        ((sparse, sparse), ("whf", "whf"), "whf"),
        ((dense, sparse, sparse), ("tiles", "hfw", "whf"), ("hfw", "hfw", "whf")),
        ((dense, sparse), ("tiles", "hfw"), "hfw"),
        ((dense, dense), ("tiles", "hfw"), None),
    ):
        assert LayerThresholds.in_orders("layer", heads, orders).order == wanted


@pytest.mark.parametrize(
    ("order", "message"),
    [(("raster",), "one for each of its 2 heads, got 1"), (["raster", "raster"], "must be a name or a tuple")],
)
def test_orders_that_are_no_orders_of_the_heads_are_refused(order: object, message: str) -> None:
    heads = (HeadThresholds(0.3, cdfthreshd=0.9),) * 2
    with pytest.raises(ThresholdError, match=message):
        LayerThresholds("layer", heads, order)
