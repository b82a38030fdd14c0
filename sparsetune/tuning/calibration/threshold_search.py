"""The lowest thresholds that keep one attention call within an error bound, for all heads at once.

SpargeAttn's tuner bisects each head apart, with a kernel call and a host's wait a step. Here the error of a block
map is a sum over `BlockSums`, so that a cut of all heads is searched in some dozens of matrix products; the real kernel
is asked after that, since its rounding counts too.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetune.attention.backends import Backend
from sparsetune.attention.blockmap import pool
from sparsetune.attention.thresholds import PVTHRESHD_OFF, Rule, ThresholdTensors
from sparsetune.attention.unmask import attend_padded
from sparsetune.tuning.calibration.block_sums import BlockSums, block_sums
from sparsetune.tuning.calibration.bounded_policy import Bounds
from sparsetune.tuning.calibration.mask_error import critical_cuts

_FLOATS_AT_ONCE = 1 << 29
"""Most floats of block sums held at a time, 2 GiB, or one head's where that is more."""

_FIRST_CUTS = tuple(1.0 - 2.0 ** (-5 * place / 8) for place in range(1, 17))
"""Cuts looked at first, up to 1 − 2⁻¹⁰: error goes with what is left out, as in `curves.grid`."""

_ROUNDS = 3
"""Of 16 cuts each; two of them narrow a step of the first down to 1/17²."""

_CLOSE = 0.97
"""From this fraction of the bound on, an error leaves nothing to be gained."""

_KERNEL_ROUNDS = 3
_MOST_KERNEL_ROUNDS = 8

_CHECKED_BLOCKS = 64
"""`pvthreshd` is bisected on about so many query blocks, spread evenly, where there are twice as many."""

_HIGHEST_PV = 16.0
"""What weighs less than 2⁻¹⁶ of a row's largest is skipped without a trace, or not at all."""

_PV_ROUNDS = 6

_PV_SHARES = (1.0, 0.98, 0.95)
"""Of the bound, to be held by the estimate: less when the whole call turned out to be over it."""

_NOTHING = 1e-6


@dataclass(frozen=True)
class Cuts:
    """What holds the bounds on one attention call.

    Args:
        cut: the lowest cdfthreshd or topk of each head, float32 (heads,); infinite where not even 1 holds the bound.
        pvthreshd: the lowest of each head with that cut, float32 (heads,), in base-2 logits; `PVTHRESHD_OFF` where
            none is lower, or the kernel knows no such threshold.
    """

    cut: Tensor
    pvthreshd: Tensor


def lowest_cuts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sim: Tensor,
    bounds: Bounds,
    *,
    backend: Backend,
    scale: float,
    keep: range = range(0),
    rule: Rule = "cdf",
    select_partial: bool = False,
    every: int = 16,
) -> Cuts:
    """Find each head's lowest cut, and with it its lowest `pvthreshd`, within the bounds.

    Errors are the real kernel's on the whole call, against PyTorch's dense attention. They fall as a threshold rises,
    but for rounding: a higher cut than the one found is taken to hold the bounds as well.

    Args:
        q: (batch, heads, tokens, head_dim), in the token order to search in.
        k: see q.
        v: see q.
        sim: simthreshd1 of each head, float32 (heads,), in [-1, 1].
        bounds: on each head's error, over the whole batch.
        backend: the kernel that the thresholds are for; its refusal of these tensors, padded, is None.
        scale: softmax scale.
        keep: key blocks that are always computed.
        rule: cdf or topk.
        select_partial: whether a partial last block is chosen like any other.
        every: a cut's error is estimated on every so many query tokens of each query block.

    Memory: `BlockSums` of as many heads as `_FLOATS_AT_ONCE` has room for.
    """
    num_q, num_k = backend.blocks.counts(q.shape[-2], k.shape[-2])
    floats = q.shape[0] * num_q * num_k * -(-backend.blocks.q // every) * q.shape[-1]
    slab = max(1, _FLOATS_AT_ONCE // floats)
    parts = []
    for head in range(0, q.shape[1], slab):
        heads = slice(head, head + slab)
        call = _Call.of(q[:, heads], k[:, heads], v[:, heads], backend, scale, keep)
        at = ThresholdTensors(
            rule, sim[heads], torch.ones_like(sim[heads]), torch.full_like(sim[heads], PVTHRESHD_OFF), select_partial
        )
        cut, error = _lowest_cut(call, at, bounds.l1, every)
        held = replace(at, select=cut.clamp(max=1.0))
        parts.append(Cuts(cut, _lowest_pv(call, held, error, bounds.pv_l1)))
    return Cuts(torch.cat([part.cut for part in parts]), torch.cat([part.pvthreshd for part in parts]))


def _lowest_cut(call: "_Call", at: ThresholdTensors, l1: float, every: int) -> tuple[Tensor, Tensor]:
    """Search on block sums, see what the kernel makes of it, and search again with as much less as its rounding takes.

    Args:
        call: the attention call.
        at: the thresholds; cuts are put in place of its own.
        l1: the bound.
        every: queries that the sums are of.

    Returns:
        The lowest cut that the kernel was seen to hold the bound at, and its error then, float32 (heads,) each; the
        cut is infinite without one, and the error the last that was seen.
    """
    pooled_q = pool(call.q, call.backend.blocks.q, None, at.select_partial)
    pooled_k = pool(call.k, call.backend.blocks.k, call.k.mean(dim=-2, keepdim=True), at.select_partial)
    critical = critical_cuts(pooled_q, pooled_k, at.simthreshd1, call.keep, at.rule)
    sums = block_sums(call.q, call.k, call.v, blocks=call.backend.blocks, scale=call.scale, every=every)
    budget, best = torch.full_like(at.select, l1), torch.full_like(at.select, torch.inf)
    error_at_best = torch.zeros_like(best)
    for number in range(_MOST_KERNEL_ROUNDS):
        cut = _estimated_cut(sums, critical, budget)
        error = call.errors(replace(at, select=cut))
        better = (error <= l1) & (cut < best)
        error_at_best = torch.where(better | best.isinf(), error, error_at_best)
        best = torch.where(better, cut, best)
        enough = error_at_best >= (0.0 if number + 1 >= _KERNEL_ROUNDS else _CLOSE * l1)
        if bool(((best.isfinite() & enough) | (cut >= 1.0)).all()):
            break
        predicted = sums.errors(critical.unsqueeze(2) <= cut[:, None, None, None])[:, 0]
        wanted = predicted * (0.995 * l1 / error.clamp(min=1e-6))
        budget = wanted.clamp(0.5 * budget, 1.1 * budget).clamp(max=1.0)
    return best, error_at_best


def _estimated_cut(sums: BlockSums, critical: Tensor, budget: Tensor) -> Tensor:
    """The lowest cut of each head whose error, by the sums, is at most its budget; 1 where there is none."""
    first = torch.tensor(_FIRST_CUTS, device=budget.device)
    even = torch.arange(1, len(first) + 1, device=budget.device) / (len(first) + 1)
    low, high = torch.zeros_like(budget), torch.ones_like(budget)
    for number in range(_ROUNDS):
        cuts = low[:, None] + (high - low)[:, None] * (even if number else first)
        holds = sums.errors(critical.unsqueeze(2) <= cuts[:, None, :, None]) <= budget[:, None]
        # From the top down, as far as all hold: the error falls with the threshold, rounding aside.
        run = holds.flip(-1).long().cumprod(-1).sum(-1)
        edges = torch.cat([low[:, None], cuts, high[:, None]], dim=1)
        place = cuts.shape[1] - run
        low, high = edges.gather(1, place[:, None])[:, 0], edges.gather(1, place[:, None] + 1)[:, 0]
    return high


def _lowest_pv(call: "_Call", at: ThresholdTensors, error: Tensor, pv_l1: float) -> Tensor:
    """Bisect on some of the query blocks, then see what the whole call makes of what was found.

    Args:
        call: the attention call.
        at: the thresholds, `pvthreshd` off.
        error: each head's with these, float32 (heads,).
        pv_l1: the bound.

    Returns:
        The lowest pvthreshd that the kernel was seen to hold the bound at, float32 (heads,); off where that is none,
        and where it skips nothing at any.
    """
    some, off = call.some(), at.pvthreshd
    pvs, errors = [off], [error if some is call else some.errors(at)]
    factor = _ratio(error, errors[0])  # how much larger an error is on all blocks
    low, high = torch.zeros_like(off), torch.full_like(off, _HIGHEST_PV)
    for _ in range(_PV_ROUNDS):
        middle = ((low.sqrt() + high.sqrt()) / 2).square()  # finer where it is low, since it matters there
        pvs.append(middle)
        errors.append(some.errors(replace(at, pvthreshd=middle)))
        good = errors[-1] * factor <= pv_l1
        low, high = torch.where(good, low, middle), torch.where(good, middle, high)
    tried, seen = torch.stack(pvs), torch.stack(errors)
    if bool((seen == seen[0]).all()):
        return off
    if some is call:
        return torch.where(seen <= pv_l1, tried, off).amin(0)
    found = off
    for share in _PV_SHARES:
        place = torch.where(seen * factor <= share * pv_l1, tried, off).argmin(0, keepdim=True)
        lowest = tried.gather(0, place)[0]
        error = call.errors(replace(at, pvthreshd=lowest))
        found = torch.where(error <= pv_l1, torch.minimum(found, lowest), found)
        if bool((error <= pv_l1).all()):
            break
        factor = _ratio(error, seen.gather(0, place)[0])
    return found


def _ratio(whole: Tensor, some: Tensor) -> Tensor:
    """How much larger one error is than the other; 1 where both are next to nothing."""
    return torch.where(some > _NOTHING, whole / some.clamp(min=_NOTHING), 1.0)


@dataclass(frozen=True)
class _Call:
    """An attention call, its dense output, and what runs it sparse; all of its query blocks, or some."""

    q: Tensor
    k: Tensor
    v: Tensor
    dense: Tensor
    backend: Backend
    scale: float
    keep: range

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, backend: Backend, scale: float, keep: range) -> "_Call":
        return cls(q, k, v, F.scaled_dot_product_attention(q, k, v, scale=scale), backend, scale, keep)

    def some(self) -> "_Call":
        """Take some of the query blocks, spread evenly; itself where there are few."""
        block = self.backend.blocks.q
        whole = self.q.shape[-2] // block
        every = whole // _CHECKED_BLOCKS
        if every < 2:
            return self
        place = torch.arange(whole * block, device=self.q.device).view(whole, block)[::every].flatten()
        return replace(self, q=self.q[..., place, :], dense=self.dense[..., place, :])

    def errors(self, thresholds: ThresholdTensors) -> Tensor:
        """Relative L1 error of each head, float32 (heads,)."""
        attended = attend_padded(self.backend, self.q, self.k, self.v, thresholds, scale=self.scale, keep=self.keep)
        dense = self.dense.float()
        size = dense.abs().sum(dim=(0, 2, 3)).clamp(min=1e-12)
        return (attended.output.float() - dense).abs_().sum(dim=(0, 2, 3)) / size
