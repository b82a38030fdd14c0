"""Error and sparsity of one attention call under a grid of thresholds, for all heads at once.

One dense pass over sampled queries computes each key block's share of the softmax's numerator and denominator. The
output under any block map is a sum over these: a grid of thresholds costs about as much as the dense attention itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetune.attention.blockmap import BlockShape, PooledBlocks, pool_both
from sparsetune.attention.thresholds import HeadThresholds, Rule
from sparsetune.tuning.calibration.block_sums import BlockSums, block_sums


def mask_thresholds(pooled_q: PooledBlocks, pooled_k: PooledBlocks, sim: Tensor, keep: range, rule: Rule) -> Tensor:
    """Compute the lowest cdfthreshd or topk with which `select_blocks` selects each pair of blocks.

    `sim` is simthreshd1, float32 (heads,); the key blocks `keep` are always computed. The result is float32
    (heads, batch · q blocks, k blocks); -inf for pairs that are always computed.
    """
    similar_q, similar_k = (pooled.similarity > sim[:, None] for pooled in (pooled_q, pooled_k))
    scores = pooled_q.means @ pooled_k.means.transpose(-1, -2) * pooled_q.means.shape[-1] ** -0.5
    ranked = scores.masked_fill(~similar_k[..., None, :], -torch.inf).softmax(-1).sort(dim=-1, descending=True)
    num_blocks = scores.shape[-1]
    if rule == "cdf":
        reached = ranked.values.cumsum(-1).float()
    else:
        reached = (torch.arange(num_blocks, device=scores.device) + 1.0).div(num_blocks).expand(scores.shape).clone()
    reached[..., 0] = -torch.inf
    thresholds = torch.empty_like(reached).scatter_(-1, ranked.indices, reached)
    thresholds = thresholds.masked_fill_(~(similar_q[..., None] & similar_k[..., None, :]), -torch.inf)
    thresholds[..., keep.start : keep.stop] = -torch.inf
    return thresholds.transpose(0, 1).flatten(1, 2)


_FLOATS_AT_ONCE = 1 << 26
"""Most floats of block sums held at a time: 256 MiB."""

_POINTS_AT_ONCE = 16


@dataclass(frozen=True)
class GridErrors:
    """Error and sparsity of each point of a grid on one attention call, float32 (heads, points).

    `error` is the relative L1 error Σ|o − o'| / Σ|o| of each head's output, summed over the batch, the sampled queries
    and the channels; `sparsity` the fraction of block pairs not computed over all query blocks.
    """

    error: Tensor
    sparsity: Tensor
    size: Tensor  # mean |o| of each head's dense output, float32 (heads,)


def grid_errors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    points: Sequence[HeadThresholds],
    *,
    blocks: BlockShape,
    keep: range,
    scale: float,
    every: int = 1,
    select_partial: bool = False,
) -> GridErrors:
    """Compute error and sparsity of every point of a grid on one attention call.

    q, k and v are (batch, heads, tokens, head_dim), in the token order to measure in; `pvthreshd` of the points is
    ignored. The key blocks `keep` are always computed, and a partial last one unless `select_partial`. The error is
    measured on every `every`-th query of each query block.

    Memory: the block sums of as many heads as fit in `_FLOATS_AT_ONCE`, and their maps at `_POINTS_AT_ONCE` points.
    """
    num_q, num_k = blocks.counts(q.shape[-2], k.shape[-2])
    floats = q.shape[0] * num_q * num_k * -(-blocks.q // every) * q.shape[-1]
    at_once = max(1, _FLOATS_AT_ONCE // floats)
    parts = []
    for head in range(0, q.shape[1], at_once):
        q_, k_, v_ = (x[:, head : head + at_once] for x in (q, k, v))
        sums = block_sums(q_, k_, v_, blocks=blocks, scale=scale, every=every)
        parts.append(_grid_errors(q_, k_, sums, points, blocks, keep, select_partial))
    return GridErrors(*(torch.cat([getattr(part, name) for part in parts]) for name in ("error", "sparsity", "size")))


def _grid_errors(
    q: Tensor,
    k: Tensor,
    sums: BlockSums,
    points: Sequence[HeadThresholds],
    blocks: BlockShape,
    keep: range,
    select_partial: bool,
) -> GridErrors:
    pooled_q, pooled_k = pool_both(q, k, blocks, select_partial)
    error = torch.empty(q.shape[1], len(points), device=q.device)
    sparsity = torch.empty_like(error)
    for rule, sim in sorted({(point.rule, point.simthreshd1) for point in points}):
        sims = torch.full((q.shape[1],), sim, device=q.device)
        lowest = mask_thresholds(pooled_q, pooled_k, sims, keep, rule)
        family = [
            (index, point.cdfthreshd if rule == "cdf" else point.topk)
            for index, point in enumerate(points)
            if (point.rule, point.simthreshd1) == (rule, sim)
        ]
        for first in range(0, len(family), _POINTS_AT_ONCE):
            indices, thresholds = zip(*family[first : first + _POINTS_AT_ONCE], strict=True)
            maps = lowest.unsqueeze(2) <= torch.tensor(thresholds, device=q.device)[:, None]
            error[:, indices] = sums.errors(maps)
            sparsity[:, indices] = 1.0 - maps.float().mean(dim=(1, 3))
    return GridErrors(error, sparsity, sums.size)
