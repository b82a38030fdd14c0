"""Masks and head dimensions that a kernel doesn't support."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsetune.attention.backends import AttentionOutput, ReferenceBackend
from sparsetune.attention.interception import AttentionCall
from sparsetune.attention.ordering import TokenLayout
from sparsetune.attention.sites import LayerSite, TextPlace, TransformerCall
from sparsetune.attention.thresholds import HeadThresholds, LayerThresholds
from sparsetune.attention.unmask import Refusal, UnmaskedCall, attend_padded, head_dim_refusal, unmasked_call
from tests.attention.conftest import structured

GRID = (2, 8, 8)
TOKENS = 128 + 32
HIDDEN = torch.arange(TOKENS) >= 150


def call(mask: Tensor | None, text: TextPlace = "end", batch: int = 2) -> AttentionCall:
    q, k, v = structured(tokens=TOKENS, batch=batch)
    return AttentionCall(
        layer=LayerSite("transformer.attn", nn.Identity(), 3, 64, text),
        transformer=TransformerCall(torch.tensor(900.0), GRID),
        step=0,
        num_steps=3,
        q=q,
        k=k,
        v=v,
        mask=mask,
        is_causal=False,
        dropout=0.0,
        enable_gqa=False,
        scale=0.125,
    )


def keys(dtype: torch.dtype) -> Tensor:
    mask = torch.ones(2, 1, 1, TOKENS, dtype=torch.bool).masked_fill(HIDDEN, False)
    return mask if dtype == torch.bool else torch.zeros(mask.shape).masked_fill(~mask, -10000.0)


def square() -> Tensor:
    shown = ~HIDDEN
    return (shown[:, None] & shown).expand(2, 1, TOKENS, TOKENS)


@pytest.mark.parametrize(
    "mask", [keys(torch.bool), keys(torch.float32), keys(torch.bool).expand(2, 3, 1, TOKENS), square()], ids=range(4)
)
def test_padding_at_the_end_is_cut_off_and_the_output_is_the_masked_one(mask: Tensor) -> None:
    made = call(mask)
    plain = unmasked_call(made)
    assert isinstance(plain, UnmaskedCall)
    assert plain.q.shape[-2] == plain.k.shape[-2] == plain.layout.num_tokens == 150
    assert plain.layout.text == range(128, 150)
    output = plain.with_padding(F.scaled_dot_product_attention(plain.q, plain.k, plain.v, scale=plain.scale))
    torch.testing.assert_close(output, made.original(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("exact", [False, True])
def test_padding_between_text_and_video_is_cut_out(exact: bool) -> None:
    """As in Chroma: text first, padded to the longest prompt that the model takes."""
    shown = torch.ones(TOKENS, dtype=torch.bool)
    shown[10:32] = False
    made = call(shown[:, None] & shown if exact else shown[None], text="start")
    plain = unmasked_call(made)
    assert isinstance(plain, UnmaskedCall)
    assert plain.layout.text == range(10) and plain.layout.num_tokens == plain.q.shape[-2] == TOKENS - 22
    output = plain.with_padding(F.scaled_dot_product_attention(plain.q, plain.k, plain.v, scale=plain.scale))
    torch.testing.assert_close(output, made.original(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "mask",
    [None, torch.ones(2, 1, 1, TOKENS, dtype=torch.bool), torch.zeros(TOKENS, TOKENS)],
    ids=["no", "bool", "add"],
)
def test_a_mask_that_hides_nothing_is_dropped(mask: Tensor | None) -> None:
    plain = unmasked_call(call(mask))
    assert isinstance(plain, UnmaskedCall)
    assert plain.q.shape[-2] == TOKENS
    output = torch.zeros(2, 3, TOKENS, 64)
    assert plain.with_padding(output) is output


def test_keys_of_an_earlier_chunk_run_dense_with_the_reason() -> None:
    made = call(None)
    k, v = (torch.cat([x, x], dim=-2) for x in (made.k, made.v))
    assert unmasked_call(replace(made, k=k, v=v)) == Refusal(
        "there are more keys than queries, as with a cache of earlier chunks' or references' keys"
    )


def different_lengths() -> Tensor:
    mask = keys(torch.bool).clone()
    mask[1, ..., 140:] = False
    return mask


@pytest.mark.parametrize(
    ("mask", "text", "reason"),
    [
        (different_lengths(), "end", "the mask pads the batch's sequences to different lengths"),
        (keys(torch.bool).flip(-1), "end", "the mask hides tokens of the video"),
        (torch.full((TOKENS, TOKENS), -1.0), "end", "the call has an attention mask"),
        (torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(), "end", "the call has an attention mask"),
        (torch.zeros(1, 1, 1, TOKENS, dtype=torch.bool), "end", "the call has an attention mask"),
        (keys(torch.bool), "start", "the mask hides tokens of the video"),
        ((torch.arange(TOKENS) < 100).expand(2, 1, 1, TOKENS), "end", "the mask hides tokens of the video"),
    ],
    ids=range(7),
)
def test_other_masks_are_refused(mask: Tensor, text: TextPlace, reason: str) -> None:
    assert unmasked_call(call(mask, text)) == Refusal(reason)


def test_a_call_of_other_tokens_names_those_of_the_transformers_input() -> None:
    """Also where token positions define the layout, as in Flux."""
    positions = torch.cartesian_prod(torch.arange(1), torch.arange(8), torch.arange(32))
    made = replace(call(None), transformer=TransformerCall(torch.tensor(900.0), None, positions=positions))
    assert unmasked_call(made) == Refusal(f"{TOKENS} x {TOKENS} tokens where the transformer's input has 256")


class Narrow(ReferenceBackend):
    """Supports the same head dimensions as SpargeAttn's kernels, and records those it gets."""

    width = 0

    def refusal(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        return None if q.shape[-1] in (64, 128) else f"head_dim {q.shape[-1]} isn't 64 or 128"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *args, **kwargs) -> AttentionOutput:
        self.width = q.shape[-1]
        return super().attend(q, k, v, *args, **kwargs)


def plain(dim: int) -> UnmaskedCall:
    q, k, v = structured(tokens=400, dim=dim)
    return UnmaskedCall(q, k, v, TokenLayout((1, 20, 20), range(0)), dim**-0.5, q[..., :0, :])


@pytest.mark.parametrize(("dim", "width"), [(16, 64), (64, 64), (96, 128), (128, 128)])
def test_padding_is_exact_in_the_map_and_in_the_output(dim: int, width: int) -> None:
    call, backend = plain(dim), Narrow()
    thresholds = LayerThresholds.uniform("a", 3, HeadThresholds(-1.0, cdfthreshd=0.6)).tensors(torch.device("cpu"))
    assert head_dim_refusal(backend, call) is None
    padded = attend_padded(backend, call.q, call.k, call.v, thresholds, scale=call.scale, keep=range(1))
    exact = ReferenceBackend().attend(call.q, call.k, call.v, thresholds, scale=call.scale, keep=range(1))
    assert backend.width == width
    assert torch.equal(padded.computed, exact.computed)
    torch.testing.assert_close(padded.output, exact.output, atol=1e-5, rtol=1e-5)


def test_wider_heads_are_refused_with_the_backends_reason() -> None:
    assert head_dim_refusal(Narrow(), plain(192)) == "head_dim 192 isn't 64 or 128"
