"""Plain dense attention, counted like the sparse backends: the other end of every comparison."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetune.attention.backends.backend import Attended
from sparsetune.attention.blockmap import SPARGE_BLOCKS
from sparsetune.attention.thresholds import ThresholdTensors


class DenseBackend:
    """Computes every block, whatever the thresholds say."""

    name = "dense"
    blocks = SPARGE_BLOCKS

    def refusal(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """Refuse nothing."""
        return None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, thresholds: ThresholdTensors, *, scale: float, keep: range
    ) -> Attended:
        """Attend with PyTorch's dense attention."""
        num_q, num_k = self.blocks.counts(q.shape[-2], k.shape[-2])
        computed = torch.full((q.shape[1],), float(q.shape[0] * num_q * num_k), dtype=torch.float64, device=q.device)
        return Attended(F.scaled_dot_product_attention(q, k, v, scale=scale), computed)
