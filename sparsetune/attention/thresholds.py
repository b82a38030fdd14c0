"""SpargeAttn's thresholds for one head and for one layer."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sparsetune.errors import ThresholdError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sparsetune.attention.ordering import TokenOrder

Rule = Literal["cdf", "topk"]

PVTHRESHD_OFF = 50.0
"""SpargeAttn's default `pvthreshd`, in base-2 logits: so high that P·V is practically never skipped."""


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high or math.isinf(value):
        bounds = f"in [{low:g}, {high:g}]" if high != math.inf else f"at least {low:g} and finite"
        raise ThresholdError(f"{name} must be {bounds}, got {value}")


@dataclass(frozen=True)
class HeadThresholds:
    """Thresholds of one attention head, in SpargeAttn's terms.

    Args:
        is_sparse: False runs the head dense, whatever the other values say.
        simthreshd1: in [-1, 1]; a block whose mean pairwise cosine similarity isn't above it is always computed.
        cdfthreshd: in [0, 1]; key blocks are taken until their cumulated probability passes it (rule `cdf`).
        topk: in (0, 1]; that fraction of the key blocks is taken (rule `topk`). Exactly one of the two is given.
        pvthreshd: at least 0, in base-2 logits; P·V is skipped for computed blocks whose scores lie that far
            under the running row maximum. `PVTHRESHD_OFF` skips nothing in practice.

    Raises:
        ThresholdError: a value is outside its range, NaN, or both or neither of cdfthreshd and topk are given.
    """

    simthreshd1: float
    cdfthreshd: float | None = None
    topk: float | None = None
    pvthreshd: float = PVTHRESHD_OFF
    is_sparse: bool = True

    def __post_init__(self) -> None:
        if (self.cdfthreshd is None) == (self.topk is None):
            raise ThresholdError(f"set either cdfthreshd or topk, got {self.cdfthreshd} and {self.topk}")
        _check("simthreshd1", self.simthreshd1, -1.0, 1.0)
        if self.cdfthreshd is not None:
            _check("cdfthreshd", self.cdfthreshd, 0.0, 1.0)
        if self.topk is not None:
            _check("topk", self.topk, 0.0, 1.0)
            if self.topk == 0.0:
                raise ThresholdError("topk must be above 0, got 0.0")
        _check("pvthreshd", self.pvthreshd, 0.0, math.inf)

    @property
    def rule(self) -> Rule:
        """`cdf` or `topk`: how key blocks are chosen."""
        return "cdf" if self.cdfthreshd is not None else "topk"


SPARGE_DEFAULTS = HeadThresholds(simthreshd1=0.6, cdfthreshd=0.98)
"""The defaults of `spas_sage2_attn_meansim_cuda`: what an untuned user of SpargeAttn runs."""


@dataclass(frozen=True)
class LayerThresholds:
    """Thresholds of all heads of one self-attention layer.

    Args:
        name: the attention module's path from the pipeline, e.g. `transformer.transformer_blocks.0.attn1`.
        heads: one entry a head, all with the same rule (one kernel call serves all heads).
        order: the token order in which blocks are cut, one for all heads or one for each; None is the policy's.

    Raises:
        ThresholdError: there are no heads, their rules differ, or there are more or fewer orders than heads.
    """

    name: str
    heads: tuple[HeadThresholds, ...]
    order: "TokenOrder | None" = None

    def __post_init__(self) -> None:
        rules = {head.rule for head in self.heads}
        if len(rules) != 1:
            found = " and ".join(sorted(rules)) or "no heads"
            raise ThresholdError(f"all heads of {self.name} must follow one rule, cdf or topk, got {found}")
        if not isinstance(self.order, str | tuple | None):
            raise ThresholdError(f"the token order of {self.name} must be a name or a tuple, got {self.order!r}")
        if isinstance(self.order, tuple) and len(self.order) != len(self.heads):
            raise ThresholdError(
                f"{self.name} needs one token order, or one for each of its {len(self.heads)} heads, "
                f"got {len(self.order)}"
            )

    @classmethod
    def in_orders(cls, name: str, heads: Sequence[HeadThresholds], orders: Sequence[str]) -> "LayerThresholds":
        """Make a layer whose sparse heads have these token orders; dense ones, which need none, get one of those."""
        needed = [order if head.is_sparse else None for order, head in zip(orders, heads, strict=True)]
        used = list(dict.fromkeys(order for order in needed if order))
        if len(used) > 1:
            return cls(name, tuple(heads), tuple(order or used[0] for order in needed))
        return cls(name, tuple(heads), used[0] if used else None)

    @classmethod
    def uniform(cls, name: str, num_heads: int, head: HeadThresholds) -> "LayerThresholds":
        """Make a layer whose heads all have the same thresholds."""
        return cls(name, (head,) * num_heads)

    @property
    def rule(self) -> Rule:
        """The rule that every head of the layer follows."""
        return self.heads[0].rule

    @property
    def is_sparse(self) -> bool:
        """Whether any head is sparse; a layer without one runs on the pipeline's own dense attention."""
        return any(head.is_sparse for head in self.heads)

    def tensors(
        self, device: "torch.device", drop_scale: float = 1.0, select_partial: bool = False
    ) -> "ThresholdTensors":
        """Return the thresholds as float32 tensors with one value a head.

        `drop_scale` is a factor on the share (of probability, or of blocks) that is left out.
        A dense head gets simthreshd1 2, so that no block counts as similar and every one is computed. (SpargeAttn
        writes 1, which float16 rounding lets blocks of equal tokens pass.)
        """
        import torch

        def column(values: Iterable[float]) -> "Tensor":
            return torch.tensor(tuple(values), dtype=torch.float32, device=device)

        kept = [(head.cdfthreshd if self.rule == "cdf" else head.topk) or 0.0 for head in self.heads]
        # A scale of 1 must keep the thresholds exactly: 1 − (1 − 0.98) isn't 0.98.
        kept = kept if drop_scale == 1.0 else [max(0.0, 1.0 - drop_scale * (1.0 - share)) for share in kept]
        return ThresholdTensors(
            rule=self.rule,
            simthreshd1=column(head.simthreshd1 if head.is_sparse else 2.0 for head in self.heads),
            select=column(share if head.is_sparse else 1.0 for share, head in zip(kept, self.heads, strict=True)),
            pvthreshd=column(head.pvthreshd if head.is_sparse else PVTHRESHD_OFF for head in self.heads),
            select_partial=select_partial,
        )


@dataclass(frozen=True)
class ThresholdTensors:
    """A layer's thresholds as a kernel takes them: float32 tensors of shape (heads,) on one device.

    `select` holds cdfthreshd or topk, as `rule` says; `select_partial` is as in `Policy`.
    """

    rule: Rule
    simthreshd1: "Tensor"
    select: "Tensor"
    pvthreshd: "Tensor"
    select_partial: bool = False
