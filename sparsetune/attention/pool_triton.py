"""Triton kernel that pools blocks in one pass over the tokens; `blockmap.pool` calls it for CUDA tensors.

It is an operator of its own, since torch.compile can't trace the choice of the GPU around the kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@torch.library.custom_op("sparsetune::pool_blocks", mutates_args=())
def pool_blocks(x: Tensor, block: int, centre: Tensor | None) -> tuple[Tensor, Tensor]:
    """`blockmap.pool` in one pass over x, (batch, heads, tokens, head_dim).

    x may have any strides but 1 for the last; head_dim (at least 16) and block must be powers of two.
    """
    batch, heads, tokens, dim = x.shape
    means, similarity = _outputs(x, block, centre)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _pool[(means.shape[-2], batch * heads)](
            x, x if centre is None else centre.contiguous(), means, similarity,
            heads, tokens, x.stride(0), x.stride(1), x.stride(2),
            DIM=dim, BLOCK=block, CENTRED=centre is not None,
        )  # fmt: skip
    return means, similarity


@pool_blocks.register_fake
def _outputs(x: Tensor, block: int, centre: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, dim = x.shape
    blocks = -(-tokens // block)
    means = torch.empty(batch, heads, blocks, dim, dtype=x.dtype, device=x.device)
    return means, torch.empty(batch, heads, blocks, dtype=torch.float32, device=x.device)


@triton.jit  # type: ignore[untyped-decorator]
def _pool(  # type: ignore[no-untyped-def]
    x, centre, means, similarity, heads, tokens, stride_batch, stride_head, stride_token,
    DIM: tl.constexpr, BLOCK: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    token = block * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, DIM)
    inside = (token < tokens)[:, None]
    start = x + (row // heads) * stride_batch + (row % heads) * stride_head
    values = tl.load(start + token[:, None].to(tl.int64) * stride_token + channel[None, :], mask=inside, other=0.0)
    if CENTRED:
        shift = tl.load(centre + row * DIM + channel)
        # Rounded to the input's dtype, as the subtraction of two such tensors is.
        values = tl.where(inside, values.to(tl.float32) - shift.to(tl.float32)[None, :], 0.0).to(values.dtype)
    exact = values.to(tl.float32)
    size = tl.minimum(tokens - block * BLOCK, BLOCK).to(tl.float32)
    place = row * tl.num_programs(0) + block
    tl.store(means + place * DIM + channel, (tl.sum(exact, axis=0) / size).to(values.dtype))
    norm = tl.sqrt(tl.sum(exact * exact, axis=1))
    # A token of norm zero, and so the padding of a partial block, gives NaN: such a block is never similar.
    unit = (exact / norm[:, None]).to(tl.float16).to(tl.float32)
    total = tl.sum(unit, axis=0)
    tl.store(similarity + place, tl.sum(total * total, axis=0) / (BLOCK * BLOCK))
