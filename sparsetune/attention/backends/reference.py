"""SpargeAttn's attention in plain PyTorch: slow, exact, on any device and dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetune.attention.backends.backend import AttentionOutput
from sparsetune.attention.blockmap import SPARGE_BLOCKS, BlockShape, counted_block_map, skip_pv
from sparsetune.attention.thresholds import ThresholdTensors

# Bound on the entries of a token mask, or one query block of one head where that is more: 64 MB in float32
_MASK_ENTRIES = 1 << 24


class ReferenceBackend:
    """Dense attention of PyTorch under the block map, without the kernel's int8 and fp8 rounding."""

    name = "reference"

    def __init__(self, blocks: BlockShape = SPARGE_BLOCKS) -> None:
        self.blocks = blocks

    def refusal(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """Refuse sequences of less than one query block, as SpargeAttn does."""
        return f"fewer than {self.blocks.q} tokens" if q.shape[-2] < self.blocks.q else None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, thresholds: ThresholdTensors, *, scale: float, keep: range
    ) -> AttentionOutput:
        computed, num_computed = counted_block_map(q, k, thresholds, self.blocks, keep)
        used = skip_pv(q, k, computed, thresholds.pvthreshd, scale, self.blocks)
        output = masked_attention(q, k, v, used, self.blocks, scale)
        return AttentionOutput(output, num_computed)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, used: Tensor, blocks: BlockShape, scale: float) -> Tensor:
    """Softmax attention over the block pairs in `used`, at least one a row, in slabs of heads and query blocks.

    With every pair used it is PyTorch's dense attention itself, bit for bit.
    """
    if bool(used.all()):
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    slabs = []
    heads_at_once = max(1, _MASK_ENTRIES // (q.shape[0] * blocks.q * k.shape[-2]))
    for head in range(0, q.shape[1], heads_at_once):
        heads = slice(head, head + heads_at_once)
        slabs.append(_masked_heads(q[:, heads], k[:, heads], v[:, heads], used[:, heads], blocks, scale))
    return torch.cat(slabs, dim=1)


def _masked_heads(q: Tensor, k: Tensor, v: Tensor, used: Tensor, blocks: BlockShape, scale: float) -> Tensor:
    """`masked_attention` for so few heads that one row of query blocks fits into a slab."""
    rows_at_once = max(1, _MASK_ENTRIES // (q.shape[0] * q.shape[1] * blocks.q * k.shape[-2]))
    # Added to the scores: PyTorch would make a float mask of a bool one anyway, and token by token.
    bias = torch.zeros_like(used, dtype=q.dtype).masked_fill(~used, -torch.inf)
    slabs = []
    for row in range(0, used.shape[-2], rows_at_once):
        queries = q[..., row * blocks.q : (row + rows_at_once) * blocks.q, :]
        columns = bias[..., row : row + rows_at_once, :].repeat_interleave(blocks.k, dim=-1)[..., : k.shape[-2]]
        mask = columns.repeat_interleave(blocks.q, dim=-2)[..., : queries.shape[-2], :]
        slabs.append(F.scaled_dot_product_attention(queries, k, v, attn_mask=mask, scale=scale))
    return torch.cat(slabs, dim=-2)
