"""From which sparsity on a sparse kernel is faster than dense attention: a table of measured latencies."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from sparsetune.errors import BackendError
from sparsetune.files import write_json

_NEAR = 1.5
"""A shape with up to so many times the tokens of a measured one, or as many times fewer, goes by it."""

Milliseconds = float
"""Median of at least 10 calls after warm-up."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SparseTime(_Part):
    """A sparse kernel's latency at one sparsity; `sparsity` is a fraction in [0, 1] of the block pairs."""

    kernel: str
    rule: str
    sparsity: float = Field(ge=0.0, le=1.0)
    latency_ms: Milliseconds = Field(gt=0.0)


class ShapeTimes(_Part):
    """What was measured for one shape of attention call.

    `dense_ms` holds each dense kernel's latency by name; `sdpa` is what PyTorch chooses by itself, and so what runs
    where a layer is dense.
    """

    batch: int
    heads: int
    tokens: int
    head_dim: int
    dtype: str
    dense_ms: dict[str, Milliseconds]
    sparse: tuple[SparseTime, ...]

    def break_even(self, kernel: str) -> float | None:
        """Give the sparsity from which on `kernel` is at least as fast as dense; None where it never is.

        Both rules count, since the time of a kernel is that of the blocks which it computes.
        """
        points = [(time.sparsity, time.latency_ms) for time in self.sparse if time.kernel == kernel]
        return crossing(points, self.dense_ms["sdpa"])

    @property
    def kernels(self) -> tuple[str, ...]:
        """The sparse kernels that were measured."""
        return tuple(dict.fromkeys(time.kernel for time in self.sparse))


class BreakEvenTable(_Part):
    """Measured shapes of one machine.

    `device` is its GPU by name; `versions` are those of the packages that the latencies depend on.
    """

    schema_version: Literal[1] = 1
    device: str
    versions: dict[str, str]
    shapes: tuple[ShapeTimes, ...]

    def limit(self, kernel: str, shape: Sequence[int], dtype: str) -> float | None:
        """Give the sparsity under which a call had better run dense.

        The measured shape of that head_dim and dtype which is nearest in size decides.

        Args:
            kernel: the sparse kernel.
            shape: (batch, heads, tokens, head_dim).
            dtype: e.g. `bfloat16`.

        Returns:
            A fraction in [0, 1]; above 1 where sparse never pays; None where nothing alike was measured.
        """
        batch, heads, tokens, head_dim = shape
        alike = [
            times
            for times in self.shapes
            if (times.head_dim, times.dtype) == (head_dim, dtype)
            and kernel in times.kernels
            and max(times.tokens, tokens) <= _NEAR * min(times.tokens, tokens)
        ]
        if not alike:
            return None
        size = batch * heads * tokens
        nearest = min(alike, key=lambda times: abs(times.batch * times.heads * times.tokens - size))
        found = nearest.break_even(kernel)
        return 2.0 if found is None else found


def crossing(points: Sequence[tuple[float, Milliseconds]], dense_ms: Milliseconds) -> float | None:
    """Find the sparsity from which on every measured latency is at most `dense_ms`.

    Between points latency is taken to be linear.

    Args:
        points: (sparsity, latency), in any order.
        dense_ms: latency of dense attention.

    Returns:
        A fraction in [0, 1]; 0 where all points are as fast; None where the sparsest isn't, or there is none.
    """
    ordered = sorted(points)
    slow = [index for index, (_, latency) in enumerate(ordered) if latency > dense_ms]
    if not ordered or (slow and slow[-1] == len(ordered) - 1):
        return None
    if not slow:
        return 0.0
    (low, above), (high, below) = ordered[slow[-1]], ordered[slow[-1] + 1]
    return low + (high - low) * (above - dense_ms) / (above - below)


def save_table(table: BreakEvenTable, path: Path) -> None:
    """Write a table as JSON, whole or not at all."""
    write_json(path, table.model_dump(mode="json"))


def load_table(path: Path, device: str) -> BreakEvenTable:
    """Read a table that was measured on `device`.

    Raises:
        BackendError: there is none, it can't be read, or it is of another device.
    """
    remedy = "run `sparsetune bench` here"
    try:
        table = BreakEvenTable.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise BackendError(
            f"the break-even table must be a readable file, but {path}: {error.strerror or error}; {remedy}"
        ) from error
    except (ValidationError, ValueError) as error:
        line = " ".join(str(error).split())[:160]
        raise BackendError(
            f"the break-even table must be what `sparsetune bench` wrote, but {path}: {line}; {remedy}"
        ) from error
    if table.device != device:
        raise BackendError(
            f"the break-even table must be of this machine's {device}, but {path} is of {table.device}; {remedy}"
        )
    return table


_LOOK_AGAIN = 5
"""A layer that ran dense runs sparse again after so many steps: attention gets sparser as noise goes."""


class BreakEvenCheck:
    """Remembers each layer's sparsity, and says which layers had better run dense.

    A layer runs sparse at its first step. Where that skipped less than the break-even of its shape, its next steps run
    dense. The counts of a whole step are read off the GPU in one go at the start of the next, when it has nothing else
    to do: so nothing waits in between, and the same inputs give the same decisions.

    Args:
        table: break-evens of this machine.
        kernel: the backend that runs sparse calls, by name.
    """

    def __init__(self, table: BreakEvenTable, kernel: str) -> None:
        self._table = table
        self._kernel = kernel
        self._step = -1
        self._ran: dict[str, tuple[Tensor, float]] = {}
        self._known: dict[str, tuple[int, float]] = {}

    def loss(self, layer: str, step: int | None, q: Tensor) -> str | None:
        """Say in a few words why a call had better run dense; None where it may run sparse.

        Args:
            layer: the layer's name.
            step: the denoising step; a smaller one than before starts a new generation; None says nothing.
            q: the call's queries, (batch, heads, tokens, head_dim).
        """
        if step is not None and step != self._step:
            self._begin(step)
        if step is None or layer not in self._known:
            return None
        seen, sparsity = self._known[layer]
        if step - seen > _LOOK_AGAIN:
            return None
        limit = self._table.limit(self._kernel, q.shape, dtype_name(q.dtype))
        if limit is None or sparsity >= limit:
            return None
        return f"sparse is slower under a sparsity of {limit:.0%} here" if limit <= 1 else "sparse is never faster here"

    def ran(self, layer: str, computed: Tensor, pairs: float) -> None:
        """Note a sparse call.

        Args:
            layer: the layer's name.
            computed: block pairs computed by head, as in `AttentionOutput`.
            pairs: block pairs that there are, over all heads.
        """
        before, total = self._ran.get(layer, (torch.zeros((), dtype=torch.float64, device=computed.device), 0.0))
        self._ran[layer] = (before + computed.sum(), total + pairs)

    def _begin(self, step: int) -> None:
        if step < self._step:
            self._known.clear()
        elif self._ran:
            counts = torch.stack([computed for computed, _ in self._ran.values()]).tolist()
            for (layer, (_, pairs)), computed in zip(self._ran.items(), counts, strict=True):
                self._known[layer] = (self._step, 1.0 - computed / pairs)
        self._ran.clear()
        self._step = step


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype without its package, e.g. `bfloat16`."""
    return str(dtype).removeprefix("torch.")
