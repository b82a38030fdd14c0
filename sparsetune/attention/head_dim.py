"""Head dimensions that a kernel doesn't have, run as the next that it has."""

import torch.nn.functional as F
from torch import Tensor

from sparsetune.attention.backends import Attended, Backend
from sparsetune.attention.plain import PlainCall
from sparsetune.attention.thresholds import ThresholdTensors

_HEAD_DIMS = (64, 128)
"""What SpargeAttn's kernels are built for."""


def head_dim_refusal(backend: Backend, plain: PlainCall) -> str | None:
    """Say why a backend can't run a call, not even with its head dimension padded; None where it can."""
    return _padded(backend, plain.q, plain.k, plain.v)[1]


def attend_padded(
    backend: Backend, q: Tensor, k: Tensor, v: Tensor, thresholds: ThresholdTensors, *, scale: float, keep: range
) -> Attended:
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
    return Attended(attended.output[..., :head_dim], attended.computed)


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
