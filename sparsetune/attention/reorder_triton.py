"""Triton kernel that gathers tokens by position; `ordering.Permutation` calls it for CUDA tensors."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS_AT_ONCE = 128
_MAX_TENSORS = 3  # in one launch


def reorder(tensors: list[Tensor], positions: Tensor, of_head: Tensor | None) -> list[Tensor]:
    """Read each head's tokens at its positions, of up to three tensors in one launch; exact, contiguous.

    The tensors, (batch, heads, tokens, head_dim), have one shape, and any strides but 1 for the last; head_dim must be
    a power of two. The positions are those of `ordering.Permutation`, contiguous.
    """
    # torch.compile can't trace the choice of the GPU around a kernel; in eager mode the operator would only cost time.
    launch = _reorder_tokens if torch.compiler.is_compiling() else _launch
    read: list[Tensor] = launch(tensors, positions, of_head)
    return read


def _launch(tensors: list[Tensor], positions: Tensor, of_head: Tensor | None) -> list[Tensor]:
    batch, heads, tokens, dim = tensors[0].shape
    read = _outputs(tensors, positions, of_head)
    x, y, z = (tensors * _MAX_TENSORS)[:_MAX_TENSORS]
    x_read, y_read, z_read = (read * _MAX_TENSORS)[:_MAX_TENSORS]
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _reorder[(triton.cdiv(tokens, _TOKENS_AT_ONCE), batch * heads, len(tensors))](
            x, y, z, x_read, y_read, z_read, positions, positions if of_head is None else of_head, heads, tokens,
            *x.stride()[:3], *y.stride()[:3], *z.stride()[:3],
            DIM=dim, BLOCK=_TOKENS_AT_ONCE, BY_HEAD=of_head is not None,
        )  # fmt: skip
    return read


def _outputs(tensors: list[Tensor], positions: Tensor, of_head: Tensor | None) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in tensors]


_reorder_tokens = torch.library.custom_op("sparsetune::reorder", _launch, mutates_args=())
_reorder_tokens.register_fake(_outputs)


@triton.jit  # type: ignore[untyped-decorator]
def _reorder(  # type: ignore[no-untyped-def]
    x, y, z, x_read, y_read, z_read, positions, of_head, heads, tokens,
    x_batch, x_head, x_token, y_batch, y_head, y_token, z_batch, z_head, z_token,
    DIM: tl.constexpr, BLOCK: tl.constexpr, BY_HEAD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    if BY_HEAD:
        positions += tl.load(of_head + head) * tokens
    place = tl.load(positions + token, mask=inside, other=0)
    target = (row * tokens + token) * DIM
    if tl.program_id(2) == 0:
        _copy(x + batch * x_batch + head * x_head, place * x_token, x_read, target, inside, DIM)
    elif tl.program_id(2) == 1:
        _copy(y + batch * y_batch + head * y_head, place * y_token, y_read, target, inside, DIM)
    else:
        _copy(z + batch * z_batch + head * z_head, place * z_token, z_read, target, inside, DIM)


@triton.jit  # type: ignore[untyped-decorator]
def _copy(source, places, read, targets, inside, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    channel = tl.arange(0, DIM)[None, :]
    values = tl.load(source + places[:, None] + channel, mask=inside[:, None])
    tl.store(read + targets[:, None] + channel, values, mask=inside[:, None])
