"""An attention call without its mask, as a sparse kernel takes it."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetune.attention.ordering import TokenLayout
from sparsetune.attention.sites import TransformerCall

if TYPE_CHECKING:
    from sparsetune.attention.interception import AttentionCall


from sparsetune.attention.backends import AttentionOutput, Backend
from sparsetune.attention.thresholds import ThresholdTensors

_MASKED_OUT = -5000.0
"""An additive mask's value that hides a key for certain: models write -10000 or -inf, and exp(-5000) is 0."""


@dataclass(frozen=True)
class UnmaskedCall:
    """The square, unmasked part of a self-attention call.

    Args:
        q, k, v: (batch, heads, tokens, head_dim); padding at the end is cut off.
        layout: where these tokens lie.
        scale: softmax scale.
        padding: the queries that were cut off, (batch, heads, cut tokens, head_dim).
        padding_attends: whether those queries see the keys that are left, as they do under a mask over keys alone;
            otherwise they see nothing and their output is 0.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    layout: TokenLayout
    scale: float
    padding: Tensor
    padding_attends: bool = True

    def whole(self, output: Tensor) -> Tensor:
        """Put the padding's output, computed dense, behind that of the square part."""
        if not self.padding.shape[-2]:
            return output
        if self.padding_attends:
            rest = F.scaled_dot_product_attention(self.padding, self.k, self.v, scale=self.scale)
        else:
            rest = output.new_zeros(*self.padding.shape[:-1], output.shape[-1])
        return torch.cat([output, rest], dim=-2)


def unmasked_call(call: "AttentionCall") -> UnmaskedCall | str:
    """Take a call's mask away, or say in a few words why the call can't run sparse on any backend.

    A mask that hides nothing is dropped. One that hides the end of the sequence, alike for all of the batch, is
    honoured by cutting those keys (and queries) off, which is exact.
    """
    if call.transformer is None:
        return "the attention ran outside of its transformer"
    if call.step is None:
        return "the timestep isn't in the scheduler's list"
    if call.is_causal:
        return "the call is causal"
    if call.dropout:
        return "the call has dropout"
    if call.k.shape[1] != call.q.shape[1]:
        return "key heads are shared between query heads"
    num_tokens, num_keys = call.q.shape[-2], call.k.shape[-2]
    layout = call.layout
    if layout is None or num_keys != num_tokens:
        grid, tail = call.transformer.cut()
        wanted = math.prod(grid) + tail
        return f"{num_tokens} x {num_keys} tokens where the transformer's input has {wanted}"
    shown = _Shown(num_tokens) if call.mask is None else _last_mask.read(call.mask, call.transformer, num_tokens)
    if isinstance(shown, str):
        return shown
    layout = _cut(layout, num_tokens - shown.tokens)
    if layout is None:
        return "the mask hides tokens of the video"
    used = slice(shown.tokens)
    return UnmaskedCall(
        call.q[..., used, :],
        call.k[..., used, :],
        call.v[..., used, :],
        layout,
        call.scale,
        call.q[..., shown.tokens :, :],
        shown.padding_attends,
    )


class _Shown(NamedTuple):
    tokens: int
    padding_attends: bool = True


Reason = Literal["the call has an attention mask", "the mask pads the batch's sequences to different lengths"]


class _LastMask:
    """The mask read last: all layers in a transformer's call get the same one, and reading it waits for the GPU."""

    def __init__(self) -> None:
        self._of: tuple[Tensor, TransformerCall] | None = None
        self._shown: _Shown | Reason = _Shown(0)

    def read(self, mask: Tensor, transformer: TransformerCall, num_tokens: int) -> _Shown | Reason:
        if self._of is None or self._of[0] is not mask or self._of[1] is not transformer:
            self._shown = _read_mask(mask, num_tokens)
            self._of = (mask, transformer)
        return self._shown


_last_mask = _LastMask()


def _read_mask(mask: Tensor, num_tokens: int) -> _Shown | Reason:
    """Read a mask (…, queries or 1, keys), bool or additive, for a prefix of keys that it shows."""
    if mask.shape[-1] != num_tokens or mask.dim() < 2:
        return "the call has an attention mask"
    shows = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and not bool((shows | (mask <= _MASKED_OUT)).all()):
        return "the call has an attention mask"
    if bool(shows.all()):
        return _Shown(num_tokens)
    rows = shows.any(dim=-1)
    keys = shows.any(dim=-2)
    lengths = keys.sum(dim=-1)
    tokens = int(lengths.max())
    prefix = torch.arange(num_tokens, device=mask.device) < tokens
    if tokens == 0:
        return "the call has an attention mask"
    if not bool((lengths == tokens).all()):
        return "the mask pads the batch's sequences to different lengths"
    if bool(rows.all()):
        return _Shown(tokens) if bool((shows == prefix).all()) else "the call has an attention mask"
    square = prefix[:, None] & prefix
    exact = mask.shape[-2] == num_tokens and bool((shows == square).all())
    return _Shown(tokens, padding_attends=False) if exact else "the call has an attention mask"


def _cut(layout: TokenLayout, tokens: int) -> TokenLayout | None:
    """Take `tokens` off a layout's end: text that lies there; None where there isn't so much."""
    if tokens == 0:
        return layout
    if layout.text.start == 0 or tokens > len(layout.text):
        return None
    return TokenLayout(layout.grid, layout.text[: len(layout.text) - tokens], layout.tail)


_HEAD_DIMS = (64, 128)
"""What SpargeAttn's kernels are built for."""


def head_dim_refusal(backend: Backend, plain: UnmaskedCall) -> str | None:
    """Say why a backend can't run a call, not even with its head dimension padded; None where it can."""
    return _padded(backend, plain.q, plain.k, plain.v)[1]


def attend_padded(
    backend: Backend, q: Tensor, k: Tensor, v: Tensor, thresholds: ThresholdTensors, *, scale: float, keep: range
) -> AttentionOutput:
    """Attend as `Backend.attend`, with zeros appended to every head where the backend needs that.

    Zeros change no score and no cosine. The block map's own scores are divided by the root of the head dimension, and q
    is scaled by the root of the padding's factor so that these stay as they were: all is exact but that q is rounded
    once more where this factor is no power of two (it is one from 16 to 64, and isn't from 96 to 128).

    Args:
        backend: one whose refusal of these tensors, padded, is None.
        q: (batch, heads, tokens, head_dim).
        k: see q.
        v: see q.
        thresholds: one value a head.
        scale: softmax scale of the unpadded call.
        keep: key blocks that are computed for every query.
    """
    head_dim = q.shape[-1]
    width, _ = _padded(backend, q, k, v)
    if width == head_dim:
        return backend.attend(q, k, v, thresholds, scale=scale, keep=keep)
    factor = (width / head_dim) ** 0.5
    q, k, v = (F.pad(x, (0, width - head_dim)) for x in (q * factor, k, v))
    attended = backend.attend(q, k, v, thresholds, scale=scale / factor, keep=keep)
    return AttentionOutput(attended.output[..., :head_dim], attended.computed)


def _padded(backend: Backend, q: Tensor, k: Tensor, v: Tensor) -> tuple[int, str | None]:
    """Give the head dimension to run with, and why the backend refuses even that."""
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
