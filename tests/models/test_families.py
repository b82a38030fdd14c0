"""Families by data: known ones, those that a user registers, and models of none."""

import logging
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from sparsetune.attention.ordering import TokenLayout
from sparsetune.attention.policy import Policy
from sparsetune.attention.sites import TransformerCall
from sparsetune.attention.thresholds import HeadThresholds
from sparsetune.errors import ModelError
from sparsetune.models import calls, families
from sparsetune.models.families import attention_sites, family_named, register_family
from sparsetune.models.family import Family, LayerRule
from sparsetune.models.family_table import FAMILIES, REFUSED
from sparsetune.models.sparsify import _with_diffusers_names, sparsify
from tests.models.bare_cases import line, places
from tests.models.cases import drawn
from tests.models.support import DENSE, HALF, Alone, policy

TEXT, GRID = 32, (2, 8, 16)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 2, 32
        self.qkv = nn.Linear(64, 192)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each.unflatten(-1, (2, 32)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = SelfAttention()
        self.cross_attn = SelfAttention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x)


class MyTransformer(nn.Module):
    """Of a model that nobody has heard of: text before the tokens of a video."""

    def __init__(self) -> None:
        super().__init__()
        self.text_blocks = nn.ModuleList([Block()])
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, hidden_states: Tensor, context: Tensor, timestep: Tensor, return_dict: bool) -> tuple[Tensor]:
        x = torch.cat([self.text_blocks[0](context), hidden_states.flatten(2).transpose(1, 2)], 1) + timestep
        for block in self.blocks:
            x = block(x)
        return (x[:, TEXT:],)


@pytest.fixture
def pipe() -> Any:
    torch.manual_seed(0)
    inputs = {"hidden_states": drawn(1, 64, *GRID), "context": drawn(1, TEXT, 64)}
    return Alone(MyTransformer(), FlowMatchEulerDiscreteScheduler(), inputs, "timestep")


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(families, "_registered", [])
    yield


def render(pipe: Any) -> Tensor:
    with torch.inference_mode():
        return pipe(num_inference_steps=2)[0]


def test_an_unknown_transformer_runs_with_a_warning(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    dense = render(pipe)
    assert [layer.name for layer in attention_sites(pipe).layers] == [f"transformer.blocks.{i}.attn" for i in range(2)]
    with sparsify(pipe, policy(pipe, HALF, order="hilbert"), "reference") as handle:
        assert not torch.equal(render(pipe), dense)
        assert handle.stats().num_calls == {"sparse": 4, "dense": 0, "fallback": 0}
        assert len(handle.stats().by_step) == 2
    (message,) = caplog.messages
    assert message.startswith("MyTransformer is of no known family: its tokens count as one row")
    with sparsify(pipe, policy(pipe, DENSE), "reference"):
        assert torch.equal(render(pipe), dense)
    assert torch.equal(render(pipe), dense)


def seen(pipe: Any, monkeypatch: pytest.MonkeyPatch, **rest: Any) -> set[TokenLayout]:
    """Return the layouts that a policy's token order was made for."""
    from sparsetune.attention import handle as module

    found, permutation = set(), module.permutation

    def recorded(order: Any, layout: TokenLayout, device: Any) -> Any:
        found.add(layout)
        return permutation(order, layout, device)

    monkeypatch.setattr(module, "permutation", recorded)
    with sparsify(pipe, policy(pipe, HALF, order="hilbert", keep_text=True), "reference", **rest) as handle:
        render(pipe)
        assert handle.stats().fallbacks == {}
    return found


def test_a_layout_is_that_of_every_layer(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    layout = TokenLayout(GRID, range(TEXT))
    assert seen(pipe, monkeypatch, layout=layout) == {layout}
    assert not caplog.messages


def test_a_layout_of_another_length_runs_dense_and_says_so(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    with sparsify(pipe, policy(pipe, HALF), "reference", layout=TokenLayout((9, 9, 9), range(0))) as handle:
        render(pipe)
        (reason,) = handle.stats().fallbacks
    assert reason == "288 x 288 tokens where the transformer's input has 729"


def test_a_registered_family_is_used(
    pipe: Any, registry: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipe.transformer.config = type("Config", (), {"patch_size": 1})
    layers = (LayerRule(r"blocks\.\d+\.attn", text="start"),)
    register_family(Family("mine", "MyTransformer", layers, calls.latents_call, steps=calls.flow_times))
    assert seen(pipe, monkeypatch) == {TokenLayout(GRID, range(TEXT))}
    assert not caplog.messages


def test_families_and_refusals_name_classes_of_diffusers() -> None:
    known = {family.transformer_class for family in FAMILIES}
    assert not known & REFUSED.keys()
    assert [name for name in (*known, *REFUSED) if not hasattr(diffusers, name)] == []
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_transformer_that_can_t_be_sparse_is_refused_with_its_reason(kind: str) -> None:
    with pytest.raises(ModelError) as caught:
        family_named("SomePipeline", kind)
    assert str(caught.value) == f"SomePipeline with transformer {kind} is not supported: {REFUSED[kind]}"


def test_a_pipeline_without_a_transformer_is_refused() -> None:
    pipe = type("StableDiffusionPipeline", (), {"transformer": None})()
    with pytest.raises(ModelError, match="StableDiffusionPipeline has no transformer; sparse attention needs one"):
        attention_sites(pipe)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("flux", {"double_blocks.3.img_attn": "transformer_blocks.3.attn",
                  "single_blocks.11": "single_transformer_blocks.11.attn",
                  "transformer_blocks.3.attn": "transformer_blocks.3.attn"}),
        ("hunyuan-video", {"double_blocks.0.attn": "transformer_blocks.0.attn"}),
        ("mochi", {"blocks.2.attn": "transformer_blocks.2.attn1"}),
        ("wan", {"blocks.2.self_attn": "blocks.2.attn1"}),
    ],
)  # fmt: skip
def test_layers_named_by_the_model_s_own_code_are_found(family: str, names: dict[str, str]) -> None:
    found = next(one for one in FAMILIES if one.name == family)
    for name, wanted in names.items():
        renamed = _with_diffusers_names(
            Policy.uniform([(f"transformer.{name}", 2)], HeadThresholds(0.6, cdfthreshd=0.98)), found
        )
        assert renamed.layers[0].name == f"transformer.{wanted}"


@pytest.mark.parametrize(
    ("positions", "last", "grid", "tail"),
    [
        (torch.cat([line(32), places(2, 4, 6, 50)]), True, (2, 4, 6), 0),
        (torch.cat([line(32) * 0, places(1, 4, 6)]), True, (1, 4, 6), 0),  # text at the place of the first token
        (torch.cat([line(5), places(3, 4, 6, 10).double() * 0.37]), True, (3, 4, 6), 0),
        (torch.cat([places(1, 4, 4), places(1, 4, 6, 10)]), True, (1, 4, 6), 0),  # an image of another size before
        (torch.cat([places(1, 4, 6, 512), places(1, 2, 2, 10)]), False, (1, 4, 6), 4),
    ],
)
def test_the_grid_is_found_in_positions(positions: Tensor, last: bool, grid: tuple[int, ...], tail: int) -> None:
    call = TransformerCall(torch.tensor(0.5), None, positions=positions, grid_last=last)
    assert call.grid_and_tail() == (grid, tail)


def test_a_reference_before_the_video_at_its_end_counts_as_text() -> None:
    """As in MiniMax-H3: text, condition frames and audio come before the video that is rendered."""
    positions = torch.cat([line(32), places(1, 4, 6), line(10, 40), places(3, 4, 6, 50)])
    assert TransformerCall(torch.tensor(0.5), None, positions=positions, grid_last=True).grid_and_tail() == (
        (3, 4, 6),
        0,
    )


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
