import pytest
import torch
from torch import Tensor


def structured(heads: int = 3, tokens: int = 1000, batch: int = 2, dim: int = 64, seed: int = 0) -> tuple[Tensor, ...]:
    """q, k, v as smooth features along the sequence: tokens of a block are similar, as in a real video model."""
    generator = torch.Generator().manual_seed(seed)
    position = torch.linspace(0, 1, tokens)[:, None]
    tensors = []
    for scale in (2.0, 2.0, 1.0):
        frequency = torch.rand(batch, heads, 1, dim, generator=generator) * 4
        phase = torch.rand(batch, heads, 1, dim, generator=generator) * 6.28
        noise = torch.randn(batch, heads, tokens, dim, generator=generator) * 0.2
        tensors.append(scale * (torch.sin(position * frequency * 6.28 + phase) + noise))
    return tuple(tensors)


@pytest.fixture
def qkv() -> tuple[Tensor, ...]:
    return structured()
