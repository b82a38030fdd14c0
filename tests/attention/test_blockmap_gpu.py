"""Our block map against SpargeAttn's own Triton kernels; docs/benchmarks.md has the results on an H100."""

import pytest
import torch

from sparsetune.attention.blockmap import SPARGE_BLOCKS, SPARGE_BLOCKS_SM90, BlockShape, block_map
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
    assert (ours != theirs.bool()).float().mean() <= 1e-4
