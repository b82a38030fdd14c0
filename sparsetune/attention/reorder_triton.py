"""Triton kernel that gathers tokens by position in one pass; `ordering.Permutation` calls it for CUDA tensors.

It is an operator of its own, since torch.compile can't trace the choice of the GPU around the kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS_AT_ONCE = 128


@torch.library.custom_op("sparsetune::reorder", mutates_args=())
def reorder(x: Tensor, positions: Tensor, of_head: Tensor | None) -> Tensor:
    """Read each head's tokens at its positions; exact, contiguous.

    x (batch, heads, tokens, head_dim) may have any strides but 1 for the last; head_dim must be a power of two. The
    positions are those of `ordering.Permutation`, contiguous.
    """
    batch, heads, tokens, dim = x.shape
    read: Tensor = _output(x, positions, of_head)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _reorder[(triton.cdiv(tokens, _TOKENS_AT_ONCE), batch * heads)](
            x, positions, positions if of_head is None else of_head, read,
            heads, tokens, x.stride(0), x.stride(1), x.stride(2),
            DIM=dim, BLOCK=_TOKENS_AT_ONCE, BY_HEAD=of_head is not None,
        )  # fmt: skip
    return read


@reorder.register_fake
def _output(x: Tensor, positions: Tensor, of_head: Tensor | None) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@triton.jit  # type: ignore[untyped-decorator]
def _reorder(  # type: ignore[no-untyped-def]
    x, positions, of_head, read, heads, tokens, stride_batch, stride_head, stride_token,
    DIM: tl.constexpr, BLOCK: tl.constexpr, BY_HEAD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    head = row % heads
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    if BY_HEAD:
        positions += tl.load(of_head + head) * tokens
    place = tl.load(positions + token, mask=inside, other=0)
    channel = tl.arange(0, DIM)
    start = x + (row // heads) * stride_batch + head * stride_head
    values = tl.load(start + place[:, None] * stride_token + channel[None, :], mask=inside[:, None])
    target = read + row * tokens * DIM + token[:, None].to(tl.int64) * DIM + channel[None, :]
    tl.store(target, values, mask=inside[:, None])
