"""Break-even sparsity, from which on a sparse kernel is faster than dense attention, by measured latencies."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from sparsetune.documents import read_json, read_text
from sparsetune.errors import BackendError
from sparsetune.files import write_json

# A measured shape stands for others with up to this many times its tokens, or as many times fewer.
_MAX_TOKEN_RATIO = 1.5

# A layer that ran dense runs sparse again after so many steps: attention gets sparser as noise decreases.
_RECHECK_STEPS = 5

Milliseconds = float  # median of at least 10 calls after warm-up


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SparseTime(_Model):
    """A sparse kernel's latency at one sparsity; `sparsity` is a fraction in [0, 1] of the block pairs."""

    kernel: str
    rule: str
    sparsity: float = Field(ge=0.0, le=1.0)
    latency_ms: Milliseconds = Field(gt=0.0)


class ShapeTimes(_Model):
    """Latencies of one shape of attention call."""

    batch: int
    heads: int
    tokens: int
    head_dim: int
    dtype: str
    dense_ms: dict[str, Milliseconds]  # by kernel; `sdpa` is PyTorch's own choice, which dense layers run on
    sparse: tuple[SparseTime, ...]

    def break_even(self, kernel: str) -> float | None:
        """Return the sparsity from which on `kernel` is at least as fast as dense; None where it never is.

        Points of both rules count, since a kernel's time depends only on the blocks that it computes.
        """
        points = [(time.sparsity, time.latency_ms) for time in self.sparse if time.kernel == kernel]
        return crossing(points, self.dense_ms["sdpa"])

    @property
    def kernels(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(time.kernel for time in self.sparse))


class BreakEvenTable(_Model):
    """Latencies measured on one machine, with the versions of the packages that they depend on."""

    schema_version: Literal[1] = 1
    device: str
    versions: dict[str, str]
    shapes: tuple[ShapeTimes, ...]

    def limit(self, kernel: str, shape: Sequence[int], dtype: str) -> float | None:
        """Return the sparsity below which dense is faster, by the measured shape nearest in size.

        It is above 1 where sparse is never faster, None where no shape similar to (batch, heads, tokens, head_dim) was
        measured.
        """
        batch, heads, tokens, head_dim = shape
        similar = [
            times
            for times in self.shapes
            if (times.head_dim, times.dtype) == (head_dim, dtype)
            and kernel in times.kernels
            and max(times.tokens, tokens) <= _MAX_TOKEN_RATIO * min(times.tokens, tokens)
        ]
        if not similar:
            return None
        size = batch * heads * tokens
        nearest = min(similar, key=lambda times: abs(times.batch * times.heads * times.tokens - size))
        found = nearest.break_even(kernel)
        return 2.0 if found is None else found


def crossing(points: Sequence[tuple[float, Milliseconds]], dense_ms: Milliseconds) -> float | None:
    """Find the sparsity from which on every latency is at most `dense_ms`, interpolating linearly between points.

    The points are (sparsity, latency) in any order. 0 where all are as fast; None where there is none, or the sparsest
    isn't.
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
    write_json(path, table.model_dump(mode="json"))


def load_table(path: Path, device: str) -> BreakEvenTable:
    """Read a table; BackendError where there is none, it can't be read, or it wasn't measured on `device`."""
    remedy = "run `sparsetune bench` here"
    try:
        table = BreakEvenTable.model_validate(read_json(read_text(path)))
    except OSError as error:
        raise BackendError(f"cannot read the break-even table {path}: {error.strerror or error}; {remedy}") from error
    except (ValidationError, ValueError) as error:
        line = " ".join(str(error).split())[:160]
        raise BackendError(f"{path} is no break-even table: {line}; {remedy}") from error
    if table.device != device:
        raise BackendError(f"{path} was measured on {table.device}, not on this machine's {device}; {remedy}")
    return table


class BreakEvenCheck:
    """Tracks each layer's sparsity, and decides which layers run dense because sparse would be slower.

    A layer runs sparse at its first step. Where that skipped less than the break-even of its shape, its next steps run
    dense. The counts of a whole step are copied from the GPU at once at the start of the next, when it is idle: so
    nothing waits in between, and the same inputs give the same decisions.
    """

    def __init__(self, table: BreakEvenTable, kernel: str) -> None:
        self._table = table
        self._kernel = kernel
        self._step = -1
        self._counts: dict[str, tuple[Tensor, float]] = {}
        self._sparsity: dict[str, tuple[int, float]] = {}

    def reason_to_run_dense(self, layer: str, step: int | None, q: Tensor) -> str | None:
        """Return in a few words why a call should run dense; None where it may run sparse.

        A step smaller than before starts a new generation; an unknown one (None) never runs dense.
        """
        if step is not None and step != self._step:
            self._begin_step(step)
        if step is None or layer not in self._sparsity:
            return None
        measured_at, sparsity = self._sparsity[layer]
        if step - measured_at > _RECHECK_STEPS:
            return None
        limit = self._table.limit(self._kernel, q.shape, dtype_name(q.dtype))
        if limit is None or sparsity >= limit:
            return None
        return f"sparse is slower under a sparsity of {limit:.0%} here" if limit <= 1 else "sparse is never faster here"

    def record(self, layer: str, computed: Tensor, pairs: float) -> None:
        """Record the block pairs that a sparse call computed, by head, of `pairs` over all heads."""
        if layer in self._counts:
            before, total = self._counts[layer]
            computed, pairs = before + computed, total + pairs
        self._counts[layer] = computed, pairs

    def _begin_step(self, step: int) -> None:
        if step < self._step:
            self._sparsity.clear()
        elif self._counts:
            counts = torch.stack([computed.sum() for computed, _ in self._counts.values()]).tolist()
            for (layer, (_, pairs)), computed in zip(self._counts.items(), counts, strict=True):
                self._sparsity[layer] = (self._step, 1.0 - computed / pairs)
        self._counts.clear()
        self._step = step


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
