"""Training data of the transformer: latents, tokens and foreground masks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .build import TEXT_TOKENS, Pipeline
from .drawing import draw
from .scenes import SceneSampler
from .vae import encode
from .world import BASE_SIZE, Size

_PIXELS_AT_ONCE = 128 * BASE_SIZE.pixels


@dataclass(frozen=True)
class Pool:
    """Training data on the device.

    latents: (n, frames, channels, height, width) bfloat16, scaled. tokens: (n, 32) int64.
    foreground: (n, frames, 1, height, width) bool, true where a shape touches the latent pixel.
    """

    latents: Tensor
    tokens: Tensor
    foreground: Tensor

    def overwrite(self, start: int, fresh: "Pool") -> None:
        """Overwrite the rows from `start` on, in place."""
        rows = slice(start, start + len(fresh.latents))
        self.latents[rows] = fresh.latents
        self.tokens[rows] = fresh.tokens
        self.foreground[rows] = fresh.foreground


class PoolMaker:
    """Generates training data: draws, encodes and tokenizes random scenes."""

    def __init__(self, pipeline: Pipeline, sampler: SceneSampler, size: Size, device: torch.device) -> None:
        """Use the pipeline's VAE, with its scaling factor, and tokenizer, for clips of a size."""
        self._vae, self._tokenizer = pipeline.vae, pipeline.tokenizer
        self._sampler, self._size, self._device = sampler, size, device

    def make(self, count: int) -> Pool:
        """Return `count` clips, encoded in chunks of at most the pixels of 128 clips of the base size."""
        chunk = max(1, _PIXELS_AT_ONCE // self._size.pixels)
        parts = [self._chunk(min(chunk, count - start)) for start in range(0, count, chunk)]
        return Pool(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    @torch.no_grad()
    def _chunk(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        scenes = self._sampler.sample(count)
        clips = draw(scenes, self._device, size=self._size)
        latents = encode(self._vae, clips.video) * self._vae.config.scaling_factor
        tokens = tokenise(self._tokenizer, [scene.caption() for scene in scenes]).to(self._device)
        return latents.bfloat16(), tokens, latent_foreground(clips.foreground).unsqueeze(2)


def latent_foreground(coverage: Tensor) -> Tensor:
    """Return which latent pixels a shape touches: e.g. (n, 17, 64, 64) in [0, 1] to (n, 5, 16, 16) bool.

    The first latent frame covers the first frame, every other one covers four frames.
    """
    first = functional.max_pool3d(coverage[:, :1], (1, 4, 4))
    rest = functional.max_pool3d(coverage[:, 1:], (4, 4, 4))
    return torch.cat((first, rest), 1) > 0.1


def tokenise(tokenizer: Callable[..., Any], captions: list[str]) -> Tensor:
    """Return token ids (n, 32) int64, padded as in the pipeline."""
    encoded = tokenizer(captions, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt")
    ids: Tensor = encoded.input_ids
    return ids
