"""Block sums as a Triton kernel against the plain ones; docs/benchmarks.md has its speed-up on an H100."""

import pytest
import torch

from sparsetune.attention.blockmap import SPARGE_BLOCKS, SPARGE_BLOCKS_SM90, BlockShape
from sparsetune.tuning.calibration.block_sums import _sum_blocks, block_sums
from tests.attention.conftest import structured

pytestmark = pytest.mark.gpu


# Triton compiles a kernel, for seconds, for each combination of blocks, dtype, channels and sizes that 16 divides; so
# each case has something that no other has. With 1024 tokens every block is full; with 1312 the last blocks are cut at
# a multiple of 16, with 2085 at an odd token.
CASES = [
    (torch.bfloat16, 1024, 1, 64),
    (torch.bfloat16, 2085, 2, 64),
    (torch.bfloat16, 1312, 1, 128),
    (torch.bfloat16, 2085, 1, 256),
    (torch.float16, 1312, 2, 64),  # needs as much shared memory as bfloat16
    (torch.float32, 2085, 1, 64),
    (torch.float32, 2085, 2, 128),  # the most bytes a token that the kernel takes
    (torch.float32, 1312, 1, 256),  # too large for it: plain PyTorch
]
TOLERANCE = {torch.bfloat16: 2e-3, torch.float16: 2e-3, torch.float32: 2e-5}


@pytest.mark.parametrize("blocks", [SPARGE_BLOCKS, SPARGE_BLOCKS_SM90], ids=["128x64", "64x128"])
@pytest.mark.parametrize(("dtype", "tokens", "batch", "dim"), CASES, ids=str)
def test_the_sums_are_the_plain_ones(blocks: BlockShape, dtype: torch.dtype, tokens: int, batch: int, dim: int) -> None:
    tolerance = TOLERANCE[dtype]
    inputs = structured(heads=3, tokens=tokens, batch=batch, dim=dim)
    q, k, v = (x.to("cuda", dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in inputs)
    scale = q.shape[-1] ** -0.5
    found = block_sums(q, k, v, blocks=blocks, scale=scale, every=16)
    num_q, _ = blocks.counts(tokens, tokens)
    position = torch.arange(num_q * blocks.q, device="cuda").view(num_q, blocks.q)[:, ::16]
    numerator, denominator = _sum_blocks(q, k, v, blocks, scale, position)
    assert found.numerator.shape == numerator.shape and found.denominator.shape == denominator.shape
    inside = found.inside[None, :, None, :].expand_as(denominator)
    torch.testing.assert_close(found.denominator[inside], denominator[inside], rtol=1e-4, atol=1e-6)
    size = numerator.abs().amax()
    assert (found.numerator - numerator).abs().amax() <= tolerance * size
    maps = torch.rand(3, numerator.shape[1], 5, numerator.shape[2], device="cuda") < 0.7
    maps[..., 0] = True
    plain = type(found)(numerator, denominator, _dense(numerator, denominator, found.inside), found.inside)
    torch.testing.assert_close(found.errors(maps), plain.errors(maps), rtol=tolerance, atol=1e-5)


def _dense(numerator: torch.Tensor, denominator: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    weight = denominator.sum(2)
    dense = numerator.sum(2).view(*weight.shape, -1) / weight.unsqueeze(-1)
    return dense.masked_fill(~inside[..., None], 0.0)
