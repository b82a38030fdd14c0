"""Measured errors and sparsities, compared with the reference backend for each point and head."""

import pytest
import torch
import torch.nn.functional as F

from sparsetune.attention.backends import ReferenceBackend
from sparsetune.attention.blockmap import SPARGE_BLOCKS, SPARGE_BLOCKS_SM90, BlockShape
from sparsetune.attention.thresholds import HeadThresholds, LayerThresholds
from sparsetune.tuning.calibration import mask_error as module
from sparsetune.tuning.calibration.mask_error import grid_errors
from tests.attention.conftest import structured

POINTS = (
    HeadThresholds(-1.0, cdfthreshd=0.5),
    HeadThresholds(-1.0, cdfthreshd=0.95),
    HeadThresholds(0.3, cdfthreshd=0.8),
    HeadThresholds(-1.0, topk=0.25),
)


@pytest.mark.parametrize("blocks", [SPARGE_BLOCKS, SPARGE_BLOCKS_SM90], ids=["128x64", "64x128"])
@pytest.mark.parametrize(("tokens", "select_partial"), [(1024, False), (1000, False), (1000, True)])
def test_every_point_is_what_the_backend_would_do(blocks: BlockShape, tokens: int, select_partial: bool) -> None:
    q, k, v = structured(heads=3, tokens=tokens)
    measured = grid_errors(q, k, v, POINTS, blocks=blocks, keep=range(1), scale=0.125, select_partial=select_partial)
    dense = F.scaled_dot_product_attention(q, k, v, scale=0.125)
    num_q, num_k = blocks.counts(tokens, tokens)
    for index, point in enumerate(POINTS):
        layer = LayerThresholds.uniform("layer", 3, point).tensors(q.device, 1.0, select_partial)
        attended = ReferenceBackend(blocks).attend(q, k, v, layer, scale=0.125, keep=range(1))
        error = (attended.output - dense).abs().sum(dim=(0, 2, 3)) / dense.abs().sum(dim=(0, 2, 3))
        torch.testing.assert_close(measured.error[:, index], error, atol=2e-5, rtol=1e-3)
        sparsity = 1 - attended.computed / (2 * num_q * num_k)
        torch.testing.assert_close(measured.sparsity[:, index].double(), sparsity, atol=1e-6, rtol=0)
    torch.testing.assert_close(measured.size, dense.abs().mean(dim=(0, 2, 3)))


def test_slabs_of_heads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = structured(heads=3)
    whole = grid_errors(q, k, v, POINTS, blocks=SPARGE_BLOCKS, keep=range(0), scale=0.125)
    monkeypatch.setattr(module, "_FLOATS_AT_ONCE", 1)
    parts = grid_errors(q, k, v, POINTS, blocks=SPARGE_BLOCKS, keep=range(0), scale=0.125)
    torch.testing.assert_close(parts.error, whole.error)
    assert torch.equal(parts.sparsity, whole.sparsity)


def test_sampled_queries_estimate_the_whole() -> None:
    q, k, v = structured(heads=2, tokens=2000, batch=1)
    whole = grid_errors(q, k, v, POINTS, blocks=SPARGE_BLOCKS, keep=range(0), scale=0.125)
    sampled = grid_errors(q, k, v, POINTS, blocks=SPARGE_BLOCKS, keep=range(0), scale=0.125, every=4)
    assert torch.equal(sampled.sparsity, whole.sparsity)
    assert not torch.equal(sampled.error, whole.error)
    torch.testing.assert_close(sampled.error, whole.error, atol=0.01, rtol=0.1)


def test_a_map_that_drops_all_that_weighs_is_an_infinite_error() -> None:
    q, k, v = structured(heads=1, tokens=512, batch=1)
    k = k.clone()
    k[:, :, 300] = 40 * q.mean(dim=2)  # one key that takes all the weight
    q = q.mean(dim=2, keepdim=True).expand_as(q) * 5
    measured = grid_errors(q, k, v, (HeadThresholds(-1.0, topk=0.01),), blocks=SPARGE_BLOCKS, keep=range(0), scale=1.0)
    assert not torch.isnan(measured.error).any()
