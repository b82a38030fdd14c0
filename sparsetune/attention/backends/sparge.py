"""SpargeAttn's own CUDA kernels, through its package `spas_sage_attn`."""

import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from sparsetune.attention.backends.backend import AttentionOutput
from sparsetune.attention.blockmap import SPARGE_BLOCKS, SPARGE_BLOCKS_SM90, counted_block_map
from sparsetune.attention.thresholds import ThresholdTensors

_HEAD_DIMS = (64, 128)
_MIN_TOKENS = 128
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # the kernels run float32 in float16


class SpargeBackend:
    """A thin adapter over `spas_sage_attn` (SpargeAttn's SageAttention2 kernels); ImportError without it.

    The block map is ours, by SpargeAttn's rule, and `block_sparse_sage2_attn_cuda` runs it: so every set of kept
    blocks and every token order works, blocks are counted by head, and nothing waits for the GPU.
    """

    name = "sparge"

    def __init__(self, device: torch.device) -> None:
        _package()
        hopper = torch.cuda.get_device_capability(device)[0] == 9
        self.blocks = SPARGE_BLOCKS_SM90 if hopper else SPARGE_BLOCKS

    @staticmethod
    def missing(device: torch.device) -> str | None:
        """Return why the kernels can't run on `device`; None where they can."""
        if device.type != "cuda":
            return f"the model is on {device.type}"
        if importlib.util.find_spec("spas_sage_attn") is None:
            return "spas_sage_attn is not installed"
        try:
            importlib.import_module("spas_sage_attn")
        except (ImportError, OSError) as error:  # built for another torch or CUDA
            return f"spas_sage_attn can't be imported ({' '.join(str(error).split())[:120]})"
        if torch.cuda.get_device_capability(device)[0] < 8:
            return f"{torch.cuda.get_device_name(device)} is older than Ampere"
        return None

    def refusal(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        if q.shape[-1] not in _HEAD_DIMS:
            return f"head_dim {q.shape[-1]} isn't 64 or 128"
        if q.dtype not in _DTYPES:
            return f"dtype {q.dtype} isn't float16, bfloat16 or float32"
        if q.shape[-2] < _MIN_TOKENS:
            return f"fewer than {_MIN_TOKENS} tokens"
        return None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, thresholds: ThresholdTensors, *, scale: float, keep: range
    ) -> AttentionOutput:
        """Attend with SpargeAttn's kernel; the output is quantised (int8 q and k, fp8 or fp16 v)."""
        computed, num_computed = counted_block_map(q, k, thresholds, self.blocks, keep)
        # An operator only where it is needed, since it costs time: for torch.compile, and to refuse a backward pass.
        run = sparge_under_map if torch.compiler.is_compiling() or torch.is_grad_enabled() else _under_map
        output: Tensor = run(q, k, v, computed, thresholds.pvthreshd, scale)
        return AttentionOutput(output, num_computed)


def _under_map(q: Tensor, k: Tensor, v: Tensor, computed: Tensor, pvthreshd: Tensor, scale: float) -> Tensor:
    """SpargeAttn's attention over the block pairs in `computed`, blocks of its shape on this GPU; contiguous."""
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]  # SpargeAttn changes the current GPU
        output: Tensor = _package().block_sparse_sage2_attn_cuda(
            q, k, v, mask_id=computed.contiguous(), scale=scale, pvthreshd=pvthreshd, tensor_layout="HND"
        )
    return output.to(q.dtype)


sparge_under_map = torch.library.custom_op("sparsetune::sparge_under_map", _under_map, mutates_args=())


@sparge_under_map.register_fake
def _shape_of_output(q: Tensor, k: Tensor, v: Tensor, computed: Tensor, pvthreshd: Tensor, scale: float) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _package() -> ModuleType:
    return importlib.import_module("spas_sage_attn")
