"""Installs a policy on a pipeline, counts what really ran, and removes it again."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from sparsetune.attention.backends import AttentionOutput, Backend
from sparsetune.attention.blockmap import BlockShape
from sparsetune.attention.breakeven import BreakEvenCheck, BreakEvenTable
from sparsetune.attention.interception import AttentionCall, Interception
from sparsetune.attention.ordering import TokenLayout, permutation
from sparsetune.attention.policy import Policy, check_fits
from sparsetune.attention.sites import AttentionSites, TransformerSite
from sparsetune.attention.stats import CallRecord, Kind, SparsityStats
from sparsetune.attention.step_cache import InstalledCache
from sparsetune.attention.thresholds import LayerThresholds, ThresholdTensors
from sparsetune.attention.unmask import Refusal, UnmaskedCall, attend_padded, unmasked_call
from sparsetune.errors import ModelError

logger = logging.getLogger(__name__)

_Group = tuple[str, int | None, Kind, str, str | None, int]  # layer, step, kind, kernel, reason and number of heads

DENSE_KERNEL = "sdpa"  # how the statistics name the pipeline's own attention


class SparseHandle:
    """A policy installed on a pipeline; a context manager that removes it at its end.

    Args:
        sites: the pipeline's self-attention.
        policy: one entry for each of its layers.
        backend: the kernel for sparse calls.
        break_even: break-evens of this machine; layers that are slower sparse run dense (see `BreakEvenCheck`).
        chosen_because: why this backend was chosen, in a few words.
        at_first_call: called with the first attention call, outside of any compiled graph.

    Raises:
        ModelError: the pipeline is sparse already, or refuses the policy's cache.
        CheckpointError: the policy's layers aren't the pipeline's; the message lists the differences.
    """

    def __init__(
        self,
        sites: AttentionSites,
        policy: Policy,
        backend: Backend,
        break_even: BreakEvenTable | None = None,
        chosen_because: str = "asked for",
        at_first_call: Callable[[AttentionCall], None] | None = None,
    ) -> None:
        self.backend = backend
        self.chosen_because = chosen_because
        self.break_even = break_even
        self._sites = sites
        self._at_first_call = at_first_call
        self._warned: set[str] = set()
        self.warm: Policy | None = None  # the last policy whose kernels ran before they were timed
        self._cache: InstalledCache | None = None
        self._removed = False
        self._pairs: dict[str, float] = {}  # block pairs of a head in a call of each layer
        self._called: set[str] = set()  # layers in the transformer call that runs
        self._interception = Interception(sites, self._attend, self)
        try:
            self.policy = policy
        except BaseException:
            self._interception.remove()
            raise

    @property
    def policy(self) -> Policy:
        """The installed policy; assigning another one replaces it in place and resets the statistics."""
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        check_fits(policy, [(layer.name, layer.num_heads) for layer in self._sites.layers])
        before: Policy | None = getattr(self, "_policy", None)
        self._remove_cache()
        self._policy = policy
        try:
            self._install_cache()
        except BaseException:
            if before is not None:
                self._policy = before
                self._install_cache()
            raise
        self._counts: dict[_Group, tuple[int, float, Tensor]] = {}
        self._thresholds = {layer.name: layer for layer in policy.layers}
        self._tensors: dict[tuple[str, float, torch.device], ThresholdTensors] = {}
        self._check = None if self.break_even is None else BreakEvenCheck(self.break_even, self.backend.name)

    def stats(self) -> SparsityStats:
        """Return what ran since the start or the last `reset`."""
        return SparsityStats(
            tuple(
                CallRecord(layer, step, kind, kernel, reason, calls, tuple(computed.tolist()), pairs, num_heads)
                for (layer, step, kind, kernel, reason, num_heads), (calls, pairs, computed) in self._counts.items()
            )
        )

    def reset(self) -> None:
        """Reset the statistics."""
        self._counts.clear()
        if self._cache is not None:
            self._cache.reset()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Run as without a policy within the context: calls aren't intercepted, nor counted."""
        self._interception.active = False
        self._remove_cache()
        try:
            yield
        finally:
            if not self._removed:
                self._interception.active = True
                self._install_cache()

    def remove(self) -> None:
        """Remove the policy and restore the pipeline's modules exactly. Does nothing the second time."""
        self._removed = True
        self._remove_cache()
        self._interception.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _install_cache(self) -> None:
        cache, caching = self._policy.cache, self._sites.caching
        if cache is None or self._removed:
            return
        if caching is None:
            raise ModelError(f"the policy's cache, {cache.kind}, can't be installed on this model")
        self._cache = caching.install(cache)

    def _remove_cache(self) -> None:
        if self._cache is not None:
            self._cache.remove()
            self._cache = None

    def before_call(
        self, site: TransformerSite, step: int | None, num_steps: int, arguments: Mapping[str, Any]
    ) -> None:
        """Let the cache skip, or not, in a transformer's call; a `CallObserver`'s."""
        if self._cache is not None:
            self._cache.before_call(self._sites.transformers.index(site), step, num_steps, arguments)
        self._called.clear()

    def after_call(self, site: TransformerSite, step: int | None) -> None:
        """Count the layers that weren't called in it as skipped; a `CallObserver`'s."""
        for layer in site.layers:
            if layer.name in self._pairs and layer.name not in self._called:
                self._add((layer.name, step, "skipped", "none", None, layer.num_heads), self._pairs[layer.name])

    def _attend(self, call: AttentionCall) -> Tensor:
        if self._at_first_call is not None:
            at_first_call, self._at_first_call = self._at_first_call, None
            at_first_call(call)
        layer, thresholds = call.layer.name, self._thresholds[call.layer.name]
        drop_scale = self._policy.schedule.scale(call.step, call.num_steps)
        if not thresholds.is_sparse or drop_scale == 0.0:
            return self._dense(call, "dense", None)
        unmasked = unmasked_call(call, self.backend)
        if isinstance(unmasked, Refusal):
            self._warn_once(layer, unmasked.reason)
            return self._dense(call, "fallback", unmasked.reason)
        if self._check is not None and (slower := self._check.reason_to_run_dense(layer, call.step, unmasked.q)):
            return self._dense(call, "fallback", slower)
        attended = self._sparse(unmasked, thresholds, drop_scale)
        pairs = self._count(call, unmasked.q, "sparse", None, attended.computed)
        if self._check is not None:
            self._check.record(layer, attended.computed, pairs * unmasked.q.shape[1])
        return unmasked.with_padding(attended.output)

    def _dense(self, call: AttentionCall, kind: Kind, reason: str | None) -> Tensor:
        self._count(call, call.q, kind, reason)
        return call.original()

    def _sparse(self, unmasked: UnmaskedCall, thresholds: LayerThresholds, drop_scale: float) -> AttentionOutput:
        device = unmasked.q.device
        key = (thresholds.name, drop_scale, device)
        if key not in self._tensors:
            self._tensors[key] = thresholds.tensors(device, drop_scale, self._policy.select_partial)
        keep = kept_blocks(self._policy.keep_text, unmasked.layout, self.backend.blocks)
        reordering = permutation(thresholds.order or self._policy.order, unmasked.layout, device)
        q, k, v = unmasked.q, unmasked.k, unmasked.v
        if reordering is not None:
            q, k, v = reordering.order_qkv(q, k, v)
        attended = attend_padded(self.backend, q, k, v, self._tensors[key], scale=unmasked.scale, keep=keep)
        if reordering is None:
            return attended
        return AttentionOutput(reordering.undo(attended.output), attended.computed)

    def _warn_once(self, layer: str, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            logger.warning("%s runs dense: %s (logged once; the result counts such calls)", layer, reason)

    def _count(
        self, call: AttentionCall, q: Tensor, kind: Kind, reason: str | None, computed: Tensor | None = None
    ) -> float:
        """Count a call; return the number of block pairs in a head."""
        layer = call.layer
        num_q, num_k = self.backend.blocks.counts(q.shape[-2], q.shape[-2])
        pairs = float(q.shape[0] * num_q * num_k)
        self._pairs[layer.name] = pairs
        self._called.add(layer.name)
        if computed is None:
            computed = torch.full((layer.num_heads,), pairs, dtype=torch.float64)
        kernel = self.backend.name if kind == "sparse" else DENSE_KERNEL
        self._add((layer.name, call.step, kind, kernel, reason, layer.num_heads), pairs, computed)
        return pairs

    def _add(self, key: _Group, pairs: float, computed: Tensor | None = None) -> None:
        if computed is None:
            computed = torch.zeros(key[-1], dtype=torch.float64)
        if key in self._counts:
            calls, all_pairs, before = self._counts[key]
            # On the GPU: counting doesn't wait for it. Not in place: an inference tensor may refuse that.
            self._counts[key] = calls + 1, all_pairs + pairs, before + computed
        else:
            self._counts[key] = 1, pairs, computed


def kept_blocks(keep_text: bool, layout: TokenLayout, blocks: BlockShape) -> range:
    """Key blocks that are always computed: those with text, or the first, as in SpargeAttn (`attention_sink`)."""
    return blocks.covering(layout.text) if keep_text and layout.text else range(1)
