"""Sparsity statistics: block pairs computed, by layer, step and head, and calls that fell back to dense."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["sparse", "dense", "fallback", "skipped"]


@dataclass(frozen=True)
class CallRecord:
    """One self-attention call, or several of the same layer, step and kind added up.

    Args:
        layer: the layer's name.
        step: the denoising step, or None outside of the scheduler's list.
        kind: `sparse`, `dense` (by the policy: a dense step or layer), `fallback` (dense), or `skipped` with its block
            by a cache.
        kernel: the kernel that ran, e.g. `reference`, `sparge`, or `sdpa` for the pipeline's own attention.
        reason: why a call fell back.
        calls: number of calls.
        computed: block pairs computed, one number a head, or a single number where only the sum is known.
        pairs: all block pairs of a head.
        num_heads: heads of the layer.
    """

    layer: str
    step: int | None
    kind: Kind
    kernel: str
    reason: str | None
    calls: int
    computed: tuple[float, ...]
    pairs: float
    num_heads: int


@dataclass(frozen=True)
class SparsityStats:
    """Sparsity of one or more generations.

    It is the fraction in [0, 1] of (query block, key block) pairs that were not computed, over all self-attention
    calls that ran, dense ones counted in; higher is sparser. Blocks that a cache skipped aren't in it: `blocks_run`
    and `attention_computed` count them.
    """

    records: tuple[CallRecord, ...]

    @property
    def sparsity(self) -> float:
        """Fraction of block pairs not computed, over all calls; 0 where there were none."""
        return _sparsity(self._ran)

    @property
    def blocks_run(self) -> float:
        """Fraction of the blocks' forwards that ran, each counted by its self-attention; 1 without a cache."""
        return _blocks_run(self.records)

    @property
    def blocks_run_by_step(self) -> tuple[float, ...]:
        """`blocks_run` of each denoising step."""
        return tuple(_blocks_run(records) for records in self._by_step())

    @property
    def attention_computed(self) -> float:
        """Fraction of a dense generation's block pairs that were computed: neither left out nor in a skipped block."""
        return 1.0 - _sparsity(self.records)

    @property
    def sparsity_active(self) -> float:
        """The same over the sparse calls only."""
        return _sparsity(record for record in self.records if record.kind == "sparse")

    @property
    def theoretical_speedup(self) -> float:
        """1 / (1 − sparsity): how much faster attention would be if its time were its block pairs."""
        return 1.0 / max(1.0 - self.sparsity, 1e-9)

    @property
    def by_layer(self) -> dict[str, float]:
        """Sparsity of each layer, over all steps."""
        return {layer: _sparsity(records) for layer, records in self._by_layer(self._ran).items()}

    @property
    def by_step(self) -> tuple[float, ...]:
        """Fraction of block pairs not computed at each denoising step, over all layers, skipped blocks counted in."""
        return tuple(_sparsity(records) for records in self._by_step())

    @property
    def by_layer_and_step(self) -> dict[str, tuple[float, ...]]:
        """Fraction of block pairs not computed of each layer at each denoising step; 1 where its block was skipped."""
        return {layer: SparsityStats(records).by_step for layer, records in self._by_layer(self.records).items()}

    @property
    def by_head(self) -> dict[str, tuple[float, ...]]:
        """Sparsity of each head of each layer; layers whose kernel only counts the sum over heads are left out."""
        heads: dict[str, tuple[float, ...]] = {}
        for layer, records in self._by_layer(self._ran).items():
            if all(len(record.computed) == record.num_heads for record in records):
                pairs = sum(record.pairs for record in records)
                computed = [sum(column) for column in zip(*(record.computed for record in records), strict=True)]
                heads[layer] = tuple(1.0 - count / pairs for count in computed)
        return heads

    @property
    def kernels(self) -> dict[str, str]:
        """The kernel that ran each layer's sparse calls; `sdpa` for a layer without any."""
        return {
            layer: next((record.kernel for record in records if record.kind == "sparse"), "sdpa")
            for layer, records in self._by_layer(self.records).items()
        }

    @property
    def fallbacks(self) -> dict[str, int]:
        """Number of calls that fell back to dense, by reason."""
        counted: Counter[str] = Counter()
        for record in self.records:
            if record.reason is not None:
                counted[record.reason] += record.calls
        return dict(counted)

    @property
    def num_calls(self) -> dict[str, int]:
        """Number of `sparse`, `dense` and `fallback` calls, and of `skipped` ones where there was a cache."""
        counted: Counter[str] = Counter({"sparse": 0, "dense": 0, "fallback": 0})
        for record in self.records:
            counted[record.kind] += record.calls
        return dict(counted)

    def merged(self, others: Iterable["SparsityStats"]) -> "SparsityStats":
        """Pool the calls of several generations, e.g. of all prompts."""
        return SparsityStats(self.records + tuple(record for other in others for record in other.records))

    def to_dict(self) -> Mapping[str, Any]:
        """Return the figures as JSON values."""
        return {
            "overall": self.sparsity,
            "active": self.sparsity_active,
            "theoretical_speedup": self.theoretical_speedup,
            "blocks_run": self.blocks_run,
            "attention_computed": self.attention_computed,
            "by_layer": self.by_layer,
            "by_step": list(self.by_step),
            "by_layer_and_step": {layer: list(row) for layer, row in self.by_layer_and_step.items()},
            "by_head": {layer: list(row) for layer, row in self.by_head.items()},
            "kernels": self.kernels,
            "num_calls": self.num_calls,
            "fallbacks": self.fallbacks,
        }

    @property
    def _ran(self) -> tuple[CallRecord, ...]:
        return tuple(record for record in self.records if record.kind != "skipped")

    @staticmethod
    def _by_layer(records: Iterable[CallRecord]) -> dict[str, tuple[CallRecord, ...]]:
        layers: dict[str, tuple[CallRecord, ...]] = {}
        for record in records:
            layers[record.layer] = (*layers.get(record.layer, ()), record)
        return layers

    def _by_step(self) -> list[list[CallRecord]]:
        steps = sorted({record.step for record in self.records if record.step is not None})
        return [[record for record in self.records if record.step == step] for step in steps]


def _blocks_run(records: Iterable[CallRecord]) -> float:
    calls = {"skipped": 0, "ran": 0}
    for record in records:
        calls["skipped" if record.kind == "skipped" else "ran"] += record.calls
    return calls["ran"] / (sum(calls.values()) or 1) if calls["skipped"] else 1.0


def _sparsity(records: Iterable[CallRecord]) -> float:
    computed = pairs = 0.0
    for record in records:
        computed += sum(record.computed)
        pairs += record.pairs * record.num_heads
    return 1.0 - computed / pairs if pairs else 0.0
