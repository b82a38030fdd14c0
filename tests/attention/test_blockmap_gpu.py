"""Our block map against SpargeAttn's own Triton kernels, and our kernels against plain PyTorch.

docs/benchmarks.md has the results on an H100.
"""

import pytest
import torch

from sparsetune.attention.blockmap import (
    SPARGE_BLOCKS,
    SPARGE_BLOCKS_SM90,
    BlockShape,
    block_map,
    counted_block_map,
    pool,
    pool_both,
    select_blocks,
)
from sparsetune.attention.thresholds import HeadThresholds, LayerThresholds
from tests.attention.conftest import structured

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("blocks", [SPARGE_BLOCKS, SPARGE_BLOCKS_SM90], ids=["128x64", "64x128"])
@pytest.mark.parametrize("tokens", [1024, 1312, 17776])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "head",
    [
        HeadThresholds(-1.0, cdfthreshd=0.98),
        HeadThresholds(0.3, cdfthreshd=0.8),
        HeadThresholds(0.6, cdfthreshd=0.98),
        HeadThresholds(-1.0, topk=0.3),
    ],
    ids=str,
)
def test_the_map_is_spargeattns(blocks: BlockShape, tokens: int, dtype: torch.dtype, head: HeadThresholds) -> None:
    upstream = pytest.importorskip("spas_sage_attn.utils", reason="SpargeAttn's package isn't installed")
    heads = 4 if tokens < 5000 else 2
    q, k, _ = (x.to("cuda", dtype) for x in structured(heads=heads, tokens=tokens, seed=tokens))
    theirs, *_ = upstream.get_block_map_meansim_fuse_quant(
        q,
        k,
        k.mean(dim=-2, keepdim=True),
        BLKQ=blocks.q,
        BLKK=blocks.k,
        simthreshd1=head.simthreshd1,
        cdfthreshd=head.cdfthreshd,
        topk=head.topk,
    )
    ours = block_map(q, k, LayerThresholds.uniform("layer", heads, head).tensors(q.device), blocks)
    differ = (ours != theirs.bool()).float().mean()
    if blocks.counts(tokens, tokens)[1] > 32:
        assert differ <= 1e-4
    else:  # PyTorch's sort of so few isn't stable: of blocks with equal probabilities, SpargeAttn takes others
        assert differ <= 5e-3


RULES = [
    (HeadThresholds(-1.0, cdfthreshd=0.98), HeadThresholds(0.3, cdfthreshd=0.6)),
    (HeadThresholds(0.9, cdfthreshd=0.9), HeadThresholds(-1.0, cdfthreshd=0.5, is_sparse=False)),
    (HeadThresholds(-1.0, topk=0.3), HeadThresholds(0.3, topk=0.001)),
]


def projected(tokens: int, dtype: torch.dtype, batch: int = 2, dim: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k of two heads as projections leave them: a token's heads side by side."""
    q, k, _ = structured(heads=2, tokens=tokens, batch=batch, dim=dim, seed=tokens)
    q[0, 0, 130] = 0.0  # a block with a token of norm zero is never similar
    q, k = (x.to("cuda", dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    return q, k


# One dtype, number of channels or block shape more is another kernel to compile.
@pytest.mark.parametrize("select_partial", [False, True], ids=["partial computed", "partial chosen"])
@pytest.mark.parametrize(
    ("tokens", "dtype", "dim", "blocks"),
    [
        (1000, torch.bfloat16, 64, SPARGE_BLOCKS_SM90),
        (1024, torch.bfloat16, 64, SPARGE_BLOCKS_SM90),
        (1000, torch.float16, 64, SPARGE_BLOCKS),
        (1000, torch.float32, 128, SPARGE_BLOCKS),
    ],
    ids=str,
)
def test_blocks_are_pooled_as_in_plain_pytorch(
    tokens: int, dtype: torch.dtype, dim: int, blocks: BlockShape, select_partial: bool
) -> None:
    q, k = projected(tokens, dtype, dim=dim)
    wanted = (
        pool(q, blocks.q, None, select_partial),
        pool(k, blocks.k, k.mean(dim=-2, keepdim=True), select_partial),
    )
    for ours, plain in zip(pool_both(q, k, blocks, select_partial), wanted, strict=True):
        torch.testing.assert_close(ours.means, plain.means, rtol=max(1e-5, torch.finfo(dtype).eps), atol=1e-5)
        torch.testing.assert_close(ours.similarity, plain.similarity, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("keep", [range(0), range(1), range(3, 6)], ids=str)
@pytest.mark.parametrize("heads", RULES, ids=["cdf", "cdf, mostly computed", "topk"])
@pytest.mark.parametrize(
    ("tokens", "batch", "dtype"),
    [
        (1000, 2, torch.bfloat16),
        (17776, 1, torch.bfloat16),
        (17776, 1, torch.float16),
        (17776, 1, torch.float32),
    ],
    ids=str,
)
def test_blocks_are_selected_as_in_plain_pytorch(
    monkeypatch: pytest.MonkeyPatch, tokens: int, batch: int, dtype: torch.dtype, heads: tuple, keep: range
) -> None:
    q, k = projected(tokens, dtype, batch)
    thresholds = LayerThresholds("layer", heads).tensors(q.device, select_partial=True)
    pooled = pool_both(q, k, SPARGE_BLOCKS_SM90, select_partial=True)
    ours, num_computed = select_blocks(*pooled, thresholds, keep)
    monkeypatch.setattr("sparsetune.attention.select_triton.fits", lambda *means: False)
    plain, _ = select_blocks(*pooled, thresholds, keep)
    assert (ours != plain).float().mean() <= 1e-4
    assert num_computed.tolist() == ours.sum(dim=(0, 2, 3)).tolist()


def test_equal_probabilities_are_taken_in_the_order_of_their_blocks() -> None:
    x = torch.ones(1, 1, 8192, 64, device="cuda", dtype=torch.bfloat16)
    x[..., ::2] = -1.0
    thresholds = LayerThresholds.uniform("layer", 1, HeadThresholds(-1.0, topk=0.25)).tensors(x.device)
    pooled, _ = pool_both(x, x, SPARGE_BLOCKS_SM90)
    selected, num_computed = select_blocks(pooled, pooled, thresholds)
    assert selected[..., :32].all() and not selected[..., 32:].any()
    assert num_computed.tolist() == [128 * 32]


def test_a_compiled_function_holds_the_block_map_in_one_graph() -> None:
    q, k = projected(1000, torch.bfloat16)
    thresholds = LayerThresholds("layer", RULES[0]).tensors(q.device)

    def count(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        selected, num_computed = counted_block_map(q, k, thresholds, SPARGE_BLOCKS_SM90, range(1))
        return selected.sum(dim=(0, 2, 3)) - num_computed

    assert torch.compile(count, fullgraph=True)(q, k).tolist() == [0, 0]
