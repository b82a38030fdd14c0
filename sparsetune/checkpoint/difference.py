"""The difference of two policies, and the summary of one, layer by layer."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

from sparsetune.attention.policy import Policy
from sparsetune.attention.thresholds import HeadThresholds, Rule
from sparsetune.checkpoint.manifest import Checkpoint

_COLUMNS = ("simthreshd1", "cdfthreshd", "topk", "pvthreshd")


@dataclass(frozen=True)
class LayerDifference:
    """One layer that both policies have; pairs are of the first and the second.

    Args:
        name: the attention module's path from the pipeline.
        num_heads, sparse_heads: heads of the layer, and how many of them are sparse.
        changed_heads: heads whose thresholds or token order differ; all where the numbers of heads do.
        means: the mean of each differing threshold over all heads; None where a side has none.
    """

    name: str
    num_heads: tuple[int, int]
    changed_heads: int
    sparse_heads: tuple[int, int]
    means: dict[str, tuple[float | None, float | None]]


@dataclass(frozen=True)
class PolicyDifference:
    """Everything that differs between two policies.

    Args:
        rules: differing rules (dense steps, order, text rule) of the first and the second.
        only_first, only_second: layers of only one of them.
        layers: common layers whose thresholds or token orders differ.
    """

    rules: dict[str, tuple[object, object]]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    layers: tuple[LayerDifference, ...]

    @property
    def is_empty(self) -> bool:
        """Whether the policies are equal."""
        return not (self.rules or self.only_first or self.only_second or self.layers)


def difference(first: Policy, second: Policy) -> PolicyDifference:
    """Compare two policies; layers are paired by their whole names."""
    rules = _rules(first), _rules(second)
    ones, others = _layers(first), _layers(second)
    pairs = [(name, ones[name], others[name]) for name in ones if name in others]
    return PolicyDifference(
        rules={name: (one, rules[1][name]) for name, one in rules[0].items() if one != rules[1][name]},
        only_first=tuple(name for name in ones if name not in others),
        only_second=tuple(name for name in others if name not in ones),
        layers=tuple(_layer(name, one, other) for name, one, other in pairs if one != other),
    )


def _rules(policy: Policy) -> dict[str, object]:
    held = {field.name: getattr(policy, field.name) for field in fields(policy) if field.name != "layers"}
    cache = None if policy.cache is None else asdict(policy.cache)
    return asdict(held.pop("schedule")) | held | {"cache": cache}


_Heads = list[tuple[HeadThresholds, str]]  # thresholds and token order of each head of a layer


def _layers(policy: Policy) -> dict[str, _Heads]:
    return {
        layer.name: list(zip(layer.heads, orders, strict=True))
        for layer, orders in zip(policy.layers, policy.head_orders, strict=True)
    }


def _layer(name: str, first: _Heads, second: _Heads) -> LayerDifference:
    changed = sum(one != other for one, other in zip(first, second, strict=False))
    heads = [[head for head, _ in of_layer] for of_layer in (first, second)]
    means = {column: (_mean(heads[0], column), _mean(heads[1], column)) for column in _COLUMNS}
    return LayerDifference(
        name=name,
        num_heads=(len(first), len(second)),
        changed_heads=changed if len(first) == len(second) else max(len(first), len(second)),
        sparse_heads=(sum(head.is_sparse for head, _ in first), sum(head.is_sparse for head, _ in second)),
        means={column: pair for column, pair in means.items() if pair[0] != pair[1]},
    )


@dataclass(frozen=True)
class LayerSummary:
    """One layer's mean thresholds, over its sparse heads; None where it has none.

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
    """Summarize each layer of a checkpoint or policy, in the policy's order."""
    policy = checkpoint.policy if isinstance(checkpoint, Checkpoint) else checkpoint
    sparse = [[head for head in layer.heads if head.is_sparse] for layer in policy.layers]
    return tuple(
        LayerSummary(
            name=layer.name,
            rule=layer.rule,
            num_heads=len(layer.heads),
            sparse_heads=len(heads),
            orders=orders,
            **{column: _mean(heads, column) for column in _COLUMNS},
        )
        for layer, heads, orders in zip(policy.layers, sparse, policy.sparse_orders, strict=True)
    )


def _mean(heads: Iterable[HeadThresholds], column: str) -> float | None:
    values = [value for head in heads if (value := getattr(head, column)) is not None]
    return sum(values) / len(values) if values else None
