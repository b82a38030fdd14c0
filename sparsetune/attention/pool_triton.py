"""Triton kernel that pools the blocks of q and k in one pass; `blockmap.pool_both` calls it for CUDA tensors."""

import torch
import triton
import triton.language as tl
from torch import Tensor

Pooled = tuple[Tensor, Tensor, Tensor, Tensor]  # means and similarities of q's blocks, then of k's


def pool_blocks(q: Tensor, k: Tensor, centre: Tensor, block_q: int, block_k: int, select_partial: bool) -> Pooled:
    """`blockmap.pool` of q, and of k with `centre`, in one launch.

    q and k, (batch, heads, tokens, head_dim), may have any strides but 1 for the last; head_dim (at least 16) and the
    blocks must be powers of two.
    """
    # torch.compile can't trace the choice of the GPU around a kernel; in eager mode the operator would only cost time.
    launch = _pool_blocks if torch.compiler.is_compiling() else _launch
    pooled: Pooled = launch(q, k, centre, block_q, block_k, select_partial)
    return pooled


def _launch(q: Tensor, k: Tensor, centre: Tensor, block_q: int, block_k: int, select_partial: bool) -> Pooled:
    batch, heads, _, dim = q.shape
    outputs = _outputs(q, k, centre, block_q, block_k, select_partial)
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        _pool[(outputs[0].shape[-2] + outputs[2].shape[-2], batch * heads)](
            q, k, centre.contiguous(), *outputs, heads,
            q.shape[-2], q.stride(0), q.stride(1), q.stride(2), k.shape[-2], k.stride(0), k.stride(1), k.stride(2),
            DIM=dim, BLOCK_Q=block_q, BLOCK_K=block_k, SELECT_PARTIAL=select_partial,
        )  # fmt: skip
    return outputs


def _outputs(q: Tensor, k: Tensor, centre: Tensor, block_q: int, block_k: int, select_partial: bool) -> Pooled:
    (batch, heads, num_q, dim), num_k = q.shape, k.shape[-2]
    of_q, of_k = (batch, heads, -(-num_q // block_q)), (batch, heads, -(-num_k // block_k))
    means_q, means_k = q.new_empty(*of_q, dim), k.new_empty(*of_k, dim)
    return means_q, q.new_empty(of_q, dtype=torch.float32), means_k, k.new_empty(of_k, dtype=torch.float32)


_pool_blocks = torch.library.custom_op("sparsetune::pool_blocks", _launch, mutates_args=())
_pool_blocks.register_fake(_outputs)


@triton.jit  # type: ignore[untyped-decorator]
def _pool(  # type: ignore[no-untyped-def]
    q, k, centre, means_q, similarity_q, means_k, similarity_k, heads,
    tokens_q, batch_q, head_q, token_q, tokens_k, batch_k, head_k, token_k,
    DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SELECT_PARTIAL: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    blocks_q = tl.cdiv(tokens_q, BLOCK_Q)
    if block < blocks_q:
        start = q + (row // heads) * batch_q + (row % heads) * head_q
        place = row * blocks_q + block
        _pool_block(
            start, centre, means_q + place * DIM, similarity_q + place, tokens_q - block * BLOCK_Q, block, token_q,
            DIM, BLOCK_Q, False, SELECT_PARTIAL,
        )  # fmt: skip
    else:
        block -= blocks_q
        start = k + (row // heads) * batch_k + (row % heads) * head_k
        place = row * tl.cdiv(tokens_k, BLOCK_K) + block
        _pool_block(
            start, centre + row * DIM, means_k + place * DIM, similarity_k + place, tokens_k - block * BLOCK_K, block,
            token_k, DIM, BLOCK_K, True, SELECT_PARTIAL,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _pool_block(  # type: ignore[no-untyped-def]
    start, centre, mean, similarity, left, block, stride_token,
    DIM: tl.constexpr, BLOCK: tl.constexpr, CENTRED: tl.constexpr, SELECT_PARTIAL: tl.constexpr,
):  # fmt: skip
    """Pool one block of which `left` tokens, or all, lie in the sequence."""
    token = tl.arange(0, BLOCK)
    channel = tl.arange(0, DIM)
    inside = (token < left)[:, None]
    place = (block * BLOCK + token)[:, None].to(tl.int64) * stride_token + channel[None, :]
    values = tl.load(start + place, mask=inside, other=0.0)
    if CENTRED:
        shift = tl.load(centre + channel)
        # Rounded to the input's dtype, as the subtraction of two such tensors is.
        values = tl.where(inside, values.to(tl.float32) - shift.to(tl.float32)[None, :], 0.0).to(values.dtype)
    exact = values.to(tl.float32)
    size = tl.minimum(left, BLOCK).to(tl.float32)
    tl.store(mean + channel, (tl.sum(exact, axis=0) / size).to(values.dtype))
    norm = tl.sqrt(tl.sum(exact * exact, axis=1))
    # A token of norm zero, and so the padding of a partial block, gives NaN: such a block is never similar.
    unit = (exact / norm[:, None]).to(tl.float16).to(tl.float32)
    if SELECT_PARTIAL:
        unit = tl.where(inside, unit, 0.0)
    total = tl.sum(unit, axis=0)
    tl.store(similarity, tl.sum(total * total, axis=0) / (size * size))
