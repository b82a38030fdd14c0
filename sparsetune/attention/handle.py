"""Installs a policy on a pipeline, counts what really ran, and takes it off again."""

import logging
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from sparsetune.attention.backends import AttentionOutput, Backend
from sparsetune.attention.blockmap import BlockShape
from sparsetune.attention.breakeven import BreakEvenCheck, BreakEvenTable
from sparsetune.attention.interception import AttentionCall, Interception
from sparsetune.attention.ordering import TokenLayout, permutation
from sparsetune.attention.policy import Policy, check_fits
from sparsetune.attention.sites import AttentionSites
from sparsetune.attention.stats import CallRecord, Kind, SparsityStats
from sparsetune.attention.thresholds import LayerThresholds, ThresholdTensors
from sparsetune.attention.unmask import UnmaskedCall, attend_padded, head_dim_refusal, unmasked_call

logger = logging.getLogger(__name__)

DENSE_KERNEL = "sdpa"
"""How the statistics name the pipeline's own attention."""


class SparseHandle:
    """A policy at work on a pipeline; a context manager that takes it off at its end.

    Args:
        sites: the pipeline's self-attention.
        policy: one entry for each of its layers.
        backend: the kernel for sparse calls.
        break_even: break-evens measured on this machine; layers that are slower sparse then run dense.
        chosen_because: why it is this backend, in a few words; kept for whoever reports it.

    Raises:
        ModelError: the pipeline is sparse already.
        CheckpointError: the policy's layers aren't the pipeline's; the message lists the differences.
    """

    def __init__(
        self,
        sites: AttentionSites,
        policy: Policy,
        backend: Backend,
        break_even: BreakEvenTable | None = None,
        chosen_because: str = "asked for",
    ) -> None:
        self.backend = backend
        self.chosen_because = chosen_because
        self.break_even = break_even
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
        self._tensors: dict[tuple[str, float, torch.device], ThresholdTensors] = {}
        self._gain = None if self.break_even is None else BreakEvenCheck(self.break_even, self.backend.name)

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
            self._count(call, call.q, "dense", None)
            return call.original()
        plain = unmasked_call(call)
        reason = plain if isinstance(plain, str) else head_dim_refusal(self.backend, plain)
        if isinstance(plain, str) or reason is not None:
            self._warn_once(call.layer.name, reason)
            self._count(call, call.q, "fallback", reason)
            return call.original()
        if self._gain is not None and (loss := self._gain.loss(call.layer.name, call.step, plain.q)):
            self._count(call, call.q, "fallback", loss)
            return call.original()
        attended = self._sparse(plain, thresholds, self._policy.schedule.scale(call.step, call.num_steps))
        self._count(call, plain.q, "sparse", None, attended.computed)
        if self._gain is not None:
            num_q, num_k = self.backend.blocks.counts(plain.q.shape[-2], plain.q.shape[-2])
            self._gain.ran(call.layer.name, attended.computed, float(num_q * num_k * plain.q.shape[:2].numel()))
        return plain.whole(attended.output)

    def _runs_dense(self, call: AttentionCall) -> bool:
        return call.step is not None and self._policy.schedule.is_dense(call.step, call.num_steps)

    def _sparse(self, plain: UnmaskedCall, thresholds: LayerThresholds, drop_scale: float) -> AttentionOutput:
        key = (thresholds.name, drop_scale, plain.q.device)
        if key not in self._tensors:
            self._tensors[key] = thresholds.tensors(plain.q.device, drop_scale, self._policy.select_partial)
        keep = kept_blocks(self._policy.keep_text, plain.layout, self.backend.blocks)
        path = permutation(thresholds.order or self._policy.order, plain.layout, plain.q.device)
        q, k, v = (x if path is None else path.order(x) for x in (plain.q, plain.k, plain.v))
        attended = attend_padded(self.backend, q, k, v, self._tensors[key], scale=plain.scale, keep=keep)
        if path is None:
            return attended
        return AttentionOutput(path.undo(attended.output), attended.computed)

    def _warn_once(self, layer: str, reason: str | None) -> None:
        if reason is not None and reason not in self._warned:
            self._warned.add(reason)
            logger.warning("%s runs dense: %s (said once; the result counts such calls)", layer, reason)

    def _count(
        self, call: AttentionCall, q: Tensor, kind: Kind, reason: str | None, computed: Tensor | None = None
    ) -> None:
        num_q, num_k = self.backend.blocks.counts(q.shape[-2], q.shape[-2])
        pairs = float(q.shape[0] * num_q * num_k)
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
