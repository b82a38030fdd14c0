"""Installs a policy on a pipeline, counts what really ran, and takes it off again."""

import logging
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from sparsetune.attention.backends import Attended, Backend
from sparsetune.attention.blockmap import BlockShape
from sparsetune.attention.fit import check_fits
from sparsetune.attention.interception import AttentionCall, Interception, refusal
from sparsetune.attention.ordering import TokenLayout, permutation
from sparsetune.attention.policy import Policy
from sparsetune.attention.sites import AttentionSites
from sparsetune.attention.stats import CallRecord, Kind, SparsityStats
from sparsetune.attention.thresholds import LayerThresholds, ThresholdTensors

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
        ModelError: the pipeline is sparse already.
        CheckpointError: the policy's layers aren't the pipeline's; the message lists the differences.
    """

    def __init__(self, sites: AttentionSites, policy: Policy, backend: Backend) -> None:
        self.backend = backend
        self._sites = sites
        self._warned: set[str] = set()
        self.policy = policy
        self._interception = Interception(sites, self._attend)

    @property
    def policy(self) -> Policy:
        """The policy at work; set another one to try it without installing anything anew. Counting starts anew."""
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        check_fits(policy, [(layer.name, layer.num_heads) for layer in self._sites.layers])
        self._policy = policy
        self._counts: dict[_CountKey, _Count] = {}
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
        if not thresholds.is_sparse or self._runs_dense(call):
            self._count(call, "dense", None)
            return call.original()
        reason = refusal(call) or self.backend.refusal(call.q, call.k, call.v)
        if reason is not None or call.transformer is None:
            self._warn_once(call.layer.name, reason)
            self._count(call, "fallback", reason)
            return call.original()
        attended = self._sparse(call, call.transformer.layout, thresholds)
        self._count(call, "sparse", None, attended.computed)
        return attended.output

    def _runs_dense(self, call: AttentionCall) -> bool:
        return call.step is not None and self._policy.schedule.is_dense(call.step, call.num_steps)

    def _sparse(self, call: AttentionCall, layout: TokenLayout, thresholds: LayerThresholds) -> Attended:
        key = (thresholds.name, call.q.device)
        if key not in self._tensors:
            self._tensors[key] = thresholds.tensors(call.q.device)
        keep = kept_blocks(self._policy.keep_text, layout, self.backend.blocks)
        order = permutation(self._policy.order, layout, call.q.device)
        q, k, v = (x if order is None else x[..., order.there, :] for x in (call.q, call.k, call.v))
        attended = self.backend.attend(q, k, v, self._tensors[key], scale=call.scale, keep=keep)
        if order is None:
            return attended
        return Attended(attended.output[..., order.back, :], attended.computed)

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


def kept_blocks(keep_text: bool, layout: TokenLayout, blocks: BlockShape) -> range:
    """Give the key blocks that a policy always computes.

    Those with text tokens, or else the first one, as SpargeAttn does whenever it renders (`attention_sink`).
    """
    return blocks.covering(layout.text) if keep_text and layout.text else range(1)
