"""Search of the lowest thresholds that keep one attention call within an error bound, for all heads at once.

SpargeAttn's tuner bisects each head separately, with a kernel call and a synchronisation per step. Here they are
searched with dozens of matrix products on `BlockSums`, and checked by the kernel, whose rounding adds to the error.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetune.attention.backends import Backend
from sparsetune.attention.blockmap import pool_both
from sparsetune.attention.thresholds import PVTHRESHD_OFF, Rule, ThresholdTensors
from sparsetune.attention.unmask import attend_padded
from sparsetune.tuning.calibration.block_sums import BlockSums, block_sums
from sparsetune.tuning.calibration.bounded_policy import Bounds
from sparsetune.tuning.calibration.mask_error import mask_thresholds

_FLOATS_AT_ONCE = 1 << 29  # most floats of block sums held at a time, 2 GiB, or one head's where that is more

# Tried in the first round, up to 1 − 2⁻¹⁰: the error grows with what is left out, as in `curves.grid`.
_FIRST_THRESHOLDS = tuple(1.0 - 2.0 ** (-5 * index / 8) for index in range(1, 17))
_ROUNDS = 3  # of 16 thresholds each; the second and third narrow an interval of the first down to 1/17²
_CLOSE = 0.97  # an error above this fraction of the bound is close enough
_KERNEL_ROUNDS = 3
_MAX_KERNEL_ROUNDS = 8

_CHECKED_BLOCKS = 64
"""`pvthreshd` is bisected on about so many query blocks, spread evenly, where there are twice as many."""

_MAX_PV = 16.0  # skipping weights below 2⁻¹⁶ of a row's largest has no measurable effect
_PV_ROUNDS = 6
_PV_SHARES = (1.0, 0.98, 0.95)
"""Fractions of the bound that the estimate must meet: the next one when the whole call exceeded the bound."""

_NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class LowestThresholds:
    """The lowest thresholds within the bounds on one attention call, float32 (heads,)."""

    mask_threshold: Tensor  # cdfthreshd or topk; infinite where even 1 exceeds the bound
    pvthreshd: Tensor  # in base-2 logits; `PVTHRESHD_OFF` where none is lower, or the kernel has no such threshold


def lowest_thresholds(
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
) -> LowestThresholds:
    """Search each head's lowest mask threshold, and its lowest `pvthreshd` at that threshold, within the bounds.

    Errors are the kernel's on the whole call, against PyTorch's dense attention. They are assumed to fall as a
    threshold rises, which holds but for rounding. They are estimated on every `every`-th query of each query block.

    q, k and v are (batch, heads, tokens, head_dim), in the token order to search in, `sim` is simthreshd1, float32
    (heads,). `backend` must be able to run these tensors, padded. The key blocks `keep` are always computed, and a
    partial last one unless `select_partial`.

    Memory: `BlockSums` of as many heads as fit in `_FLOATS_AT_ONCE`.
    """
    num_q, num_k = backend.blocks.counts(q.shape[-2], k.shape[-2])
    floats = q.shape[0] * num_q * num_k * -(-backend.blocks.q // every) * q.shape[-1]
    at_once = max(1, _FLOATS_AT_ONCE // floats)
    masks, pvs = [], []
    for head in range(0, q.shape[1], at_once):
        heads = slice(head, head + at_once)
        q_, k_, v_ = (x[:, heads] for x in (q, k, v))
        call = _Call(q_, k_, v_, F.scaled_dot_product_attention(q_, k_, v_, scale=scale), backend, scale, keep)
        base = ThresholdTensors(
            rule, sim[heads], torch.ones_like(sim[heads]), torch.full_like(sim[heads], PVTHRESHD_OFF), select_partial
        )
        mask, error = _lowest_mask_threshold(call, base, bounds.l1, every)
        masks.append(mask)
        pvs.append(_lowest_pv(call, replace(base, select=mask.clamp(max=1.0)), error, bounds.pv_l1))
    return LowestThresholds(torch.cat(masks), torch.cat(pvs))


def _lowest_mask_threshold(call: "_Call", base: ThresholdTensors, l1: float, every: int) -> tuple[Tensor, Tensor]:
    """Search on block sums, check with the kernel, and search again with a budget reduced by the kernel's rounding.

    Returns the lowest mask threshold at which the kernel was within the bound, and its error there, float32 (heads,)
    each; where there is none, infinity and the last error.
    """
    pooled_q, pooled_k = pool_both(call.q, call.k, call.backend.blocks, base.select_partial)
    lowest = mask_thresholds(pooled_q, pooled_k, base.simthreshd1, call.keep, base.rule)
    sums = block_sums(call.q, call.k, call.v, blocks=call.backend.blocks, scale=call.scale, every=every)
    budget, best = torch.full_like(base.select, l1), torch.full_like(base.select, torch.inf)
    error_at_best = torch.zeros_like(best)
    for number in range(_MAX_KERNEL_ROUNDS):
        threshold = _estimated_threshold(sums, lowest, budget)
        error = call.errors(replace(base, select=threshold))
        better = (error <= l1) & (threshold < best)
        error_at_best = torch.where(better | best.isinf(), error, error_at_best)
        best = torch.where(better, threshold, best)
        enough = error_at_best >= (0.0 if number + 1 >= _KERNEL_ROUNDS else _CLOSE * l1)
        if bool(((best.isfinite() & enough) | (threshold >= 1.0)).all()):
            break
        predicted = sums.errors(lowest.unsqueeze(2) <= threshold[:, None, None, None])[:, 0]
        wanted = predicted * (0.995 * l1 / error.clamp(min=1e-6))
        budget = wanted.clamp(0.5 * budget, 1.1 * budget).clamp(max=1.0)
    return best, error_at_best


def _estimated_threshold(sums: BlockSums, lowest: Tensor, budget: Tensor) -> Tensor:
    """The lowest threshold of each head whose error, by the sums, is at most its budget; 1 where there is none."""
    first = torch.tensor(_FIRST_THRESHOLDS, device=budget.device)
    even = torch.arange(1, len(first) + 1, device=budget.device) / (len(first) + 1)
    low, high = torch.zeros_like(budget), torch.ones_like(budget)
    for number in range(_ROUNDS):
        tried = low[:, None] + (high - low)[:, None] * (even if number else first)
        within = sums.errors(lowest.unsqueeze(2) <= tried[:, None, :, None]) <= budget[:, None]
        # From the top down, as far as all are within: the error falls with the threshold, rounding aside.
        run = within.flip(-1).long().cumprod(-1).sum(-1)
        edges = torch.cat([low[:, None], tried, high[:, None]], dim=1)
        index = tried.shape[1] - run
        low, high = edges.gather(1, index[:, None])[:, 0], edges.gather(1, index[:, None] + 1)[:, 0]
    return high


def _lowest_pv(call: "_Call", base: ThresholdTensors, error: Tensor, pv_l1: float) -> Tensor:
    """Bisect on some of the query blocks, then check the result on the whole call.

    `error` is each head's with `base`, where `pvthreshd` is off. Returns the lowest pvthreshd at which the kernel was
    within the bound, float32 (heads,); off where there is none, or no pvthreshd changes the error.
    """
    sample, off = call.sample(), base.pvthreshd
    pvs, errors = [off], [error if sample is call else sample.errors(base)]
    factor = _ratio(error, errors[0])  # how much larger an error is on all blocks
    low, high = torch.zeros_like(off), torch.full_like(off, _MAX_PV)
    for _ in range(_PV_ROUNDS):
        middle = ((low.sqrt() + high.sqrt()) / 2).square()  # finer steps where it is low and has more effect
        pvs.append(middle)
        errors.append(sample.errors(replace(base, pvthreshd=middle)))
        within = errors[-1] * factor <= pv_l1
        low, high = torch.where(within, low, middle), torch.where(within, middle, high)
    tried, measured = torch.stack(pvs), torch.stack(errors)
    if bool((measured == measured[0]).all()):
        return off
    if sample is call:
        return torch.where(measured <= pv_l1, tried, off).amin(0)
    best = off
    for share in _PV_SHARES:
        index = torch.where(measured * factor <= share * pv_l1, tried, off).argmin(0, keepdim=True)
        lowest = tried.gather(0, index)[0]
        error = call.errors(replace(base, pvthreshd=lowest))
        best = torch.where(error <= pv_l1, torch.minimum(best, lowest), best)
        if bool((error <= pv_l1).all()):
            break
        factor = _ratio(error, measured.gather(0, index)[0])
    return best


def _ratio(whole: Tensor, sample: Tensor) -> Tensor:
    return torch.where(sample > _NEGLIGIBLE, whole / sample.clamp(min=_NEGLIGIBLE), 1.0)


@dataclass(frozen=True)
class _Call:
    """All query blocks of an attention call, or a sample, with the dense output and the backend to run it sparse."""

    q: Tensor
    k: Tensor
    v: Tensor
    dense: Tensor
    backend: Backend
    scale: float
    keep: range

    def sample(self) -> "_Call":
        """Some of the query blocks, spread evenly; itself where there are few."""
        block = self.backend.blocks.q
        num_blocks = self.q.shape[-2] // block
        every = num_blocks // _CHECKED_BLOCKS
        if every < 2:
            return self
        tokens = torch.arange(num_blocks * block, device=self.q.device).view(num_blocks, block)[::every].flatten()
        return replace(self, q=self.q[..., tokens, :], dense=self.dense[..., tokens, :])

    def errors(self, thresholds: ThresholdTensors) -> Tensor:
        """Relative L1 error of each head, float32 (heads,)."""
        attended = attend_padded(self.backend, self.q, self.k, self.v, thresholds, scale=self.scale, keep=self.keep)
        dense = self.dense.float()
        size = dense.abs().sum(dim=(0, 2, 3)).clamp(min=1e-12)
        return (attended.output.float() - dense).abs_().sum(dim=(0, 2, 3)) / size
