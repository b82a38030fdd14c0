"""Threshold search for one attention call, on the backend that uses the thresholds."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetune.attention.backends import AttentionOutput, FlexBackend, ReferenceBackend
from sparsetune.attention.blockmap import BlockShape
from sparsetune.attention.ordering import TokenLayout
from sparsetune.attention.thresholds import PVTHRESHD_OFF, Rule, ThresholdTensors
from sparsetune.bench.latency import video_like
from sparsetune.tuning.calibration import threshold_search
from sparsetune.tuning.calibration.bounded_policy import Bounds
from sparsetune.tuning.calibration.threshold_search import LowestThresholds, lowest_thresholds

BLOCKS = BlockShape(q=32, k=16)
BACKEND = ReferenceBackend(BLOCKS)
BOUNDS = Bounds(0.06, 0.08)
HEADS = 3
SIM = torch.full((HEADS,), -1.0)
Input = tuple[Tensor, Tensor, Tensor]


class Rounding(ReferenceBackend):
    """A kernel whose outputs have errors of some per cent, as from quantization."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, thresholds: ThresholdTensors, **how: object) -> AttentionOutput:
        attended = super().attend(q, k, v, thresholds, **how)  # type: ignore[arg-type]
        signs = 1.0 - 2.0 * (torch.arange(attended.output.shape[-1]) % 2)
        return replace(attended, output=attended.output * (1 + 0.03 * signs))


@pytest.fixture(scope="module")
def one() -> Input:
    return video_like(TokenLayout((2, 12, 16), range(20)), heads=HEADS)  # 404 tokens


def search(
    one: Input, bounds: Bounds = BOUNDS, *, backend: ReferenceBackend = BACKEND, sim: Tensor = SIM
) -> LowestThresholds:
    return lowest_thresholds(*one, sim, bounds, backend=backend, scale=0.125, keep=range(1), every=4)


@pytest.fixture(scope="module")
def found(one: Input) -> LowestThresholds:
    return search(one)


def run(
    one: Input,
    cuts: Tensor,
    pvthreshd: Tensor | None = None,
    *,
    backend: ReferenceBackend = BACKEND,
    sim: Tensor = SIM,
    rule: Rule = "cdf",
    select_partial: bool = False,
) -> tuple[Tensor, Tensor]:
    """Error and sparsity of each head on a full input."""
    q, k, v = one
    dense = F.scaled_dot_product_attention(q, k, v, scale=0.125)
    off = torch.full_like(cuts, PVTHRESHD_OFF)
    thresholds = ThresholdTensors(rule, sim, cuts, off if pvthreshd is None else pvthreshd, select_partial)
    attended = backend.attend(q, k, v, thresholds, scale=0.125, keep=range(1))
    error = (attended.output - dense).abs().sum((0, 2, 3)) / dense.abs().sum((0, 2, 3))
    num_q, num_k = backend.blocks.counts(q.shape[-2], k.shape[-2])
    return error, 1 - attended.computed / (num_q * num_k)


def test_every_head_is_within_the_bound_and_next_to_it(one: Input, found: LowestThresholds) -> None:
    error, sparsity = run(one, found.mask_threshold)
    assert error.max() <= BOUNDS.l1
    assert sparsity.mean() > 0.1
    lower, less = run(one, found.mask_threshold - 0.02)
    assert bool(((lower > BOUNDS.l1) | torch.isclose(less, sparsity)).all())


def test_the_kernels_own_rounding_counts(one: Input, found: LowestThresholds) -> None:
    rounding = Rounding(BLOCKS)
    assert run(one, found.mask_threshold, backend=rounding)[0].max() > BOUNDS.l1
    cuts = search(one, backend=rounding).mask_threshold
    error, sparsity = run(one, cuts, backend=rounding)
    assert error.max() <= BOUNDS.l1
    assert (cuts >= found.mask_threshold).all() and sparsity.mean() > 0.05


def test_each_head_has_a_similarity_threshold_of_its_own(one: Input, found: LowestThresholds) -> None:
    sim = torch.tensor([-1.0, 0.3, 0.6])
    mixed, alike = search(one, sim=sim), search(one, sim=torch.full((HEADS,), 0.3))
    assert run(one, mixed.mask_threshold, sim=sim)[0].max() <= BOUNDS.l1
    assert mixed.mask_threshold[0] == found.mask_threshold[0] and mixed.mask_threshold[1] == alike.mask_threshold[1]


def test_a_larger_bound_lets_no_head_compute_more(one: Input, found: LowestThresholds) -> None:
    wider = search(one, Bounds(0.12, 0.14))
    tighter = search(one, Bounds(0.03, 0.04))
    assert (wider.mask_threshold <= found.mask_threshold).all()
    assert (found.mask_threshold <= tighter.mask_threshold).all()


def test_pvthreshd_is_lowered_to_its_own_bound(one: Input, found: LowestThresholds) -> None:
    assert (found.pvthreshd < PVTHRESHD_OFF).all()
    error, _ = run(one, found.mask_threshold, found.pvthreshd)
    assert error.max() <= BOUNDS.pv_l1
    assert (error > run(one, found.mask_threshold)[0]).any()
    lower, _ = run(one, found.mask_threshold, found.pvthreshd - 0.5)
    assert (lower > BOUNDS.pv_l1).all()


def test_a_kernel_that_skips_nothing_has_pvthreshd_off(one: Input) -> None:
    found = lowest_thresholds(*one, SIM, BOUNDS, backend=FlexBackend(BLOCKS), scale=0.125, every=4)
    assert (found.pvthreshd == PVTHRESHD_OFF).all()


@pytest.mark.parametrize("select_partial", [False, True])
def test_the_topk_rule_is_searched_too(one: Input, select_partial: bool) -> None:
    found = lowest_thresholds(
        *one, SIM, BOUNDS, backend=BACKEND, scale=0.125, keep=range(1), rule="topk",
        select_partial=select_partial, every=4,
    )  # fmt: skip
    error, sparsity = run(one, found.mask_threshold, rule="topk", select_partial=select_partial)
    assert error.max() <= BOUNDS.l1 and sparsity.mean() > 0.1


def test_a_bound_under_the_kernels_rounding_has_no_cut(one: Input) -> None:
    assert search(one, Bounds(0.02, 0.03), backend=Rounding(BLOCKS)).mask_threshold.isinf().all()


def test_pvthreshd_bisected_on_some_query_blocks_holds_on_all(
    one: Input, found: LowestThresholds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threshold_search, "_CHECKED_BLOCKS", 6)  # of 12
    some = search(one)
    assert torch.equal(some.mask_threshold, found.mask_threshold)
    assert run(one, some.mask_threshold, some.pvthreshd)[0].max() <= BOUNDS.pv_l1
    assert (some.pvthreshd >= found.pvthreshd).all() and (some.pvthreshd < PVTHRESHD_OFF).any()


def test_slabs_of_heads_change_nothing(one: Input, found: LowestThresholds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threshold_search, "_FLOATS_AT_ONCE", 1)
    parts = search(one)
    torch.testing.assert_close(parts.mask_threshold, found.mask_threshold, atol=1e-3, rtol=0)
