"""What a checkpoint holds, layer by layer."""

from collections.abc import Sequence
from dataclasses import dataclass

from sparsetune.attention.policy import Policy
from sparsetune.attention.thresholds import Rule
from sparsetune.checkpoint.checkpoint import Checkpoint


@dataclass(frozen=True)
class LayerSummary:
    """One layer's thresholds in brief; means are over its sparse heads, None where it has none.

    Args:
        name: the attention module's path from the pipeline.
        rule: `cdf` or `topk`; the mean of the other rule's threshold is None.
        num_heads, sparse_heads: heads of the layer, and how many of them are sparse.
        simthreshd1, cdfthreshd, topk, pvthreshd: mean thresholds.
        orders: token orders of its sparse heads, sorted.
    """

    name: str
    rule: Rule
    num_heads: int
    sparse_heads: int
    simthreshd1: float | None
    cdfthreshd: float | None
    topk: float | None
    pvthreshd: float | None
    orders: tuple[str, ...]


def summarize(checkpoint: Checkpoint | Policy) -> tuple[LayerSummary, ...]:
    """Sum up each layer of a checkpoint or policy, in the policy's order."""
    policy = checkpoint.policy if isinstance(checkpoint, Checkpoint) else checkpoint
    rows = []
    for layer, orders in zip(policy.layers, policy.sparse_orders, strict=True):
        sparse = [head for head in layer.heads if head.is_sparse]
        rows.append(
            LayerSummary(
                name=layer.name,
                rule=layer.rule,
                num_heads=len(layer.heads),
                sparse_heads=len(sparse),
                simthreshd1=_mean([head.simthreshd1 for head in sparse]),
                cdfthreshd=_mean([head.cdfthreshd for head in sparse if head.cdfthreshd is not None]),
                topk=_mean([head.topk for head in sparse if head.topk is not None]),
                pvthreshd=_mean([head.pvthreshd for head in sparse]),
                orders=orders,
            )
        )
    return tuple(rows)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
