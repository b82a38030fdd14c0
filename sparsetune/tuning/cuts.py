"""The threshold at which each block pair begins to be computed: every block map of a grid in one comparison."""

import torch
from torch import Tensor

from sparsetune.attention.blockmap import PooledBlocks
from sparsetune.attention.thresholds import Rule


def critical_cuts(pooled_q: PooledBlocks, pooled_k: PooledBlocks, sim: Tensor, keep: range, rule: Rule) -> Tensor:
    """Find the threshold from which on `select_blocks` takes each pair.

    Args:
        pooled_q: query blocks.
        pooled_k: key blocks.
        sim: simthreshd1 of each head, float32 (heads,).
        keep: key blocks that are always computed.
        rule: cdf or topk.

    Returns:
        float32 (heads, batch · q blocks, k blocks); -inf where the pair is computed whatever the threshold.
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
    critical = torch.empty_like(reached).scatter_(-1, ranked.indices, reached)
    critical = critical.masked_fill_(~(similar_q[..., None] & similar_k[..., None, :]), -torch.inf)
    critical[..., keep.start : keep.stop] = -torch.inf
    return critical.transpose(0, 1).flatten(1, 2)
