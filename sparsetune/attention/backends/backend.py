"""The protocol of attention backends, and the dense one."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetune.attention.blockmap import SPARGE_BLOCKS, BlockShape
from sparsetune.attention.thresholds import ThresholdTensors


@dataclass(frozen=True)
class AttentionOutput:
    """Output of one attention call, and the block pairs computed for it."""

    output: Tensor  # (batch, heads, q tokens, head_dim), in the query's dtype
    # Summed over the batch: float64 (heads,), or (1,) where the kernel only counts the sum over its heads
    computed: Tensor


class Backend(Protocol):
    """A sparse attention kernel; tensors are (batch, heads, tokens, head_dim), q and k with as many heads."""

    name: str
    blocks: BlockShape

    def refusal(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """Return in a few words why this call can't run here; None where it can."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, thresholds: ThresholdTensors, *, scale: float, keep: range
    ) -> AttentionOutput:
        """Attend under the block map of `thresholds`, computing the key blocks in `keep` for every query."""


class DenseBackend:
    """Computes every block, whatever the thresholds say."""

    name = "dense"
    blocks = SPARGE_BLOCKS

    def refusal(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        return None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, thresholds: ThresholdTensors, *, scale: float, keep: range
    ) -> AttentionOutput:
        num_q, num_k = self.blocks.counts(q.shape[-2], k.shape[-2])
        computed = torch.full((q.shape[1],), float(q.shape[0] * num_q * num_k), dtype=torch.float64, device=q.device)
        return AttentionOutput(F.scaled_dot_product_attention(q, k, v, scale=scale), computed)
