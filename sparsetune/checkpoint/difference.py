"""What sets two policies apart, layer by layer."""

from dataclasses import asdict, dataclass, fields

from sparsetune.attention.policy import Policy
from sparsetune.attention.thresholds import HeadThresholds, LayerThresholds

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
        layers: layers of both whose thresholds differ.
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
    others = {layer.name: layer for layer in second.layers}
    names = {layer.name for layer in first.layers}
    pairs = [(layer, others[layer.name]) for layer in first.layers if layer.name in others]
    return PolicyDifference(
        rules={name: (one, rules[1][name]) for name, one in rules[0].items() if one != rules[1][name]},
        only_first=tuple(layer.name for layer in first.layers if layer.name not in others),
        only_second=tuple(layer.name for layer in second.layers if layer.name not in names),
        layers=tuple(_layer(one, other) for one, other in pairs if one != other),
    )


def _rules(policy: Policy) -> dict[str, object]:
    """Everything that a policy says beside its layers."""
    held = {field.name: getattr(policy, field.name) for field in fields(policy) if field.name != "layers"}
    return asdict(held.pop("schedule")) | held


def _layer(first: LayerThresholds, second: LayerThresholds) -> LayerDifference:
    alike = len(first.heads) == len(second.heads)
    ones, others = (tuple(zip(layer.heads, _orders(layer), strict=True)) for layer in (first, second))
    changed = [one for one, other in zip(ones, others, strict=False) if one != other]
    means = {name: (_mean(first.heads, name), _mean(second.heads, name)) for name in _COLUMNS}
    return LayerDifference(
        name=first.name,
        num_heads=(len(first.heads), len(second.heads)),
        changed_heads=len(changed) if alike else max(len(first.heads), len(second.heads)),
        sparse_heads=(sum(head.is_sparse for head in first.heads), sum(head.is_sparse for head in second.heads)),
        means={name: pair for name, pair in means.items() if pair[0] != pair[1]},
    )


def _orders(layer: LayerThresholds) -> tuple[str | None, ...]:
    return layer.order if isinstance(layer.order, tuple) else (layer.order,) * len(layer.heads)


def _mean(heads: tuple[HeadThresholds, ...], name: str) -> float | None:
    values = [value for head in heads if (value := getattr(head, name)) is not None]
    return sum(values) / len(values) if values else None
