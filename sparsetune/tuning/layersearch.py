"""The sparsest thresholds of one attention layer within an error bound, for all heads at once.

SpargeAttn's tuner bisects each head apart, with a kernel call and a host's wait a step. Here the error of a block
map is a sum over `BlockSums`, so that all heads, similarity thresholds and cuts are searched in some dozens of matrix
products; the real kernel is asked at the end, since its rounding counts too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetune.attention.backends import Backend
from sparsetune.attention.blockmap import pool
from sparsetune.attention.thresholds import PVTHRESHD_OFF, HeadThresholds, Rule, ThresholdTensors
from sparsetune.tuning.blocksums import BlockSums, block_sums
from sparsetune.tuning.cuts import critical_cuts

SIMS = (-1.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75)
"""Values of simthreshd1 that are searched."""

_CUTS = 16
"""Thresholds looked at in one go; three rounds narrow a cut down to 1/17³ of its range."""

_CHECKED_BLOCKS = 64
"""The real kernel's error is measured on about so many query blocks, spread evenly."""

_KERNEL_ROUNDS = 3
_MOST_KERNEL_ROUNDS = 8
_PV_ROUNDS = 8


@dataclass(frozen=True)
class Found:
    """What the search found for one layer.

    Args:
        heads: thresholds of each head; dense ones for a head that no thresholds keep within the bound.
        error: relative L1 error of each head with the real kernel, its `pvthreshd` included.
        sparsity: fraction of block pairs not computed, by head.
    """

    heads: tuple[HeadThresholds, ...]
    error: tuple[float, ...]
    sparsity: tuple[float, ...]


def search_inputs(
    inputs: Sequence[tuple[Tensor, Tensor, Tensor]],
    *,
    bound: float,
    backend: Backend,
    scale: float,
    keep: range = range(0),
    rule: Rule = "cdf",
    pv_bound: float | None = None,
    sims: Sequence[float] = SIMS,
    every: int = 16,
) -> Found:
    """Find each head's sparsest thresholds with an error of at most `bound` on every one of several inputs.

    Args:
        inputs: q, k and v of a layer, (batch, heads, tokens, head_dim) each, in the token order to search in; e.g.
            those of several prompts and steps. All of one shape.
        bound: on the relative L1 error Σ|o − o'| / Σ|o| of a head's output.
        backend: the kernel that the thresholds are for.
        scale: softmax scale.
        keep: key blocks that are always computed.
        rule: cdf or topk.
        pv_bound: bound with `pvthreshd` at work, above `bound`; None leaves `pvthreshd` off.
        sims: values of simthreshd1 to choose from.
        every: the error is estimated on every so many query tokens of each query block.

    Returns:
        Thresholds; each head's largest error and mean sparsity over the inputs.

    Memory: `BlockSums` of every input.
    """
    given = []
    for q, k, v in inputs:
        pooled_q = pool(q, backend.blocks.q)
        pooled_k = pool(k, backend.blocks.k, k.mean(dim=-2, keepdim=True))
        cuts = torch.stack([critical_cuts(pooled_q, pooled_k, sim, keep, rule) for sim in sims])
        sums = block_sums(q, k, v, blocks=backend.blocks, scale=scale, every=every)
        given.append(_Input(q, k, v, sums, cuts))
    places = range(len(sims))
    first_cuts, sparsities = (torch.stack(x) for x in zip(*(_estimate(given, at, bound) for at in places), strict=True))
    best = sparsities.argmax(0)
    heads = torch.arange(len(best), device=best.device)
    sim = torch.tensor(tuple(sims), device=best.device)[best]
    first = ThresholdTensors(rule, sim, first_cuts[best, heads], torch.full_like(sim, PVTHRESHD_OFF))
    checks = [_Check.of(one.q, one.k, one.v, backend, scale, keep, first) for one in given]
    cut, held = _within_bound(given, checks, [one.cuts[best, heads] for one in given], sim, rule, bound)
    sim = torch.where(held, sim, 2.0)
    cut = torch.where(held, cut, 1.0)
    pv = torch.full_like(sim, PVTHRESHD_OFF)
    if pv_bound is not None:
        pv = torch.where(held, _lowest_pv(checks, sim, cut, rule, pv_bound), pv)
    error, sparsity = _run_all(checks, ThresholdTensors(rule, sim, cut, pv))
    return Found(_as_heads(rule, sim, cut, pv, held), tuple(error.amax(0).tolist()), tuple(sparsity.mean(0).tolist()))


def _sparsity(critical: Tensor, cuts: Tensor) -> Tensor:
    """Fraction of the pairs not computed at each head's `cuts` (heads, points), the same shape."""
    return (critical.unsqueeze(2) > cuts[:, None, :, None]).float().mean(dim=(1, 3))


def _lowest_cut(sums: BlockSums, critical: Tensor, budget: Tensor, rounds: int) -> Tensor:
    """The lowest threshold of each head whose estimated error is at most its budget; 1 where there is none."""
    low, high = torch.zeros_like(budget), torch.ones_like(budget)
    steps = torch.arange(1, _CUTS + 1, device=budget.device) / (_CUTS + 1)
    for _ in range(rounds):
        cuts = low[:, None] + (high - low)[:, None] * steps
        holds = sums.errors(critical.unsqueeze(2) <= cuts[:, None, :, None]) <= budget[:, None]
        # From the top down, as far as all hold: the error falls with the threshold, rounding aside.
        run = holds.flip(-1).long().cumprod(-1).sum(-1)
        edges = torch.cat([low[:, None], cuts, high[:, None]], dim=1)
        place = _CUTS - run
        low, high = edges.gather(1, place[:, None])[:, 0], edges.gather(1, place[:, None] + 1)[:, 0]
    return high


def _estimate(given: Sequence["_Input"], place: int, bound: float) -> tuple[Tensor, Tensor]:
    """Each head's lowest cut of one simthreshd1 that keeps every input within the bound, and its mean sparsity."""
    budget = torch.full(given[0].cuts.shape[1:2], bound, device=given[0].cuts.device)
    cut = torch.stack([_lowest_cut(one.sums, one.cuts[place], budget, rounds=2) for one in given]).amax(0)
    return cut, torch.stack([_sparsity(one.cuts[place], cut[:, None])[:, 0] for one in given]).mean(0)


def _within_bound(
    given: Sequence["_Input"],
    checks: Sequence["_Check"],
    criticals: Sequence[Tensor],
    sim: Tensor,
    rule: Rule,
    bound: float,
) -> tuple[Tensor, Tensor]:
    """Cuts whose error holds the bound on every input with the real kernel, and which heads have one."""
    budgets = torch.full((len(given), len(sim)), bound, device=sim.device)
    best = torch.ones_like(sim)
    held = torch.zeros_like(sim, dtype=torch.bool)
    off = torch.full_like(sim, PVTHRESHD_OFF)
    for number in range(_MOST_KERNEL_ROUNDS):
        if number >= _KERNEL_ROUNDS and bool(held.all()):
            break
        cut = torch.stack(
            [
                _lowest_cut(one.sums, critical, budget, rounds=3)
                for one, critical, budget in zip(given, criticals, budgets, strict=True)
            ]
        ).amax(0)
        error, _ = _run_all(checks, ThresholdTensors(rule, sim, cut, off))
        good = (error <= bound).all(0)
        best = torch.where(good & (~held | (cut < best)), cut, best)
        held |= good
        # The kernel's rounding adds to the error that the sums predict: ask them for as much less.
        predicted = torch.stack(
            [
                one.sums.errors(critical.unsqueeze(2) <= cut[:, None, None, None])[:, 0]
                for one, critical in zip(given, criticals, strict=True)
            ]
        )
        wanted = predicted * (0.995 * bound / error.clamp(min=1e-6))
        budgets = wanted.clamp(0.5 * budgets, 1.1 * budgets).clamp(max=1.0)
    return best, held


def _lowest_pv(checks: Sequence["_Check"], sim: Tensor, cut: Tensor, rule: Rule, bound: float) -> Tensor:
    """The lowest pvthreshd of each head whose error with the real kernel is at most `bound`, by bisection."""
    low, high = torch.zeros_like(sim), torch.full_like(sim, PVTHRESHD_OFF)
    for _ in range(_PV_ROUNDS):
        middle = (low + high) / 2
        good = (_run_all(checks, ThresholdTensors(rule, sim, cut, middle))[0] <= bound).all(0)
        low, high = torch.where(good, low, middle), torch.where(good, middle, high)
    return high


def _run_all(checks: Sequence["_Check"], thresholds: ThresholdTensors) -> tuple[Tensor, Tensor]:
    """Error and sparsity of each head with the real kernel, (inputs, heads) each."""
    error, sparsity = zip(*(check.run(thresholds) for check in checks), strict=True)
    return torch.stack(error), torch.stack(sparsity)


@dataclass(frozen=True)
class _Input:
    """One input, prepared: its sums, and `critical_cuts` of every simthreshd1, (sims, heads, rows, k blocks)."""

    q: Tensor
    k: Tensor
    v: Tensor
    sums: BlockSums
    cuts: Tensor


@dataclass(frozen=True)
class _Check:
    """The real kernel against dense attention, on some of the query blocks.

    `factor` is how much larger each head's error is on all of them, (heads,).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    dense: Tensor
    factor: Tensor
    backend: Backend
    scale: float
    keep: range

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, backend: Backend, scale: float, keep: range, first: ThresholdTensors
    ) -> "_Check":
        """Prepare the check; `factor` is that of the thresholds `first`, which should be near those to be checked."""
        block = backend.blocks.q
        whole, every = q.shape[-2] // block, max(1, q.shape[-2] // block // _CHECKED_BLOCKS)
        dense = F.scaled_dot_product_attention(q, k, v, scale=scale)
        everything = cls(q, k, v, dense, torch.ones(q.shape[1], device=q.device), backend, scale, keep)
        if every == 1:
            return everything
        place = torch.arange(whole * block, device=q.device).view(whole, block)[::every].flatten()
        some = replace(everything, q=q[..., place, :], dense=dense[..., place, :])
        return replace(some, factor=everything.run(first)[0] / some.run(first)[0].clamp(min=1e-9))

    def run(self, thresholds: ThresholdTensors) -> tuple[Tensor, Tensor]:
        """Relative L1 error and sparsity of each head, (heads,) each."""
        attended = self.backend.attend(self.q, self.k, self.v, thresholds, scale=self.scale, keep=self.keep)
        dense = self.dense.float()
        size = dense.abs().sum(dim=(0, 2, 3)).clamp(min=1e-12)
        error = (attended.output.float() - dense).abs_().sum(dim=(0, 2, 3)) / size * self.factor
        num_q, num_k = self.backend.blocks.counts(self.q.shape[-2], self.k.shape[-2])
        return error, 1.0 - attended.computed.float() / (self.q.shape[0] * num_q * num_k)


def _as_heads(rule: Rule, sim: Tensor, cut: Tensor, pv: Tensor, held: Tensor) -> tuple[HeadThresholds, ...]:
    heads = []
    for s, c, p, sparse in zip(sim.tolist(), cut.tolist(), pv.tolist(), held.tolist(), strict=True):
        chosen = {"cdfthreshd": c} if rule == "cdf" else {"topk": c}
        heads.append(HeadThresholds(min(s, 1.0), **chosen, pvthreshd=p, is_sparse=sparse))
    return tuple(heads)
