"""What sets two policies apart, layer by layer."""

from dataclasses import asdict, dataclass, fields

from sparsetune.attention.policy import Policy
from sparsetune.attention.thresholds import HeadThresholds

_COLUMNS = ("simthreshd1", "cdfthreshd", "topk", "pvthreshd")


@dataclass(frozen=True)
class LayerDifference:
    """One layer that both policies have.

    Args:
        name: the attention module's path from the pipeline.
        num_heads: heads of the first and of the second.
        changed_heads: heads whose thresholds or token order differ; all where the numbers of heads do.
        sparse_heads: sparse heads of the first and of the second.
        means: for each threshold that differs, its mean over the heads of the first and of the second; None where a
            side has none.
    """

    name: str
    num_heads: tuple[int, int]
    changed_heads: int
    sparse_heads: tuple[int, int]
    means: dict[str, tuple[float | None, float | None]]


@dataclass(frozen=True)
class PolicyDifference:
    """What differs between two policies; empty throughout where they are the same.

    Args:
        rules: what differs beside the layers (dense steps, order, text rule), as (first, second).
        only_first, only_second: layers that one alone has.
        layers: layers of both whose thresholds or token orders differ.
    """

    rules: dict[str, tuple[object, object]]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    layers: tuple[LayerDifference, ...]

    @property
    def is_empty(self) -> bool:
        """Whether the policies are the same."""
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
    """Everything that a policy says beside its layers."""
    held = {field.name: getattr(policy, field.name) for field in fields(policy) if field.name != "layers"}
    return asdict(held.pop("schedule")) | held


_Heads = list[tuple[HeadThresholds, str]]
"""The thresholds and the token order of each head of a layer."""


def _layers(policy: Policy) -> dict[str, _Heads]:
    return {
        layer.name: list(zip(layer.heads, orders, strict=True))
        for layer, orders in zip(policy.layers, policy.head_orders, strict=True)
    }


def _layer(name: str, first: _Heads, second: _Heads) -> LayerDifference:
    alike = len(first) == len(second)
    changed = [one for one, other in zip(first, second, strict=False) if one != other]
    means = {column: (_mean(first, column), _mean(second, column)) for column in _COLUMNS}
    return LayerDifference(
        name=name,
        num_heads=(len(first), len(second)),
        changed_heads=len(changed) if alike else max(len(first), len(second)),
        sparse_heads=(sum(head.is_sparse for head, _ in first), sum(head.is_sparse for head, _ in second)),
        means={column: pair for column, pair in means.items() if pair[0] != pair[1]},
    )


def _mean(heads: _Heads, column: str) -> float | None:
    values = [value for head, _ in heads if (value := getattr(head, column)) is not None]
    return sum(values) / len(values) if values else None
