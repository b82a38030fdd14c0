"""The fast search of one layer, against the backend that its thresholds are for."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetune.attention.backends import ReferenceBackend
from sparsetune.attention.blockmap import BlockShape
from sparsetune.attention.ordering import TokenLayout
from sparsetune.attention.synthetic import video_like
from sparsetune.attention.thresholds import HeadThresholds, LayerThresholds
from sparsetune.tuning import layersearch
from sparsetune.tuning.layersearch import Found, search_inputs

BLOCKS = BlockShape(q=32, k=16)
BACKEND = ReferenceBackend(BLOCKS)
BOUND = 0.06
Input = tuple[Tensor, Tensor, Tensor]


def drawn(seed: int) -> Input:
    return video_like(TokenLayout((2, 12, 16), range(20)), heads=3, seed=seed)  # 404 tokens


@pytest.fixture(scope="module")
def inputs() -> tuple[Input, ...]:
    return tuple(drawn(seed) for seed in range(2))


@pytest.fixture(scope="module")
def found(inputs: tuple[Input, ...]) -> Found:
    return search_inputs(inputs, bound=BOUND, backend=BACKEND, scale=0.125, every=4)


def run(heads: tuple[HeadThresholds, ...], one: Input) -> tuple[Tensor, Tensor]:
    """Error and sparsity of each head on a whole input."""
    q, k, v = one
    dense = F.scaled_dot_product_attention(q, k, v, scale=0.125)
    thresholds = LayerThresholds("layer", heads).tensors(q.device)
    attended = BACKEND.attend(q, k, v, thresholds, scale=0.125, keep=range(0))
    error = (attended.output - dense).abs().sum((0, 2, 3)) / dense.abs().sum((0, 2, 3))
    num_q, num_k = BLOCKS.counts(404, 404)
    return error, 1 - attended.computed / (num_q * num_k)


def test_every_head_is_within_the_bound_on_every_input(inputs: tuple[Input, ...], found: Found) -> None:
    errors, sparsities = zip(*(run(found.heads, one) for one in inputs), strict=True)
    assert torch.stack(errors).max() <= BOUND * 1.0001
    torch.testing.assert_close(torch.stack(errors).amax(0), torch.tensor(found.error), atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(torch.stack(sparsities).mean(0).float(), torch.tensor(found.sparsity))
    assert sum(found.sparsity) > 0.1


def test_no_lower_cut_of_the_same_similarity_holds(inputs: tuple[Input, ...], found: Found) -> None:
    lower = [
        HeadThresholds(head.simthreshd1, cdfthreshd=max(0.0, (head.cdfthreshd or 0.0) - 0.1)) for head in found.heads
    ]
    errors, sparsities = zip(*(run(tuple(lower), one) for one in inputs), strict=True)
    worse = torch.stack(errors).amax(0) > BOUND
    same = torch.isclose(torch.stack(sparsities).mean(0).float(), torch.tensor(found.sparsity))
    assert bool((worse | same).all())


def test_pvthreshd_is_lowered_to_its_own_bound(inputs: tuple[Input, ...], found: Found) -> None:
    with_pv = search_inputs(inputs[:1], bound=BOUND, pv_bound=0.08, backend=BACKEND, scale=0.125, every=4)
    assert all(head.pvthreshd < 50 for head in with_pv.heads)
    assert run(with_pv.heads, inputs[0])[0].max() <= 0.08 * 1.0001
    assert all(head.pvthreshd == 50 for head in found.heads)


def test_the_topk_rule_is_searched_too(inputs: tuple[Input, ...]) -> None:
    found = search_inputs(inputs[:1], bound=BOUND, backend=BACKEND, scale=0.125, rule="topk", every=4)
    assert {head.rule for head in found.heads} == {"topk"}
    assert max(found.error) <= BOUND


def test_a_bound_that_no_thresholds_meet_leaves_heads_dense(inputs: tuple[Input, ...]) -> None:
    found = search_inputs(inputs[:1], bound=-1.0, backend=BACKEND, scale=0.125, every=4)
    assert not any(head.is_sparse for head in found.heads)
    assert found.sparsity == (0.0, 0.0, 0.0)


def test_errors_on_some_query_blocks_are_scaled_to_all(
    inputs: tuple[Input, ...], found: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layersearch, "_CHECKED_BLOCKS", 4)
    some = search_inputs(inputs, bound=BOUND, backend=BACKEND, scale=0.125, every=4)
    errors = torch.stack([run(some.heads, one)[0] for one in inputs])
    assert errors.max() < BOUND * 1.1
    assert abs(sum(some.sparsity) - sum(found.sparsity)) < 0.5
