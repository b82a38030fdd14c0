"""Triton kernel of `block_sums` for CUDA tensors, in two passes over the keys.

In plain PyTorch a head's scores are kept in memory and read seven times; here they stay on the chip.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS_AT_ONCE = 64

_STAGED_DIM = 64
"""Up to this head_dim there is enough shared memory to prefetch tiles."""


def sum_blocks(
    q: Tensor, k: Tensor, v: Tensor, *, block_q: int, block_k: int, queries: int, every: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute the numerators and denominators of `BlockSums`, in its shapes.

    Scores are exact up to float32's accumulation; weights are rounded to TF32 before they are multiplied with values of
    16 bits, so that a numerator may be off by 0.05 %. All outputs that are compared are sums of the same numerators.

    q, k and v are (batch, heads, tokens, head_dim) with contiguous channels; head_dim and `block_k` are powers of two,
    at least 16. `queries` tokens of each query block are sampled, `every` apart.
    """
    batch, heads, tokens, dim = q.shape
    keys = k.shape[-2]
    num_q, num_k = -(-tokens // block_q), -(-keys // block_k)
    numerator = torch.empty(heads, batch * num_q, num_k, queries * dim, dtype=torch.float32, device=q.device)
    denominator = torch.empty(heads, batch * num_q, num_k, queries, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        _sum_blocks[(triton.cdiv(num_q * queries, _ROWS_AT_ONCE), batch * heads)](
            q, k, v, numerator, denominator, batch, heads, tokens, keys, num_q, num_k, scale / math.log(2.0),
            *(x.stride(axis) for x in (q, k, v) for axis in range(3)),
            QUERIES=queries, EVERY=every, BLOCK_Q=block_q, ROWS=_ROWS_AT_ONCE, BLOCK_K=block_k, DIM=dim,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_stages=3 if dim <= _STAGED_DIM else 1,
        )  # fmt: skip
    return numerator, denominator


@triton.jit  # type: ignore[untyped-decorator]
def _scores(  # type: ignore[no-untyped-def]
    rows, k, block, keys, stride_token, BLOCK_K: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    key = block * BLOCK_K + tl.arange(0, BLOCK_K)
    channel = tl.arange(0, DIM)
    inside = (key < keys)[None, :]
    columns = tl.load(k + key[None, :].to(tl.int64) * stride_token + channel[:, None], mask=inside, other=0.0)
    return tl.where(inside, tl.dot(rows, columns, input_precision=PRECISION), float("-inf"))


@triton.jit  # type: ignore[untyped-decorator]
def _sum_blocks(  # type: ignore[no-untyped-def]
    q, k, v, numerator, denominator, batch, heads, tokens, keys, num_q, num_k, scale,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    QUERIES: tl.constexpr, EVERY: tl.constexpr, BLOCK_Q: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
    DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    entry = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block_q, query = row // QUERIES, row % QUERIES
    token = block_q * BLOCK_Q + query * EVERY
    channel = tl.arange(0, DIM)
    q += entry * q_batch + head * q_head
    k += entry * k_batch + head * k_head
    v += entry * v_batch + head * v_head
    rows = tl.load(
        q + token[:, None].to(tl.int64) * q_token + channel[None, :], mask=(token < tokens)[:, None], other=0.0
    )
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    for block in range(num_k):
        most = tl.maximum(most, tl.max(_scores(rows, k, block, keys, k_token, BLOCK_K, DIM, PRECISION), axis=1))
    # Rows of the result: (head, entry, query block), then key blocks, then queries.
    first = ((head * batch + entry) * num_q + block_q.to(tl.int64)) * num_k * QUERIES + query
    inside = row < num_q * QUERIES
    for block in range(num_k):
        scores = _scores(rows, k, block, keys, k_token, BLOCK_K, DIM, PRECISION)
        weights = tl.exp2((scores - most[:, None]) * scale)
        key = block * BLOCK_K + tl.arange(0, BLOCK_K)
        values = tl.load(
            v + key[:, None].to(tl.int64) * v_token + channel[None, :], mask=(key < keys)[:, None], other=0.0
        )
        sums = tl.dot(weights, values.to(tl.float32), input_precision=PRECISION)
        at = first + block * QUERIES
        tl.store(denominator + at, tl.sum(weights, axis=1), mask=inside)
        tl.store(numerator + at[:, None] * DIM + channel[None, :], sums, mask=inside[:, None])
