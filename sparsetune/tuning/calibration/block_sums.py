"""Sums of the softmax of sampled queries by key block, from which the error of any block map is computed."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetune.attention.blockmap import BlockShape
from sparsetune.attention.device import fits_triton

_TRITON_BYTES = 512
"""Largest token of a head for which the Triton kernel has enough shared memory on every GPU from sm80 on."""


@dataclass(frozen=True)
class BlockSums:
    """Numerators and denominators of the softmax by key block.

    A row is a query block of a batch entry; `queries` is the number of sampled queries in a block.
    """

    numerator: Tensor  # float32 (heads, rows, k blocks, queries · head_dim)
    denominator: Tensor  # float32 (heads, rows, k blocks, queries)
    dense: Tensor  # attention over all blocks, float32 (heads, rows, queries, head_dim); 0 for padding
    inside: Tensor  # False for padding, bool (rows, queries)

    @property
    def size(self) -> Tensor:
        """Mean |o| of the sampled dense output of each head, float32 (heads,)."""
        return self.dense.abs().sum(dim=(1, 2, 3)) / (self.inside.sum() * self.dense.shape[-1])

    def errors(self, maps: Tensor) -> Tensor:
        """Relative L1 error Σ|o − o'| / Σ|o| of each head under block maps, bool (heads, rows, points, k blocks).

        The result is float32 (heads, points); infinite where a map leaves out all of the weight.
        """
        selected = maps.to(self.numerator.dtype)
        weight = selected @ self.denominator
        output = (selected @ self.numerator).view(*weight.shape, -1)
        difference = (output.div_(weight.unsqueeze(-1)) - self.dense.unsqueeze(2)).abs_().sum(-1)
        difference = difference.masked_fill_(~self.inside[:, None], 0.0).sum(dim=(1, 3))
        size = self.dense.abs().sum(dim=(1, 2, 3)).clamp(min=1e-12)
        return (difference / size[:, None]).nan_to_num(nan=torch.inf)


def block_sums(q: Tensor, k: Tensor, v: Tensor, *, blocks: BlockShape, scale: float, every: int) -> BlockSums:
    """Sum the softmax of sampled queries by key block.

    A Triton kernel computes it for CUDA tensors whose head_dim is a power of two from 16 to 256 (in float32 to 128),
    otherwise plain PyTorch, head by head. q, k and v are (batch, heads, tokens, head_dim); every `every`-th query of
    each query block is sampled.

    Memory: heads · batch · q blocks · k blocks · queries · head_dim floats (1.2 GB at 30 heads of 17,776 tokens and
    head_dim 64, with blocks of 64 × 128 and every 16th query), and, in plain PyTorch, one head's scores.
    """
    batch, heads, tokens, dim = q.shape
    num_q, _ = blocks.counts(tokens, k.shape[-2])
    position = torch.arange(num_q * blocks.q, device=q.device).view(num_q, blocks.q)[:, ::every]
    queries = position.shape[1]
    if all(fits_triton(x) for x in (q, k, v)) and dim * q.element_size() <= _TRITON_BYTES:
        from sparsetune.tuning.calibration.block_sums_triton import sum_blocks

        numerator, denominator = sum_blocks(
            q, k, v, block_q=blocks.q, block_k=blocks.k, queries=queries, every=every, scale=scale
        )
    else:
        numerator, denominator = _sum_blocks(q, k, v, blocks, scale, position)
    inside = (position < tokens).repeat(batch, 1)
    dense = numerator.sum(2).view(heads, batch * num_q, queries, dim) / denominator.sum(2).unsqueeze(-1)
    dense.masked_fill_(~inside[..., None], 0.0)
    return BlockSums(numerator, denominator, dense, inside)


def _sum_blocks(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockShape, scale: float, position: Tensor
) -> tuple[Tensor, Tensor]:
    """Numerators and denominators in plain PyTorch; `position` has the sampled tokens, (q blocks, queries)."""
    batch, heads, tokens, dim = q.shape
    num_q, queries = position.shape
    num_k = -(-k.shape[-2] // blocks.k)
    numerator = q.new_empty(heads, batch, num_q, num_k, queries * dim, dtype=torch.float32)
    denominator = q.new_empty(heads, batch, num_q, num_k, queries, dtype=torch.float32)
    sampled = F.pad(q, (0, 0, 0, num_q * blocks.q - tokens))[..., position.flatten(), :]
    pad = num_k * blocks.k - k.shape[-2]
    for entry in range(batch):
        for head in range(heads):
            keys, values = (F.pad(x[entry, head].float(), (0, 0, 0, pad)) for x in (k, v))
            scores = sampled[entry, head].float() @ keys.T
            scores[:, k.shape[-2] :] = -torch.inf
            scores -= scores.amax(-1, keepdim=True)
            weights = scores.mul_(scale).exp_()
            by_block = weights.view(-1, num_k, blocks.k)
            products = torch.bmm(by_block.transpose(0, 1), values.view(num_k, blocks.k, dim))
            numerator[head, entry] = products.view(num_k, num_q, queries * dim).transpose(0, 1)
            denominator[head, entry] = by_block.sum(-1).view(num_q, queries, num_k).transpose(1, 2)
    return numerator.flatten(1, 2), denominator.flatten(1, 2)
