"""Times the denoising of a rendering: the calls of its transformers, without the text's encoding and the decoding."""

import time
from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import nn

_Mark = torch.cuda.Event | float


class DenoisingClock:
    """A context manager that marks when each transformer call begins and ends; nothing waits for a GPU meanwhile.

    A call begins at its first submodule, when offloaded weights are on the GPU.
    Read the figures after the rendering, when the GPU's work is done.
    """

    def __init__(self, transformers: Iterable[nn.Module], device: torch.device) -> None:
        self._transformers = tuple(transformers)
        self._device = device
        self._begins: list[_Mark] = []
        self._ends: list[_Mark] = []
        self._is_outside = False  # whether a call has begun, but none of its submodules yet

    def __enter__(self) -> Self:
        self._hooks = [module.register_forward_pre_hook(self._begin) for module in self._transformers]
        self._hooks += [
            child.register_forward_pre_hook(self._begin_inside)
            for module in self._transformers
            for child in module.children()
        ]
        self._hooks += [module.register_forward_hook(self._end) for module in self._transformers]
        return self

    def __exit__(self, *_error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def seconds(self) -> float | None:
        """From the first call's begin to the last one's end; None without calls."""
        return _between(self._begins[0], self._ends[-1]) if self._ends else None

    def step_seconds(self, num_steps: int) -> float | None:
        """Return the mean of a step, of `num_steps`, after the first, which warms up; None without further ones."""
        per_step = len(self._ends) // num_steps
        if num_steps < 2 or not per_step:
            return None
        return _between(self._ends[per_step - 1], self._ends[-1]) / (num_steps - 1)

    def _begin(self, *_call: Any) -> None:
        self._begins.append(self._mark())
        self._is_outside = True

    def _begin_inside(self, *_call: Any) -> None:
        if self._is_outside:
            self._begins[-1], self._is_outside = self._mark(), False

    def _end(self, *_call: Any) -> None:
        self._ends.append(self._mark())

    def _mark(self) -> _Mark:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event


def _between(first: _Mark, last: _Mark) -> float:
    if isinstance(first, float) or isinstance(last, float):
        return float(last) - float(first)  # type: ignore[arg-type]
    last.synchronize()
    milliseconds: float = first.elapsed_time(last)
    return milliseconds / 1e3
