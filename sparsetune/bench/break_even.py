"""Break-even table: from which sparsity on each kernel is faster than dense, for the shapes of a model's calls."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparsetune.attention.backends import Backend, backend_choice, missing_backends
from sparsetune.attention.breakeven import BreakEvenTable
from sparsetune.attention.device import device_name
from sparsetune.attention.ordering import TokenLayout
from sparsetune.bench.latency import time_shape, video_like
from sparsetune.bench.step import CallShape
from sparsetune.checkpoint.manifest import versions

_DEPENDS_ON = ("torch", "triton", "spas-sage-attn")


def backends_to_time(name: str, device: torch.device) -> tuple[Backend, ...]:
    """Return the named backend; for `auto` every kernel that runs on the device, else the plain PyTorch reference."""
    if name != "auto":
        return (backend_choice(name, device).backend,)
    missing = missing_backends(device)
    kernels = [other for other in ("sparge", "flex") if missing[other] is None]
    return tuple(backend_choice(other, device).backend for other in kernels or ["reference"])


def time_table(
    shapes: Sequence[CallShape],
    backends: Sequence[Backend],
    device: torch.device,
    *,
    repeats: int = 10,
    on_time: Callable[[str, float], None] = lambda name, milliseconds: None,
) -> BreakEvenTable:
    """Time shapes of attention calls on random q, k and v (see `time_shape` and `video_like`)."""
    table = [time_shape(*_inputs(shape, device), backends, repeats=repeats, on_time=on_time) for shape in shapes]
    installed = versions()
    used = {name: installed[name] for name in _DEPENDS_ON if name in installed}
    return BreakEvenTable(device=device_name(device), versions=used, shapes=tuple(table))


def _inputs(shape: CallShape, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, tokens, head_dim = shape.shape
    layout = shape.layout
    if layout.tail:  # tokens beyond the video's grid: one row has them all
        layout = TokenLayout((1, 1, tokens - len(layout.text)), layout.text)
    q, k, v = video_like(layout, heads=heads, head_dim=head_dim, batch=batch)
    return q.to(device, shape.dtype), k.to(device, shape.dtype), v.to(device, shape.dtype)
