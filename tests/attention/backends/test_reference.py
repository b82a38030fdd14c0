import pytest
import torch
import torch.nn.functional as F

from sparsetune.attention.backends import reference
from sparsetune.attention.backends.reference import ReferenceBackend, masked_attention
from sparsetune.attention.blockmap import SPARGE_BLOCKS, SPARGE_BLOCKS_SM90, block_map
from sparsetune.attention.thresholds import HeadThresholds, LayerThresholds
from tests.attention.conftest import structured

DENSE = HeadThresholds(1.0, cdfthreshd=1.0, is_sparse=False)


def tensors(*heads: HeadThresholds):
    return LayerThresholds("layer", heads).tensors(torch.device("cpu"))


@pytest.mark.parametrize("blocks", [SPARGE_BLOCKS, SPARGE_BLOCKS_SM90])
def test_full_density_is_dense_attention_bit_for_bit(blocks) -> None:
    q, k, v = structured()
    attended = ReferenceBackend(blocks).attend(q, k, v, tensors(DENSE, DENSE, DENSE), scale=0.125, keep=range(0))
    assert torch.equal(attended.output, F.scaled_dot_product_attention(q, k, v, scale=0.125))
    num_q, num_k = blocks.counts(1000, 1000)
    assert attended.computed.tolist() == [2.0 * num_q * num_k] * 3


def test_attention_under_a_map_is_softmax_over_its_blocks() -> None:
    q, k, v = structured(heads=2, tokens=1000)
    head = HeadThresholds(-1.0, cdfthreshd=0.6)
    used = block_map(q, k, tensors(head, head), SPARGE_BLOCKS)
    tokens = used.repeat_interleave(128, 2).repeat_interleave(64, 3)[..., :1000, :1000]
    scores = (q.double() @ k.double().transpose(-1, -2) / 8).masked_fill(~tokens, -torch.inf)
    wanted = scores.softmax(-1) @ v.double()
    found = masked_attention(q, k, v, used, SPARGE_BLOCKS, 0.125)
    assert (found - wanted).norm() / wanted.norm() < 1e-5


def test_slabs_give_the_same_as_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = structured(tokens=700)
    used = torch.rand(2, 3, 6, 11, generator=torch.Generator().manual_seed(0)) > 0.5
    used[..., 0] = True
    whole = masked_attention(q, k, v, used, SPARGE_BLOCKS, 0.125)
    monkeypatch.setattr(reference, "_MASK_ENTRIES", 1)
    torch.testing.assert_close(masked_attention(q, k, v, used, SPARGE_BLOCKS, 0.125), whole, atol=1e-5, rtol=1e-5)


def test_a_low_pvthreshd_changes_the_output_and_not_the_sparsity() -> None:
    q, k, v = structured(heads=1)
    plain = HeadThresholds(-1.0, cdfthreshd=0.95)
    skipping = HeadThresholds(-1.0, cdfthreshd=0.95, pvthreshd=1.0)
    one = ReferenceBackend().attend(q, k, v, tensors(plain), scale=0.125, keep=range(0))
    other = ReferenceBackend().attend(q, k, v, tensors(skipping), scale=0.125, keep=range(0))
    assert one.computed.equal(other.computed)
    assert not one.output.equal(other.output)


def test_short_sequences_are_refused() -> None:
    q, k, v = structured(tokens=100)
    assert ReferenceBackend().refusal(q, k, v) == "fewer than 128 tokens"
