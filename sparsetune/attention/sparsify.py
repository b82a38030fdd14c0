"""Installs a policy on a pipeline, counts what really ran, and takes it off again."""

import logging
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from sparsetune.attention.backends import Attended, Backend
from sparsetune.attention.interception import AttentionCall, Interception, refusal
from sparsetune.attention.ordering import TokenLayout, invert, permutation
from sparsetune.attention.policy import Policy
from sparsetune.attention.sites import AttentionSites
from sparsetune.attention.stats import CallRecord, Kind, SparsityStats
from sparsetune.attention.thresholds import LayerThresholds, ThresholdTensors
from sparsetune.errors import ModelError

logger = logging.getLogger(__name__)

DENSE_KERNEL = "sdpa"
"""How the statistics name the pipeline's own attention."""


class SparseHandle:
    """A policy at work on a pipeline; a context manager that takes it off at its end.

    Args:
        sites: the pipeline's self-attention.
        policy: one entry for each of its layers.
        backend: the kernel for sparse calls.

    Raises:
        ModelError: the pipeline is sparse already, or the policy's layers aren't the pipeline's.
    """

    def __init__(self, sites: AttentionSites, policy: Policy, backend: Backend) -> None:
        self.backend = backend
        self._sites = sites
        self._counts: dict[_CountKey, _Count] = {}
        self._warned: set[str] = set()
        self.policy = policy
        self._interception = Interception(sites, self._attend)

    @property
    def policy(self) -> Policy:
        """The policy at work; set another one to try it without installing anything anew."""
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        _check_layers(self._sites, policy)
        self._policy = policy
        self._thresholds = {layer.name: layer for layer in policy.layers}
        self._tensors: dict[tuple[str, torch.device], ThresholdTensors] = {}

    def stats(self) -> SparsityStats:
        """Tell what ran since the start or the last `reset`."""
        return SparsityStats(tuple(count.record(key) for key, count in self._counts.items()))

    def reset(self) -> None:
        """Forget what ran so far."""
        self._counts.clear()

    def remove(self) -> None:
        """Take the policy off; the pipeline's modules are as they were. Does nothing the second time."""
        self._interception.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _attend(self, call: AttentionCall) -> Tensor:
        thresholds = self._thresholds[call.layer.name]
        reason = refusal(call) or self.backend.refusal(call.q, call.k, call.v)
        if reason is not None or call.transformer is None or call.step is None:
            self._warn_once(call.layer.name, reason)
            self._count(call, "fallback", reason)
            return call.original()
        if not thresholds.is_sparse or self._policy.schedule.is_dense(call.step, call.num_steps):
            self._count(call, "dense", None)
            return call.original()
        attended = self._sparse(call, call.transformer.layout, thresholds)
        self._count(call, "sparse", None, attended.computed)
        return attended.output

    def _sparse(self, call: AttentionCall, layout: TokenLayout, thresholds: LayerThresholds) -> Attended:
        key = (thresholds.name, call.q.device)
        if key not in self._tensors:
            self._tensors[key] = thresholds.tensors(call.q.device)
        keep = self.backend.blocks.covering(layout.text) if self._policy.keep_text else range(0)
        order = permutation(self._policy.order, layout, call.q.device)
        q, k, v = (x if order is None else x[..., order, :] for x in (call.q, call.k, call.v))
        attended = self.backend.attend(q, k, v, self._tensors[key], scale=call.scale, keep=keep)
        if order is None:
            return attended
        return Attended(attended.output[..., invert(order), :], attended.computed)

    def _warn_once(self, layer: str, reason: str | None) -> None:
        if reason is not None and reason not in self._warned:
            self._warned.add(reason)
            logger.warning("%s runs dense: %s (said once; the result counts such calls)", layer, reason)

    def _count(self, call: AttentionCall, kind: Kind, reason: str | None, computed: Tensor | None = None) -> None:
        num_q, num_k = self.backend.blocks.counts(call.q.shape[-2], call.k.shape[-2])
        pairs = float(call.q.shape[0] * num_q * num_k)
        kernel = self.backend.name if kind == "sparse" else DENSE_KERNEL
        key = (call.layer.name, call.step, kind, kernel, reason, call.layer.num_heads)
        if computed is None:
            computed = torch.full((call.layer.num_heads,), pairs, dtype=torch.float64)
        self._counts.setdefault(key, _Count()).add(computed, pairs)


_CountKey = tuple[str, int | None, Kind, str, str | None, int]


class _Count:
    """Calls of one layer, step and kind, added up; the sum stays on the GPU, so counting doesn't wait for it."""

    def __init__(self) -> None:
        self.calls = 0
        self.pairs = 0.0
        self.computed: Tensor | None = None

    def add(self, computed: Tensor, pairs: float) -> None:
        self.calls += 1
        self.pairs += pairs
        self.computed = computed if self.computed is None else self.computed + computed

    def record(self, key: _CountKey) -> CallRecord:
        layer, step, kind, kernel, reason, num_heads = key
        computed = () if self.computed is None else tuple(self.computed.tolist())
        return CallRecord(layer, step, kind, kernel, reason, self.calls, computed, self.pairs, num_heads)


def _check_layers(sites: AttentionSites, policy: Policy) -> None:
    wanted = {layer.name: layer.num_heads for layer in sites.layers}
    given = {layer.name: len(layer.heads) for layer in policy.layers}
    if wanted != given:
        differing = sorted(name for name in wanted | given if wanted.get(name) != given.get(name))
        listed = ", ".join(
            f"{name} ({wanted.get(name, 'no')} heads in the model, {given.get(name, 'none')} in the policy)"
            for name in differing[:4]
        )
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise ModelError(
            f"a policy must have the model's own layers and heads, but differs in {listed}{more}; "
            "use a checkpoint that was tuned for this model"
        )
