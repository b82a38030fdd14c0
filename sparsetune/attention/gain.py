"""Whether a layer's sparse calls pay, told by what they skipped at an earlier step."""

import torch
from torch import Tensor

from sparsetune.attention.breakeven import BreakEvenTable

_LOOK_AGAIN = 5
"""A layer that ran dense runs sparse again after so many steps: attention gets sparser as noise goes."""


class GainWatch:
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
            computed: block pairs computed by head, as in `Attended`.
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
