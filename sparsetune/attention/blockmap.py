"""Which (query block, key block) pairs of an attention call are computed: SpargeAttn's rule in plain PyTorch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetune.attention.device import fits_triton
from sparsetune.attention.thresholds import ThresholdTensors

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class BlockShape:
    """Tokens in one query block and in one key block."""

    q: int
    k: int

    def counts(self, num_q: int, num_k: int) -> tuple[int, int]:
        """A partial last block counts."""
        return -(-num_q // self.q), -(-num_k // self.k)

    def covering(self, tokens: range) -> range:
        """Return the key blocks that hold at least one of the consecutive `tokens`."""
        return range(tokens.start // self.k, -(-tokens.stop // self.k)) if tokens else range(0)


# SpargeAttn's blocks on every GPU but Hopper, and on Hopper (sm90)
SPARGE_BLOCKS = BlockShape(q=128, k=64)
SPARGE_BLOCKS_SM90 = BlockShape(q=64, k=128)

# Base-2 logits under the row maximum at which even 10⁵ keys weigh less than float32's rounding (2⁻²⁴)
_INVISIBLE = 40.0


@dataclass(frozen=True)
class PooledBlocks:
    """Means and self-similarities of one tensor's blocks.

    `similarity` is the mean cosine similarity over all pairs of tokens of a block, self-pairs included, in [-1, 1].
    """

    means: Tensor  # (batch, heads, blocks, head_dim) in the input's dtype
    similarity: Tensor  # (batch, heads, blocks) float32


def pool(x: Tensor, block: int, centre: Tensor | None = None, select_partial: bool = False) -> PooledBlocks:
    """Pool blocks of `block` tokens of x (batch, heads, tokens, head_dim): their means and self-similarities.

    The mean pairwise cosine is |Σ x̂|² / n², x̂ the normalised tokens rounded to float16, as SpargeAttn's kernel
    does. Two of that kernel's traits are kept: the mean is rounded to the input's dtype, and a block with a token
    of norm zero is never similar (0 / 0). That includes a partial last block, which the kernel pads with zeros, so it
    is always computed, unless `select_partial` makes its similarity that of its own tokens alone.

    `centre`, (batch, heads, 1, head_dim) in x's dtype, is subtracted from every token first.
    """
    x = x if centre is None else x - centre
    pooled = _pool(x, block)
    rest = x.shape[-2] % block
    if select_partial and rest:
        similarity = torch.cat([pooled.similarity[..., :-1], _pool(x[..., -rest:, :], rest).similarity], dim=-1)
        return PooledBlocks(pooled.means, similarity)
    return pooled


def pool_both(
    q: Tensor, k: Tensor, blocks: BlockShape, select_partial: bool = False
) -> tuple[PooledBlocks, PooledBlocks]:
    """Pool the blocks of q, and those of k after subtracting its mean over the tokens.

    CUDA tensors whose head_dim is a power of two are read once, by one Triton kernel; others in plain PyTorch.
    """
    centre = k.mean(dim=-2, keepdim=True)
    if fits_triton(q) and fits_triton(k):
        from sparsetune.attention.pool_triton import pool_blocks

        of_q, in_q, of_k, in_k = pool_blocks(q, k, centre, blocks.q, blocks.k, select_partial)
        return PooledBlocks(of_q, in_q), PooledBlocks(of_k, in_k)
    return pool(q, blocks.q, None, select_partial), pool(k, blocks.k, centre, select_partial)


def _pool(x: Tensor, block: int) -> PooledBlocks:
    batch, heads, tokens, dim = x.shape
    blocks = -(-tokens // block)
    x32 = torch.nn.functional.pad(x.float(), (0, 0, 0, blocks * block - tokens))
    x32 = x32.view(batch, heads, blocks, block, dim)
    sizes = torch.full((blocks, 1), float(block), device=x.device)
    sizes[-1] = tokens - (blocks - 1) * block
    means = (x32.sum(dim=-2) / sizes).to(x.dtype)
    unit = (x32 / x32.norm(dim=-1, keepdim=True)).to(torch.float16).float()
    similarity = unit.sum(dim=-2).square().sum(dim=-1) / (block * block)
    return PooledBlocks(means, similarity)


def block_map(q: Tensor, k: Tensor, thresholds: ThresholdTensors, blocks: BlockShape, keep: range = range(0)) -> Tensor:
    """Choose the block pairs to compute by SpargeAttn's rule (arXiv:2502.18137, and its `get_block_map_meansim`).

    k's mean over the tokens is subtracted first (it shifts every score of a row alike). The softmax over the pooled
    scores of similar key blocks is sorted; blocks are taken in descending order while the cumulated probability
    is not above `cdfthreshd`, or the first int(`topk` × blocks); at least one. Of equal probabilities the first block's
    is taken first. Rows and columns of blocks that aren't similar, and the columns in `keep` (e.g. those with text),
    are always computed.

    Returns:
        bool (batch, heads, q blocks, k blocks), True where the pair is computed.
    """
    return counted_block_map(q, k, thresholds, blocks, keep)[0]


def counted_block_map(
    q: Tensor, k: Tensor, thresholds: ThresholdTensors, blocks: BlockShape, keep: range = range(0)
) -> tuple[Tensor, Tensor]:
    """Return the `block_map`, and each head's number of computed pairs over the batch, float64 (heads,)."""
    pooled_q, pooled_k = pool_both(q, k, blocks, thresholds.select_partial)
    return select_blocks(pooled_q, pooled_k, thresholds, keep)


def select_blocks(
    pooled_q: PooledBlocks, pooled_k: PooledBlocks, thresholds: ThresholdTensors, keep: range = range(0)
) -> tuple[Tensor, Tensor]:
    """As `counted_block_map`, from pooled blocks; on a GPU by Triton kernels, elsewhere in plain PyTorch."""
    if pooled_q.means.is_cuda:
        from sparsetune.attention import select_triton

        if select_triton.fits(pooled_q.means, pooled_k.means):
            pooled = (pooled_q.means, pooled_q.similarity, pooled_k.means, pooled_k.similarity)
            is_cdf = thresholds.rule == "cdf"
            return select_triton.select(pooled, thresholds.simthreshd1, thresholds.select, is_cdf, keep)
    selected = _select_blocks(pooled_q, pooled_k, thresholds, keep)
    return selected, selected.sum(dim=(0, 2, 3), dtype=torch.float64)


def _select_blocks(pooled_q: PooledBlocks, pooled_k: PooledBlocks, thresholds: ThresholdTensors, keep: range) -> Tensor:
    floor = thresholds.simthreshd1[:, None]
    similar_q = (pooled_q.similarity > floor)[..., :, None]
    similar_k = (pooled_k.similarity > floor)[..., None, :]
    scores = pooled_q.means @ pooled_k.means.transpose(-1, -2) * pooled_q.means.shape[-1] ** -0.5
    # A row without one similar key block is all -inf, hence NaN; its blocks are all computed below.
    probability = scores.masked_fill(~similar_k, -torch.inf).softmax(-1).nan_to_num(0.0)
    ranked = probability.sort(dim=-1, descending=True, stable=True)
    num_blocks = probability.shape[-1]
    if thresholds.rule == "cdf":
        taken = (ranked.values.cumsum(-1) <= thresholds.select[:, None, None]).sum(-1, keepdim=True)
    else:
        taken = (thresholds.select * num_blocks).long()[:, None, None].expand(*probability.shape[:-1], 1)
    rank = torch.arange(num_blocks, device=scores.device)
    selected = torch.zeros_like(probability, dtype=torch.bool)
    selected.scatter_(-1, ranked.indices, rank < taken.clamp(min=1))
    selected |= ~similar_k
    selected |= ~similar_q
    selected[..., keep.start : keep.stop] = True
    return selected


def skip_pv(q: Tensor, k: Tensor, computed: Tensor, pvthreshd: Tensor, scale: float, blocks: BlockShape) -> Tensor:
    """Remove the pairs whose P·V SpargeAttn's kernel skips: their scores lie too far under the row maximum.

    The kernel walks a row's computed blocks from left to right and skips one where, for every query of the block,
    block maximum − running maximum + pvthreshd ≤ 0 in base-2 logits; never the first, and never the last (on Hopper)
    or the last two (elsewhere), which its unrolled loop computes without the check. A skipped block is left out of
    the softmax's denominator too, so the result is attention under the map returned here.
    A head whose pvthreshd is 40 or more (SpargeAttn's default is 50) skips nothing here: what it would skip weighs
    less than float32's rounding. Skipped pairs still count as computed in `sparsity`, as upstream counts them.

    Memory: one query block's scores over all batch entries and heads.
    """
    centred = k - k.mean(dim=-2, keepdim=True)  # shifts a row's scores alike: the bound below gets tighter
    bound = 2 * scale * LOG2_E * q.norm(dim=-1).amax(dim=(0, 2)) * centred.norm(dim=-1).amax(dim=(0, 2))
    if bool(((pvthreshd >= _INVISIBLE) | (bound < pvthreshd)).all()):
        return computed
    unchecked = 1 if blocks == SPARGE_BLOCKS_SM90 else 2
    protected = computed & (computed.flip(-1).cumsum(-1).flip(-1) <= unchecked)
    kept = computed.clone()
    pad = computed.shape[-1] * blocks.k - k.shape[-2]
    for row in range(computed.shape[-2]):
        scores = q[..., row * blocks.q : (row + 1) * blocks.q, :] @ centred.transpose(-1, -2) * (scale * LOG2_E)
        scores = torch.nn.functional.pad(scores.float(), (0, pad), value=-torch.inf)
        peaks = scores.view(*scores.shape[:-1], -1, blocks.k).amax(-1)  # (batch, heads, queries, k blocks)
        peaks = peaks.masked_fill(~computed[..., row, None, :], -torch.inf)
        before = torch.cat([torch.full_like(peaks[..., :1], -torch.inf), peaks.cummax(-1).values[..., :-1]], -1)
        rise = torch.where(before == -torch.inf, torch.inf, peaks - before).amax(-2)
        kept[..., row, :] &= rise + pvthreshd[:, None] > 0
    return kept | protected
