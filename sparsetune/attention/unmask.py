"""Attention calls without their mask, and with a head dimension that the kernel has: what a sparse backend can run."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetune.attention.backends import AttentionOutput, Backend
from sparsetune.attention.ordering import TokenLayout
from sparsetune.attention.sites import TransformerCall
from sparsetune.attention.thresholds import ThresholdTensors

if TYPE_CHECKING:
    from sparsetune.attention.interception import AttentionCall

# An additive mask's value that hides a key for certain: models write -10000 or -inf, and exp(-5000) is 0.
_MASKED_OUT = -5000.0

_HEAD_DIMS = (64, 128)  # what SpargeAttn's kernels are built for


@dataclass(frozen=True)
class UnmaskedCall:
    """The square, unmasked part of a self-attention call: padding is cut out of q, k and v."""

    q: Tensor  # (batch, heads, tokens, head_dim), like k and v
    k: Tensor
    v: Tensor
    layout: TokenLayout  # of the tokens that are left
    scale: float
    padding: Tensor  # the queries that were cut out, (batch, heads, cut tokens, head_dim)
    cut_at: int = 0  # where they lay
    # Under a mask over keys alone the padding attends to the remaining keys; otherwise its output is 0.
    padding_attends: bool = True

    def with_padding(self, output: Tensor) -> Tensor:
        """Put the padding's output, computed dense, into that of the square part."""
        if not self.padding.shape[-2]:
            return output
        if self.padding_attends:
            rest = F.scaled_dot_product_attention(self.padding, self.k, self.v, scale=self.scale)
        else:
            rest = output.new_zeros(*self.padding.shape[:-1], output.shape[-1])
        return torch.cat([output[..., : self.cut_at, :], rest, output[..., self.cut_at :, :]], dim=-2)


@dataclass(frozen=True)
class Refusal:
    """Why a call can't run sparse, in a few words."""

    reason: str


def unmasked_call(call: "AttentionCall", backend: Backend | None = None) -> UnmaskedCall | Refusal:
    """Remove a call's mask, or return why the call can't run sparse: on `backend`, or on any where that is None.

    A mask that hides nothing is dropped. One that hides text tokens side by side, alike for all of the batch, is
    honoured by cutting those keys (and queries) out, which is exact.
    """
    if call.transformer is None:
        return Refusal("the attention ran outside of its transformer")
    if call.step is None:
        return Refusal("the timestep isn't in the scheduler's list")
    if call.is_causal:
        return Refusal("the call is causal")
    if call.dropout:
        return Refusal("the call has dropout")
    if call.k.shape[1] != call.q.shape[1]:
        return Refusal("key heads are shared between query heads")
    num_tokens, num_keys = call.q.shape[-2], call.k.shape[-2]
    if num_keys > num_tokens:
        return Refusal("there are more keys than queries, as with a cache of earlier chunks' or references' keys")
    layout = call.layout
    if layout is None or num_keys != num_tokens:
        grid, tail = call.transformer.grid_and_tail(num_tokens)
        expected = math.prod(grid) + tail
        return Refusal(f"{num_tokens} x {num_keys} tokens where the transformer's input has {expected}")
    hidden = _Hidden(range(0)) if call.mask is None else _mask_cache.read(call.mask, call.transformer, num_tokens)
    if isinstance(hidden, Refusal):
        return hidden
    cut = hidden.tokens
    layout = _shortened(layout, cut)
    if layout is None:
        return Refusal("the mask hides tokens of the video")
    q, k, v = (_without(x, cut) for x in (call.q, call.k, call.v))
    padding = call.q[..., cut.start : cut.stop, :]
    unmasked = UnmaskedCall(q, k, v, layout, call.scale, padding, cut.start, hidden.padding_attends)
    reason = None if backend is None else head_dim_refusal(backend, unmasked)
    return unmasked if reason is None else Refusal(reason)


class _Hidden(NamedTuple):
    """Tokens that a mask hides, side by side; `padding_attends` is as in `UnmaskedCall`."""

    tokens: range
    padding_attends: bool = True


def _without(x: Tensor, cut: range) -> Tensor:
    """Cut tokens out of x (batch, heads, tokens, head_dim)."""
    if cut.stop in (0, x.shape[-2]):
        return x[..., : x.shape[-2] - len(cut), :]
    return torch.cat([x[..., : cut.start, :], x[..., cut.stop :, :]], dim=-2)


class _MaskCache:
    """The last mask: all layers in a transformer's call get the same one, and reading it waits for the GPU."""

    def __init__(self) -> None:
        self._key: tuple[Tensor, TransformerCall] | None = None
        self._value: _Hidden | Refusal = _Hidden(range(0))

    def read(self, mask: Tensor, transformer: TransformerCall, num_tokens: int) -> _Hidden | Refusal:
        if self._key is None or self._key[0] is not mask or self._key[1] is not transformer:
            self._value = _read_mask(mask, num_tokens)
            self._key = (mask, transformer)
        return self._value


_mask_cache = _MaskCache()


def _read_mask(mask: Tensor, num_tokens: int) -> _Hidden | Refusal:
    """Find the keys side by side that a mask (…, queries or 1, keys), bool or additive, hides."""
    other = Refusal("the call has an attention mask")
    if mask.shape[-1] != num_tokens or mask.dim() < 2:
        return other
    shows = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and not bool((shows | (mask <= _MASKED_OUT)).all()):
        return other
    if bool(shows.all()):
        return _Hidden(range(0))
    visible = shows.any(dim=-2).flatten(0, -2) if shows.dim() > 2 else shows.any(dim=-2)[None]
    lengths = visible.sum(dim=-1)
    if int(lengths.max()) == 0:
        return other
    if not bool((lengths == lengths[0]).all()):
        return Refusal("the mask pads the batch's sequences to different lengths")
    start, count = int(visible[0].long().argmin()), num_tokens - int(lengths[0])
    place = torch.arange(num_tokens, device=mask.device)
    seen = (place < start) | (place >= start + count)
    if bool(shows.any(dim=-1).all()):
        return _Hidden(range(start, start + count)) if bool((shows == seen).all()) else other
    exact = mask.shape[-2] == num_tokens and bool((shows == (seen[:, None] & seen)).all())
    return _Hidden(range(start, start + count), padding_attends=False) if exact else other


def _shortened(layout: TokenLayout, cut: range) -> TokenLayout | None:
    """Remove text tokens from a layout; None where others are cut out. A row of all tokens is shortened."""
    if not cut:
        return layout
    if layout.grid[:2] == (1, 1) and not layout.text and not layout.tail:
        return TokenLayout((1, 1, layout.grid[2] - len(cut)), range(0))
    if cut.start < layout.text.start or cut.stop > layout.text.stop:
        return None
    return TokenLayout(layout.grid, layout.text[: len(layout.text) - len(cut)], layout.tail)


def head_dim_refusal(backend: Backend, unmasked: UnmaskedCall) -> str | None:
    """Return why a backend can't run a call, not even with its head dimension padded; None where it can."""
    return _padded_width(backend, unmasked.q, unmasked.k, unmasked.v)[1]


def attend_padded(
    backend: Backend, q: Tensor, k: Tensor, v: Tensor, thresholds: ThresholdTensors, *, scale: float, keep: range
) -> AttentionOutput:
    """Attend as `Backend.attend`, with zeros appended to every head where the backend needs that.

    Zeros change no score and no cosine. The block map's own scores are divided by the root of the head dimension, and q
    is scaled by the root of the padding's factor so that these stay as they were: all is exact but that q is rounded
    once more where this factor is no power of two (it is one from 16 to 64, and isn't from 96 to 128).
    """
    head_dim = q.shape[-1]
    width, _ = _padded_width(backend, q, k, v)
    if width == head_dim:
        return backend.attend(q, k, v, thresholds, scale=scale, keep=keep)
    factor = (width / head_dim) ** 0.5
    q, k, v = (F.pad(x, (0, width - head_dim)) for x in (q * factor, k, v))
    attended = backend.attend(q, k, v, thresholds, scale=scale / factor, keep=keep)
    return AttentionOutput(attended.output[..., :head_dim], attended.computed)


def _padded_width(backend: Backend, q: Tensor, k: Tensor, v: Tensor) -> tuple[int, str | None]:
    """Return the head dimension to run with, and why the backend refuses even that."""
    head_dim = q.shape[-1]
    reason = backend.refusal(q, k, v)
    if reason is None:
        return head_dim, None
    for width in _HEAD_DIMS:
        if width > head_dim:
            wide = (x[..., :1].expand(*x.shape[:-1], width) for x in (q, k, v))
            if backend.refusal(*wide) is None:
                return width, None
    return head_dim, reason
