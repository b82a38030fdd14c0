"""The interception on a small test transformer with arbitrary attention calls."""

import inspect
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn

from sparsetune.attention.backends import ReferenceBackend
from sparsetune.attention.blockmap import SPARGE_BLOCKS
from sparsetune.attention.handle import SparseHandle, kept_blocks
from sparsetune.attention.interception import Interception
from sparsetune.attention.ordering import TokenLayout
from sparsetune.attention.policy import Policy
from sparsetune.attention.schedule import DenseSchedule
from sparsetune.attention.sites import AttentionSites, LayerSite, TransformerCall, TransformerSite
from sparsetune.attention.thresholds import HeadThresholds, LayerThresholds
from sparsetune.errors import ModelError
from tests.attention.conftest import structured

LAYOUT = TokenLayout((2, 16, 16), range(100))
TOKENS = LAYOUT.num_tokens


class Attention(nn.Module):
    """Passes q, k, v on with any options."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **options)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, timestep: float, q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
        return self.attn(q, k, v, options)


@pytest.fixture
def model() -> Transformer:
    return Transformer()


def sites(model: Transformer, layout: TokenLayout = LAYOUT) -> AttentionSites:
    layers = (LayerSite("transformer.attn", model.attn, 3, 64, "start"),)
    names = tuple(inspect.signature(Transformer.forward).parameters)[1:]

    def read(module: nn.Module, given: dict) -> TransformerCall:
        return TransformerCall(torch.tensor(given["timestep"]), layout.grid)

    site = TransformerSite("transformer", model, layers, read, names)
    return AttentionSites((site,), lambda: [900.0, 500.0, 100.0])


def sparse(model: Transformer, **rest) -> SparseHandle:
    head = HeadThresholds(-1.0, cdfthreshd=0.3)
    return SparseHandle(sites(model), Policy.uniform([("transformer.attn", 3)], head, **rest), ReferenceBackend())


def mask(last: bool) -> Tensor:
    allowed = torch.ones(1, 1, 1, TOKENS, dtype=torch.bool)
    allowed[..., -1] = last
    return allowed


@pytest.mark.parametrize(
    "options", [{}, {"attn_mask": mask(True)}, {"attn_mask": torch.zeros(1, 1, 1, TOKENS)}, {"scale": 0.1}], ids=str
)
def test_plain_calls_run_sparse(model: Transformer, options: dict) -> None:
    q, k, v = structured(tokens=TOKENS)
    dense = F.scaled_dot_product_attention(q, k, v, **options)
    with sparse(model) as handle:
        output = model(900.0, q, k, v, options)
        assert handle.stats().num_calls == {"sparse": 1, "dense": 0, "fallback": 0}
        assert handle.stats().sparsity > 0.1
    assert 0.001 < (output - dense).abs().mean() < dense.abs().mean()


@pytest.mark.parametrize(
    ("options", "tokens", "key_heads", "reason"),
    [
        ({"attn_mask": mask(False)}, TOKENS, 3, "the mask hides tokens of the video"),
        ({"attn_mask": torch.full((1, 1, 1, TOKENS), -0.5)}, TOKENS, 3, "the call has an attention mask"),
        ({"is_causal": True}, TOKENS, 3, "the call is causal"),
        ({"dropout_p": 0.5}, TOKENS, 3, "the call has dropout"),
        ({"enable_gqa": True}, TOKENS, 1, "key heads are shared between query heads"),
        ({}, 300, 3, "300 x 300 tokens where the transformer's input has 512"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_other_calls_run_as_they_were_made_and_are_counted(
    model: Transformer, options: dict, tokens: int, key_heads: int, reason: str
) -> None:
    q, k, v = structured(tokens=tokens)
    k, v = k[:, :key_heads], v[:, :key_heads]
    torch.manual_seed(0)
    dense = F.scaled_dot_product_attention(q, k, v, **options)
    with sparse(model) as handle:
        torch.manual_seed(0)
        assert torch.equal(model(900.0, q, k, v, options), dense)
        assert handle.stats().fallbacks == {reason: 1}
        assert handle.stats().sparsity == 0.0


def test_a_timestep_that_isnt_the_schedulers_falls_back(model: Transformer) -> None:
    q, k, v = structured(tokens=TOKENS)
    with sparse(model) as handle:
        model(321.0, q, k, v, {})
        assert handle.stats().fallbacks == {"the timestep isn't in the scheduler's list": 1}


def test_two_calls_a_step_are_one_step(model: Transformer) -> None:
    q, k, v = structured(tokens=TOKENS)
    with sparse(model, schedule=DenseSchedule(0.3)) as handle:
        for timestep in (900.0, 900.0, 500.0, 500.0, 100.0, 100.0):
            model(timestep, q, k, v, {})
        assert handle.stats().num_calls == {"sparse": 4, "dense": 2, "fallback": 0}
        assert handle.stats().by_step[0] == 0.0


def test_each_step_drops_its_own_multiple(model: Transformer) -> None:
    q, k, v = structured(tokens=TOKENS)
    with sparse(model, schedule=DenseSchedule(0.0, (0.0, 0.5, 1.0))) as handle:
        outputs = [model(timestep, q, k, v, {}) for timestep in (900.0, 500.0, 100.0)]
        by_step = handle.stats().by_step
    assert torch.equal(outputs[0], F.scaled_dot_product_attention(q, k, v)) and by_step[0] == 0.0
    for step, cdf in ((1, 0.65), (2, 0.3)):  # half of what 0.3 leaves out, and all of it
        policy = Policy.uniform([("transformer.attn", 3)], HeadThresholds(-1.0, cdfthreshd=cdf))
        with SparseHandle(sites(model), policy, ReferenceBackend()) as handle:
            torch.testing.assert_close(outputs[step], model(500.0, q, k, v, {}))
            assert by_step[step] == handle.stats().sparsity > 0.0


def test_a_layer_may_have_a_token_order_of_its_own(model: Transformer) -> None:
    q, k, v = structured(tokens=TOKENS)
    layer = LayerThresholds.uniform("transformer.attn", 3, HeadThresholds(-1.0, cdfthreshd=0.3))
    outputs = []
    for own, policys in (("hilbert", "raster"), (None, "hilbert"), (None, "raster")):
        with SparseHandle(sites(model), Policy((replace(layer, order=own),), order=policys), ReferenceBackend()):
            outputs.append(model(500.0, q, k, v, {}))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_each_head_may_have_a_token_order_of_its_own(model: Transformer) -> None:
    q, k, v = structured(tokens=TOKENS)
    layer = LayerThresholds.uniform("transformer.attn", 3, HeadThresholds(-1.0, cdfthreshd=0.3))
    orders = ("whf", "raster", "hilbert")
    outputs, computed = [], []
    for order in (orders, *orders):
        with SparseHandle(sites(model), Policy((replace(layer, order=order),)), ReferenceBackend()) as handle:
            outputs.append(model(500.0, q, k, v, {}))
            computed.append(handle.stats().records[0].computed)
    for head in range(3):
        assert torch.equal(outputs[0][:, head], outputs[1 + head][:, head])
        assert computed[0][head] == computed[1 + head][head]
    assert not torch.equal(outputs[0], outputs[1])


def test_partial_last_blocks_are_chosen_where_the_policy_says_so(model: Transformer) -> None:
    q, k, v = structured(tokens=TOKENS)
    sparsities = []
    for select_partial in (False, True):
        with sparse(model, select_partial=select_partial) as handle:
            model(500.0, q, k, v, {})
            sparsities.append(handle.stats().sparsity)
    assert sparsities[1] > sparsities[0] > 0.0


def test_an_error_in_the_transformer_is_forgotten(model: Transformer) -> None:
    q, k, v = structured(tokens=TOKENS)
    with sparse(model) as handle:
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            model(900.0, q, k, v, {"nonsense": 1})
        model.attn(q, k, v, {})
        assert "the attention ran outside of its transformer" in handle.stats().fallbacks


def test_kept_text_and_the_sink() -> None:
    assert kept_blocks(True, LAYOUT, SPARGE_BLOCKS) == range(2)
    assert kept_blocks(False, LAYOUT, SPARGE_BLOCKS) == range(1)
    assert kept_blocks(True, TokenLayout((2, 16, 16), range(512, 612)), SPARGE_BLOCKS) == range(8, 10)
    assert kept_blocks(True, TokenLayout((2, 16, 16), range(0)), SPARGE_BLOCKS) == range(1)


@pytest.mark.parametrize("order", ["tiles", "hilbert3d"])
def test_orders_can_be_used_under_grad_after_inference_mode(model: Transformer, order: str) -> None:
    q, k, v = structured(tokens=TOKENS)
    with sparse(model, order=order):
        with torch.inference_mode():
            model(900.0, q, k, v, {})
        q.requires_grad_()
        model(900.0, q, k, v, {}).sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize("hooked", ["before", "after"])
def test_hooks_that_go_and_come_between_generations_leave_it_at_work(model: Transformer, hooked: str) -> None:
    """Offloading removes its hooks and installs them again after every generation."""
    q, k, v = structured(tokens=TOKENS)
    if hooked == "before":
        add_hook_to_module(model, ModelHook())
    with sparse(model) as handle:
        if hooked == "after":
            add_hook_to_module(model, ModelHook())
        for _ in range(3):
            model(900.0, q, k, v, {})
            remove_hook_from_module(model, recurse=True)
            add_hook_to_module(model, ModelHook())
        assert handle.stats().num_calls == {"sparse": 3, "dense": 0, "fallback": 0}
        with pytest.raises(ModelError, match="transformer is sparse already"):
            sparse(model)
    assert torch.equal(model(900.0, q, k, v, {}), F.scaled_dot_product_attention(q, k, v))
    remove_hook_from_module(model, recurse=True)
    assert not hasattr(model.forward, "sparsetune_interception")
    sparse(model).remove()


@pytest.mark.filterwarnings("ignore")  # of torch.compile about numbers in the graph
def test_a_compiled_call_may_be_replaced_by_its_values(model: Transformer) -> None:
    q, k, v = structured(tokens=TOKENS)
    interception = Interception(sites(model), lambda call: call.v)
    try:
        model.attn.compile(backend="eager")
        output = model(900.0, q, k, v, {})
    finally:
        interception.remove()
        torch._dynamo.reset()
    assert torch.equal(output, v)
