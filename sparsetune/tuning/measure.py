"""What a grid of thresholds would do to one attention call: its error and its sparsity, for all heads at once.

SpargeAttn's own tuner calls a kernel for every head, threshold and bisection step. Here one dense pass over
sampled queries keeps, for each key block, its share of the softmax's numerator and denominator. The output
under any block map is then a sum over the blocks of the map: a grid of thresholds costs about as much as the
dense attention itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetune.attention.blockmap import BlockShape, PooledBlocks, pool, select_blocks
from sparsetune.attention.thresholds import HeadThresholds, LayerThresholds

_SCORES_AT_ONCE = 1 << 25
"""Most attention scores held at a time: 128 MiB in float32."""


@dataclass(frozen=True)
class Measured:
    """The effect of each point of a grid on one attention call.

    Args:
        error: relative L1 error Σ|o − o'| / Σ|o| of each head's output, float32 (heads, points); sums run over the
            batch, the sampled queries and the channels.
        sparsity: fraction of block pairs not computed over all query blocks, float32 (heads, points).
    """

    error: Tensor
    sparsity: Tensor


def measure(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    points: Sequence[HeadThresholds],
    *,
    blocks: BlockShape,
    keep: range,
    scale: float,
    every: int = 1,
) -> Measured:
    """Measure every point of a grid on one attention call.

    Args:
        q: (batch, heads, tokens, head_dim), in the token order to measure in; k and v alike.
        k: see q.
        v: see q.
        points: the thresholds; `pvthreshd` is taken to skip nothing.
        blocks: block shape.
        keep: key blocks that are always computed.
        scale: softmax scale.
        every: the error is measured on every so many query tokens of each query block.

    Memory: the pooled blocks, one bool map a point, and one slab of scores (`_SCORES_AT_ONCE`).
    """
    maps = _maps(q, k, points, blocks, keep)
    num_heads = q.shape[1]
    difference = torch.zeros(len(points), num_heads, device=q.device)
    reference = torch.zeros(num_heads, device=q.device)
    slab = max(1, _SCORES_AT_ONCE * every // (q.shape[0] * blocks.q * k.shape[-2]))
    for row in range(maps.shape[-2]):
        queries = q[..., row * blocks.q : (row + 1) * blocks.q : every, :]
        for head in range(0, num_heads, slab):
            heads = slice(head, head + slab)
            parts = _block_parts(queries[:, heads], k[:, heads], v[:, heads], blocks.k, scale)
            delta, size = _errors(*parts, maps[:, :, heads, row])
            difference[:, heads] += delta
            reference[heads] += size
    # A map that drops all that weighs gives 0 / 0: no output, so no budget holds it.
    error = (difference / reference.clamp(min=1e-12)).nan_to_num(nan=torch.inf).T
    return Measured(error, 1.0 - maps.float().mean(dim=(1, 3, 4)).T)


def _maps(q: Tensor, k: Tensor, points: Sequence[HeadThresholds], blocks: BlockShape, keep: range) -> Tensor:
    """Block maps of all points, bool (points, batch, heads, q blocks, k blocks)."""
    pooled_q = pool(q, blocks.q)
    pooled_k = pool(k - k.mean(dim=-2, keepdim=True), blocks.k)
    return torch.stack([_map(pooled_q, pooled_k, point, keep) for point in points])


def _map(pooled_q: PooledBlocks, pooled_k: PooledBlocks, point: HeadThresholds, keep: range) -> Tensor:
    heads, device = pooled_q.similarity.shape[1], pooled_q.similarity.device
    thresholds = LayerThresholds.uniform("measured", heads, point).tensors(device)
    return select_blocks(pooled_q, pooled_k, thresholds, keep)


def _block_parts(q: Tensor, k: Tensor, v: Tensor, block: int, scale: float) -> tuple[Tensor, Tensor]:
    """Each key block's share of the softmax's numerator and denominator, for one query block.

    Returns:
        (batch, heads, k blocks, queries · head_dim) and (batch, heads, k blocks, queries), float32.
    """
    pad = -k.shape[-2] % block
    scores = (q.float() @ k.float().transpose(-1, -2)) * scale
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    weights = F.pad(weights, (0, pad)).view(*scores.shape[:-1], -1, block).transpose(-2, -3)
    values = F.pad(v.float(), (0, 0, 0, pad)).view(*v.shape[:-2], -1, block, v.shape[-1])
    return (weights @ values).flatten(-2), weights.sum(-1)


def _errors(numerator: Tensor, denominator: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Σ|o − o'| of every point and head, (points, heads), and Σ|o| of every head, (heads,).

    `maps` is bool (points, batch, heads, k blocks).
    """
    chosen = maps.permute(1, 2, 0, 3).float()  # (batch, heads, points, k blocks)
    every = torch.ones_like(chosen[..., :1, :])

    def output(blocks: Tensor) -> Tensor:
        weight = blocks @ denominator
        return (blocks @ numerator).view(*weight.shape, -1) / weight.unsqueeze(-1)

    dense = output(every)  # (batch, heads, 1, queries, head_dim)
    difference = (output(chosen) - dense).abs().sum(dim=(0, 3, 4)).T
    return difference, dense.abs().sum(dim=(0, 2, 3, 4))
