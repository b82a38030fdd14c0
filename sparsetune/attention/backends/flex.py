"""PyTorch's FlexAttention under our block map, for GPUs where SpargeAttn isn't built."""

import functools
import importlib.util
import inspect
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sparsetune.attention.backends.backend import AttentionOutput
from sparsetune.attention.blockmap import SPARGE_BLOCKS, BlockShape, counted_block_map
from sparsetune.attention.thresholds import ThresholdTensors

_MIN_TOKENS = 128
_HEAD_DIMS = (16, 32, 64, 128, 256)
_MAX_KERNELS = 64  # in the cache
_COMPILER = "inductor"


class FlexBackend:
    """Attention at the inputs' own precision, one compiled kernel a shape.

    The kernel is PyTorch's; only the block map is ours. Outside of CUDA FlexAttention runs uncompiled, with the whole
    score matrix in memory: for tests. On a GPU both sides of a block must be multiples of 64; the default shape was the
    fastest of three on an H100 (docs/benchmarks.md).
    """

    name = "flex"

    def __init__(self, blocks: BlockShape = SPARGE_BLOCKS) -> None:
        self.blocks = blocks

    @staticmethod
    def missing(device: torch.device) -> str | None:
        """Return why FlexAttention's compiled kernel can't run on `device`; None where it can."""
        if device.type != "cuda":
            return f"the model is on {device.type}"
        if importlib.util.find_spec("triton") is None:
            return "triton, which compiles its kernel, is not installed"
        if torch.cuda.get_device_capability(device)[0] < 8:
            return f"{torch.cuda.get_device_name(device)} is older than Ampere"
        return None

    def refusal(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        if q.shape[-1] not in _HEAD_DIMS or v.shape[-1] not in _HEAD_DIMS:
            return f"head_dim {q.shape[-1]} isn't one of {', '.join(map(str, _HEAD_DIMS))}"
        return f"fewer than {_MIN_TOKENS} tokens" if q.shape[-2] < _MIN_TOKENS else None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, thresholds: ThresholdTensors, *, scale: float, keep: range
    ) -> AttentionOutput:
        """Attend under the block map of `thresholds`; `pvthreshd` skips nothing here."""
        computed, num_computed = counted_block_map(q, k, thresholds, self.blocks, keep)
        output = flex_under_map(q, k, v, computed, self.blocks, scale)
        return AttentionOutput(output, num_computed)


def flex_under_map(q: Tensor, k: Tensor, v: Tensor, computed: Tensor, blocks: BlockShape, scale: float) -> Tensor:
    """Softmax attention over the block pairs in `computed`, at least one a row, by FlexAttention."""
    if not q.is_cuda and torch.compiler.is_compiling():  # uncompiled, FlexAttention can't run in a traced operator
        mask = block_mask(computed, blocks, (q.shape[-2], k.shape[-2]), by_token=True)
        return _attend(q, k, v, mask, scale, None)
    output: Tensor = _under_map(q, k, v, computed, blocks.q, blocks.k, scale)
    return output


@torch.library.custom_op("sparsetune::flex_under_map", mutates_args=())
def _under_map(q: Tensor, k: Tensor, v: Tensor, computed: Tensor, block_q: int, block_k: int, scale: float) -> Tensor:
    """Run the kernel of this shape; one operator, so that a model's graph need not contain the mask's construction."""
    blocks = BlockShape(block_q, block_k)
    mask = block_mask(computed, blocks, (q.shape[-2], k.shape[-2]), by_token=not q.is_cuda)
    if not q.is_cuda:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile", UserWarning)
            return _attend(q, k, v, mask, scale, None).contiguous()
    kernel = _compiled(tuple(q.shape), tuple(k.shape), q.dtype, q.device, blocks)
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        return kernel(q, k, v, mask, scale, _tiles(blocks)).contiguous()


@_under_map.register_fake
def _shape_of_output(
    q: Tensor, k: Tensor, v: Tensor, computed: Tensor, block_q: int, block_k: int, scale: float
) -> Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])


def block_mask(computed: Tensor, blocks: BlockShape, lengths: tuple[int, int], *, by_token: bool) -> BlockMask:
    """Convert our block map to FlexAttention's: every computed block is a full one.

    `by_token` also defines the mask token by token, the only form that uncompiled FlexAttention reads.
    """
    num_blocks, indices = ordered_blocks(computed)
    none = torch.zeros_like(num_blocks)

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return computed[batch, head, query // blocks.q, key // blocks.k]

    # The lists by key block serve only the backward pass; older versions of PyTorch always make them.
    forward_only: dict[str, Any] = {"compute_q_blocks": False} if _CAN_SKIP_Q_BLOCKS else {}
    return BlockMask.from_kv_blocks(
        none, indices, num_blocks, indices, (blocks.q, blocks.k), allowed if by_token else None, lengths, **forward_only
    )


def ordered_blocks(computed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of each row's computed blocks, int32 (batch, heads, q blocks), and their indices, int32.

    The indices have the shape of `computed`: in ascending order, followed by those of the other blocks.
    """
    indices = computed.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return computed.sum(dim=-1, dtype=torch.int32), indices.to(torch.int32)


_CAN_SKIP_Q_BLOCKS = "compute_q_blocks" in inspect.signature(BlockMask.from_kv_blocks).parameters


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, options: Any) -> Tensor:
    return flex_attention(q, k, v, block_mask=mask, scale=scale, kernel_options=options)


@functools.lru_cache(_MAX_KERNELS)
def _compiled(*key: object) -> Callable[..., Tensor]:
    """Compile the kernel of one shape; `key` is the cache key.

    PyTorch counts recompilations by code object, and gives up after 8: so each shape gets its own copy.
    """
    copy = types.FunctionType(_attend.__code__.replace(), _attend.__globals__)
    # fullgraph: without it a shape beyond that limit would silently run uncompiled, with all scores in memory.
    compiled: Callable[..., Tensor] = torch.compile(copy, dynamic=False, fullgraph=True, backend=_COMPILER)
    return compiled


def _tiles(blocks: BlockShape) -> dict[str, int]:
    return {"BLOCK_M": min(blocks.q, 128), "BLOCK_N": min(blocks.k, 128)}
