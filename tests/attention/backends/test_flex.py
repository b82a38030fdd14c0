"""FlexAttention with our block map; on the CPU it runs uncompiled, so compilation is only traced here."""

import pytest
import torch

from sparsetune.attention.backends import FlexBackend, ReferenceBackend, flex
from sparsetune.attention.backends.flex import block_mask, flex_under_map, ordered_blocks
from sparsetune.attention.backends.reference import masked_attention
from sparsetune.attention.blockmap import SPARGE_BLOCKS, SPARGE_BLOCKS_SM90, BlockShape
from sparsetune.attention.thresholds import HeadThresholds, LayerThresholds
from tests.attention.conftest import structured


@pytest.mark.parametrize("blocks", [SPARGE_BLOCKS, SPARGE_BLOCKS_SM90, BlockShape(128, 128)], ids=str)
@pytest.mark.parametrize("select_partial", [False, True])
def test_flex_is_the_reference_under_the_same_map(blocks: BlockShape, select_partial: bool) -> None:
    q, k, v = structured(heads=2, tokens=500)
    head = HeadThresholds(-1.0, cdfthreshd=0.8)
    given = LayerThresholds("layer", (head, head)).tensors(q.device, select_partial=select_partial)
    found = FlexBackend(blocks).attend(q, k, v, given, scale=0.125, keep=range(1))
    wanted = ReferenceBackend(blocks).attend(q, k, v, given, scale=0.125, keep=range(1))
    assert torch.equal(found.computed, wanted.computed)
    torch.testing.assert_close(found.output, wanted.output, atol=1e-5, rtol=1e-5)


def test_a_partial_last_block_may_be_left_out_and_its_row_may_be_short() -> None:
    q, k, v = structured(heads=2, tokens=500)
    used = torch.zeros(2, 2, 4, 8, dtype=torch.bool)
    used[..., 0] = True
    used[:, 0, -1] = False
    used[:, 0, -1, -1] = True
    found = flex_under_map(q, k, v, used, SPARGE_BLOCKS, 0.125)
    torch.testing.assert_close(found, masked_attention(q, k, v, used, SPARGE_BLOCKS, 0.125), atol=1e-5, rtol=1e-5)


def test_blocks_are_listed_in_ascending_order() -> None:
    used = torch.tensor([[[[True, False, True, True], [False, True, False, False]]]])
    count, indices = ordered_blocks(used)
    assert count.tolist() == [[[3, 1]]]
    assert indices.tolist() == [[[[0, 2, 3, 1], [1, 0, 2, 3]]]]
    assert count.dtype == indices.dtype == torch.int32


def test_more_shapes_than_pytorch_recompiles_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_COMPILER", "eager")
    with torch._dynamo.config.patch(recompile_limit=1):
        for tokens in (130, 260):
            q, k, v = structured(heads=1, tokens=tokens, batch=1)
            used = torch.ones(1, 1, -(-tokens // 128), -(-tokens // 64), dtype=torch.bool)
            mask = block_mask(used, SPARGE_BLOCKS, (tokens, tokens), by_token=False)
            kernel = flex._compiled("eager", tokens)
            assert kernel is flex._compiled("eager", tokens)
            wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            torch.testing.assert_close(kernel(q, k, v, mask, 0.125, {}), wanted, atol=1e-5, rtol=1e-5)


def test_it_runs_in_a_compiled_function() -> None:
    q, k, v = structured(heads=2, tokens=300)
    given = LayerThresholds.uniform("layer", 2, HeadThresholds(-1.0, cdfthreshd=0.8)).tensors(q.device)
    backend = FlexBackend()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return backend.attend(q, k, v * 2, given, scale=0.125, keep=range(1)).output + 1

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)(q, k, v)
    torch.testing.assert_close(compiled, attend(q, k, v), atol=1e-5, rtol=1e-5)


def test_the_operator_keeps_its_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    # Uncompiled FlexAttention doesn't run within an operator that is being traced.
    monkeypatch.setattr(flex, "_attend", lambda q, k, v, mask, scale, options: 2 * q)
    q, k, v = structured(heads=2, tokens=300)
    used = torch.ones(q.shape[0], 2, 3, 5, dtype=torch.bool)
    torch.library.opcheck(flex._under_map, (q.transpose(1, 2).contiguous().transpose(1, 2), k, v, used, 128, 64, 0.1))


@pytest.mark.parametrize(("tokens", "dim", "reason"), [
    (500, 96, "head_dim 96 isn't one of 16, 32, 64, 128, 256"),
    (100, 64, "fewer than 128 tokens"),
    (500, 64, None),
])  # fmt: skip
def test_what_the_kernel_cant_do_is_refused(tokens: int, dim: int, reason: str | None) -> None:
    q, k, v = structured(heads=1, tokens=tokens, dim=dim)
    assert FlexBackend().refusal(q, k, v) == reason
