"""Token orders as a Triton kernel; docs/benchmarks.md has the results on an H100."""

import pytest
import torch

from sparsetune.attention.ordering import TokenLayout, permutation

pytestmark = pytest.mark.gpu

LAYOUT = TokenLayout((5, 17, 16), range(33))


# The kernel takes strides as arguments, so all memory layouts are tested with one dtype and number of channels. Each
# further dtype or number of channels is another kernel to compile.
CASES = [
    (torch.bfloat16, 64, "heads outside"),
    (torch.bfloat16, 64, "tokens outside"),
    (torch.bfloat16, 64, "cut off"),
    (torch.bfloat16, 64, "of one fused tensor"),
    (torch.float16, 64, "tokens outside"),
    (torch.bfloat16, 128, "tokens outside"),
    (torch.float32, 128, "of one fused tensor"),
    (torch.bfloat16, 72, "heads outside"),  # not a power of two: plain PyTorch, which copies rows as they lie
    (torch.bfloat16, 72, "tokens outside"),
    (torch.float32, 72, "of one fused tensor"),
]


@pytest.mark.parametrize("order", ["hilbert", ("whf", "raster", "hfw")], ids=str)
@pytest.mark.parametrize(("dtype", "dim", "memory"), CASES, ids=str)
def test_tokens_are_read_as_on_the_cpu_to_the_last_bit(
    order: object, dtype: torch.dtype, dim: int, memory: str
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, LAYOUT.num_tokens, dim, device="cuda").to(dtype)
    if memory == "tokens outside":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif memory == "cut off":
        x = torch.cat([x, x], dim=-2)[..., : LAYOUT.num_tokens, :]
    elif memory == "of one fused tensor":
        x = torch.cat([x, x, x], dim=-1)[..., dim : 2 * dim]
    here, there = permutation(order, LAYOUT), permutation(order, LAYOUT, "cuda")
    assert here is not None and there is not None
    ordered = there.order(x)
    assert torch.equal(ordered.cpu(), here.order(x.cpu()))
    assert torch.equal(there.undo(ordered), x)


@pytest.mark.parametrize("dtype_of_v", [torch.bfloat16, torch.float16], ids=str)
def test_q_k_and_v_are_ordered_at_once_whatever_their_memory(dtype_of_v: torch.dtype) -> None:
    path = permutation(("whf", "raster", "hfw"), LAYOUT, "cuda")
    assert path is not None
    q, k, v = torch.randn(3, 2, 3, LAYOUT.num_tokens, 64, device="cuda").to(torch.bfloat16)
    tensors = (q, k.transpose(1, 2).contiguous().transpose(1, 2), torch.cat([v, v], dim=-1)[..., :64].to(dtype_of_v))
    for ordered, x in zip(path.order_qkv(*tensors), tensors, strict=True):
        assert torch.equal(ordered, path.order(x))
        assert ordered.is_contiguous()


def test_a_compiled_function_keeps_one_graph() -> None:
    path = permutation(("whf", "raster", "hfw"), LAYOUT, "cuda")
    assert path is not None
    x = torch.randn(1, 3, LAYOUT.num_tokens, 64, device="cuda")
    compiled = torch.compile(lambda x: path.undo(path.order(x) * 2.0), fullgraph=True)
    assert torch.equal(compiled(x), x * 2.0)
