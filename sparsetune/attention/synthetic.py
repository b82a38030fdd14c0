"""Queries, keys and values like those of a video model, drawn at random: for measurements without a model."""

import math

import torch
from torch import Tensor

from sparsetune.attention.ordering import TokenLayout

_BANDS = (0.5, 1.0, 2.0, 4.0)
"""Bandwidths that the heads take in turn: periods of their features along each axis of the video."""

_SHARPNESS = (1.0, 1.4, 1.8)
"""Scales of q and k that the heads take in turn: the larger, the fewer keys a query attends to."""


def video_like(
    layout: TokenLayout,
    *,
    heads: int,
    head_dim: int = 64,
    batch: int = 1,
    seed: int = 0,
    model_seed: int = 0,
    noise: float = 0.15,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw q, k and v as smooth features over a latent video, with rough ones for the text.

    A head's features are waves over frame, row and column: q and k share them, so that a query attends to its
    neighbourhood and to what repeats, more or less sharply from head to head. On top lies a smooth content of its own,
    and noise on every token.

    Args:
        layout: where the tokens lie.
        heads: attention heads; bandwidth and sharpness differ between them.
        head_dim: channels a head, even.
        batch: batch entries, each with its own content.
        seed: of content and noise: another input of the same model.
        model_seed: of the heads' features: another model.
        noise: standard deviation of the noise, where features have about 0.7.
        device: where it is drawn; another kind draws other content from the same seed.

    Returns:
        q, k, v of shape (batch, heads, tokens, head_dim), float32 on the device.
    """
    model = torch.Generator().manual_seed(model_seed)
    content = torch.Generator(device).manual_seed(seed + 1_000_003)
    axes = torch.meshgrid(*(torch.arange(length) / max(layout.grid) for length in layout.grid), indexing="ij")
    place = torch.stack([axis.flatten() for axis in axes], dim=-1).to(device)
    band = torch.tensor([_BANDS[head % len(_BANDS)] for head in range(heads)])[:, None, None]
    sharp = torch.tensor([_SHARPNESS[head // len(_BANDS) % len(_SHARPNESS)] for head in range(heads)])
    sharp = sharp[:, None, None].to(device)
    waves = place @ (torch.randn(heads, 3, head_dim // 2, generator=model) * band * math.tau / 2).to(device)
    shared = torch.cat([waves.cos(), waves.sin()], dim=-1)  # (heads, video tokens, head_dim)

    def field(strength: float) -> Tensor:
        direction = torch.randn(batch, heads, 3, head_dim, generator=content, device=device) * math.tau
        phase = torch.rand(batch, heads, 1, head_dim, generator=content, device=device) * math.tau
        return strength * torch.sin(place @ direction + phase)

    def tensor(video: Tensor, scale: Tensor | float) -> Tensor:
        text = torch.randn(batch, heads, len(layout.text), head_dim, generator=content, device=device) * 0.7
        whole = torch.cat([text, video] if layout.text.start == 0 else [video, text], dim=-2)
        return scale * (whole + noise * torch.randn(whole.shape, generator=content, device=device))

    topic = field(0.4)
    return tensor(shared + topic, sharp), tensor(shared + topic + field(0.2), sharp), tensor(field(1.0), 1.0)
