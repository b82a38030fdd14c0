import pytest
import torch
from torch import Tensor

from sparsetune.attention.backends import AttentionOutput, ReferenceBackend
from sparsetune.attention.ordering import TokenLayout
from sparsetune.attention.thresholds import HeadThresholds, LayerThresholds
from sparsetune.attention.unmask import UnmaskedCall, attend_padded, head_dim_refusal
from tests.attention.conftest import structured


class Narrow(ReferenceBackend):
    """Runs what SpargeAttn's kernels run, and remembers how wide the heads were."""

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
