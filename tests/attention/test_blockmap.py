"""The block map against a slow, literal implementation of SpargeAttn's rule."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from sparsetune.attention.blockmap import (
    LOG2_E,
    SPARGE_BLOCKS,
    SPARGE_BLOCKS_SM90,
    BlockShape,
    block_map,
    pool,
    skip_pv,
)
from sparsetune.attention.thresholds import HeadThresholds, LayerThresholds
from tests.attention.conftest import structured


def thresholds(*heads: HeadThresholds, select_partial: bool = False):
    return LayerThresholds("layer", heads).tensors(torch.device("cpu"), select_partial=select_partial)


def literal_map(q: Tensor, k: Tensor, head: HeadThresholds, blocks: BlockShape, select_partial: bool = False) -> Tensor:
    """The map of one head (tokens, dim), block by block and pair by pair, in float64."""
    sim, cdf, topk = head.simthreshd1, head.cdfthreshd, head.topk
    q, k = q.double(), k.double() - k.double().mean(0)

    def cut(x: Tensor, size: int) -> list[Tensor]:
        return list(x.split(size))

    def similar(block: Tensor, size: int) -> bool:
        if len(block) < size and not select_partial:
            return False
        unit = block / block.norm(dim=1, keepdim=True)
        return float((unit @ unit.T).mean()) > sim

    q_blocks, k_blocks = cut(q, blocks.q), cut(k, blocks.k)
    similar_k = [similar(block, blocks.k) for block in k_blocks]
    result = torch.zeros(len(q_blocks), len(k_blocks), dtype=torch.bool)
    for row, q_block in enumerate(q_blocks):
        weights = [
            math.exp(float(q_block.mean(0) @ k_block.mean(0)) / math.sqrt(q.shape[1])) if similar_k[column] else 0.0
            for column, k_block in enumerate(k_blocks)
        ]
        order = sorted(range(len(k_blocks)), key=lambda column: -weights[column])
        if topk is not None:
            taken = order[: max(1, int(topk * len(k_blocks)))]
        else:
            taken, total = [], 0.0
            for column in order:
                total += weights[column] / sum(weights)
                if total > cdf and taken:
                    break
                taken.append(column)
        for column in range(len(k_blocks)):
            result[row, column] = column in taken or not similar_k[column] or not similar(q_block, blocks.q)
    return result


@pytest.mark.parametrize("blocks", [SPARGE_BLOCKS, SPARGE_BLOCKS_SM90], ids=["128x64", "64x128"])
@pytest.mark.parametrize("tokens", [1024, 1000, 1312])
@pytest.mark.parametrize(
    "head",
    [
        HeadThresholds(-1.0, cdfthreshd=0.98),
        HeadThresholds(-1.0, cdfthreshd=0.5),
        HeadThresholds(0.3, cdfthreshd=0.8),
        HeadThresholds(-1.0, topk=0.3),
        HeadThresholds(0.3, topk=0.01),
    ],
    ids=str,
)
@pytest.mark.parametrize("select_partial", [False, True])
def test_map_is_the_literal_rule(blocks: BlockShape, tokens: int, head: HeadThresholds, select_partial: bool) -> None:
    q, k, _ = structured(heads=2, tokens=tokens, batch=1, seed=tokens)
    found = block_map(q, k, thresholds(head, head, select_partial=select_partial), blocks)[0]
    for index in range(2):
        wanted = literal_map(q[0, index], k[0, index], head, blocks, select_partial)
        assert (found[index] != wanted).float().mean() < 0.005  # a sum equal to the threshold may round either way
    assert 0.0 < found.float().mean() < 1.0


def test_a_partial_last_block_is_computed_throughout_unless_it_is_selected() -> None:
    q, k, _ = structured(heads=2, tokens=1000)
    head = HeadThresholds(-1.0, cdfthreshd=0.3)
    always = block_map(q, k, thresholds(head, head), SPARGE_BLOCKS)
    assert always[..., -1, :].all() and always[..., -1].all()
    chosen = block_map(q, k, thresholds(head, head, select_partial=True), SPARGE_BLOCKS)
    assert not chosen[..., -1, :].all() and not chosen[..., -1].all()


def test_each_head_has_its_own_thresholds() -> None:
    q, k, _ = structured(heads=3)
    loose, tight = HeadThresholds(-1.0, cdfthreshd=0.3), HeadThresholds(-1.0, cdfthreshd=0.99)
    mixed = block_map(q, k, thresholds(loose, tight, loose), SPARGE_BLOCKS)
    all_loose = block_map(q, k, thresholds(loose, loose, loose), SPARGE_BLOCKS)
    assert torch.equal(mixed[:, [0, 2]], all_loose[:, [0, 2]])
    assert mixed[:, 1].sum() > all_loose[:, 1].sum()


def test_a_dense_head_computes_everything() -> None:
    q, k, _ = structured(heads=2)
    dense, sparse = HeadThresholds(-1.0, cdfthreshd=0.3, is_sparse=False), HeadThresholds(-1.0, cdfthreshd=0.3)
    found = block_map(q, k, thresholds(dense, sparse), SPARGE_BLOCKS)
    assert found[:, 0].all()
    assert not found[:, 1].all()


def test_a_dense_head_computes_everything_even_where_all_tokens_are_equal() -> None:
    q, k = torch.randn(1, 1, 1, 64).expand(1, 1, 512, 64), torch.randn(1, 1, 1, 64).expand(1, 1, 512, 64)
    k = k + torch.randn(1, 1, 8, 64).repeat_interleave(64, 2)
    dense = HeadThresholds(1.0, cdfthreshd=1.0, is_sparse=False)
    assert block_map(q, k, thresholds(dense), SPARGE_BLOCKS).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_nearly_the_same_map(dtype: torch.dtype) -> None:
    q, k, _ = structured()
    head = thresholds(*[HeadThresholds(-1.0, cdfthreshd=0.8)] * 3)
    single, half = block_map(q, k, head, SPARGE_BLOCKS), block_map(q.to(dtype), k.to(dtype), head, SPARGE_BLOCKS)
    assert (single != half).float().mean() < 0.02


def test_kept_blocks_are_computed_for_every_query() -> None:
    q, k, _ = structured()
    head = HeadThresholds(-1.0, topk=0.01)
    without = block_map(q, k, thresholds(head, head, head), SPARGE_BLOCKS)
    with_text = block_map(q, k, thresholds(head, head, head), SPARGE_BLOCKS, range(2, 4))
    assert with_text[..., 2:4].all()
    assert not without[..., 2:4].all()
    assert torch.equal(with_text[..., 4:], without[..., 4:])


def test_more_probability_never_computes_less() -> None:
    q, k, _ = structured()
    maps = [
        block_map(q, k, thresholds(*[HeadThresholds(-1.0, cdfthreshd=cdf)] * 3), SPARGE_BLOCKS)
        for cdf in (0.0, 0.3, 0.6, 0.9, 0.99)
    ]
    for smaller, larger in itertools.pairwise(maps):
        assert (larger | smaller).equal(larger)
    assert (maps[0][..., :-1, :-1].sum(-1) == 1).all()  # at least one block a row, and no more at cdf 0


def test_covering_names_every_block_with_a_text_token() -> None:
    assert SPARGE_BLOCKS.covering(range(226)) == range(4)
    assert SPARGE_BLOCKS.covering(range(64)) == range(1)
    assert SPARGE_BLOCKS.covering(range(100, 130)) == range(1, 3)
    assert SPARGE_BLOCKS.covering(range(0)) == range(0)


def test_pooled_similarity_is_the_mean_pairwise_cosine() -> None:
    x = structured(heads=1, tokens=256, batch=1)[0]
    pooled = pool(x, 128)
    block = x[0, 0, :128]
    unit = block / block.norm(dim=1, keepdim=True)
    torch.testing.assert_close(pooled.similarity[0, 0, 0], (unit @ unit.T).mean(), atol=1e-3, rtol=0)
    torch.testing.assert_close(pooled.means[0, 0, 0], block.mean(0))


def literal_skip(
    q: Tensor, k: Tensor, computed: Tensor, pvthreshd: float, scale: float, blocks: BlockShape, unchecked: int
) -> Tensor:
    """The kernel's walk along one head's rows (tokens, dim)."""
    kept = computed.clone()
    for row in range(computed.shape[0]):
        queries = q[row * blocks.q : (row + 1) * blocks.q]
        running = torch.full((len(queries),), -math.inf)
        columns = computed[row].nonzero().flatten().tolist()
        for place, column in enumerate(columns):
            peak = (queries @ k[column * blocks.k : (column + 1) * blocks.k].T * scale * LOG2_E).amax(1)
            first, last = place == 0, place >= len(columns) - unchecked
            if not first and not last and float((peak - running).max()) + pvthreshd <= 0:
                kept[row, column] = False
            running = torch.maximum(running, peak)
    return kept


@pytest.mark.parametrize(
    ("blocks", "unchecked"), [(SPARGE_BLOCKS, 2), (SPARGE_BLOCKS_SM90, 1)], ids=["128x64", "64x128"]
)
@pytest.mark.parametrize("pvthreshd", [0.5, 4.0, 12.0])
def test_skipped_pv_is_the_kernels_walk(pvthreshd: float, blocks: BlockShape, unchecked: int) -> None:
    q, k, _ = structured(heads=2, tokens=1000, batch=1)
    computed = block_map(q, k, thresholds(*[HeadThresholds(-1.0, cdfthreshd=0.95)] * 2), blocks)
    found = skip_pv(q, k, computed, torch.full((2,), pvthreshd), 0.125, blocks)
    for head in range(2):
        wanted = literal_skip(q[0, head], k[0, head], computed[0, head], pvthreshd, 0.125, blocks, unchecked)
        assert torch.equal(found[0, head], wanted)
    assert (found.sum() < computed.sum()) == (pvthreshd < 12.0)


def test_the_default_pvthreshd_skips_nothing() -> None:
    q, k, _ = structured(heads=1)
    computed = block_map(q, k, thresholds(HeadThresholds(-1.0, cdfthreshd=0.9)), SPARGE_BLOCKS)
    assert torch.equal(skip_pv(q, k, computed, torch.tensor([50.0]), 0.125, SPARGE_BLOCKS), computed)
