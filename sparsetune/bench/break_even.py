"""Break-even table: from which sparsity on each kernel is faster than dense, for the shapes of a model's calls."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparsetune.attention.backends import Backend, backend_choice, missing_backends
from sparsetune.attention.breakeven import BreakEvenTable, ShapeTimes
from sparsetune.attention.device import device_name
from sparsetune.attention.ordering import TokenLayout
from sparsetune.bench.latency import time_shape, video_like
from sparsetune.bench.step import CallShape
from sparsetune.checkpoint.manifest import versions

_DEPENDS_ON = ("torch", "triton", "spas-sage-attn")


def backends_to_time(name: str, device: torch.device) -> tuple[Backend, ...]:
    """Return the sparse backends that `bench` compares.

    Args:
        name: one backend, or `auto`: on a GPU every kernel that runs there, elsewhere the plain PyTorch reference.
        device: where the model computes.

    Raises:
        BackendError: the backend can't run here.
    """
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
    seed: int = 0,
    on_shape: Callable[[ShapeTimes], None] = lambda times: None,
    on_time: Callable[[str, float], None] = lambda name, milliseconds: None,
) -> BreakEvenTable:
    """Time shapes of attention calls on random q, k and v (see `video_like`).

    Args:
        shapes: those of a model's step.
        backends: sparse kernels.
        device: where to measure.
        repeats: timings of which each median is taken.
        seed: of q, k and v.
        on_shape: called with the times of each shape.
        on_time: called with each kernel's name and median milliseconds.
    """
    table = []
    for shape in shapes:
        q, k, v = _inputs(shape, device, seed)
        times = time_shape(q, k, v, backends, repeats=repeats, on_time=on_time)
        table.append(times)
        on_shape(times)
    installed = versions()
    used = {name: installed[name] for name in _DEPENDS_ON if name in installed}
    return BreakEvenTable(device=device_name(device), versions=used, shapes=tuple(table))


def _inputs(shape: CallShape, device: torch.device, seed: int) -> tuple[Tensor, ...]:
    batch, heads, tokens, head_dim = shape.shape
    layout = shape.layout
    if layout.tail:  # tokens beyond the video's grid: one row has them all
        layout = TokenLayout((1, 1, tokens - len(layout.text)), layout.text)
    drawn = video_like(layout, heads=heads, head_dim=head_dim, batch=batch, seed=seed)
    return tuple(tensor.to(device, shape.dtype) for tensor in drawn)
