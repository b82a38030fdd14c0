"""SpargeAttn's own CUDA kernels, through its package `spas_sage_attn`."""

import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from sparsetune.attention.backends.backend import Attended
from sparsetune.attention.blockmap import SPARGE_BLOCKS, SPARGE_BLOCKS_SM90, block_map
from sparsetune.attention.thresholds import ThresholdTensors

_HEAD_DIMS = (64, 128)
_FEWEST_TOKENS = 128
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""What the kernels take; they run float32 in float16."""


class SpargeBackend:
    """A thin adapter over `spas_sage_attn` (SpargeAttn's SageAttention2 kernels).

    Where the kept key blocks are none or just the first one, SpargeAttn's own call builds the block map
    (`attention_sink` keeps that block) and tells its sparsity, which waits for the GPU; for any other set the map is
    ours and `block_sparse_sage2_attn_cuda` runs it.

    Args:
        device: the GPU; Hopper has another block shape than the rest.

    Raises:
        ImportError: the package can't be imported; `missing` tells beforehand.
    """

    name = "sparge"

    def __init__(self, device: torch.device) -> None:
        self._kernels: ModuleType = importlib.import_module("spas_sage_attn")
        hopper = torch.cuda.get_device_capability(device)[0] == 9
        self.blocks = SPARGE_BLOCKS_SM90 if hopper else SPARGE_BLOCKS

    @staticmethod
    def missing(device: torch.device) -> str | None:
        """Say why the kernels can't run on `device`, or None where they can."""
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
        """Refuse what the kernels can't do: other head dimensions and dtypes, and short sequences."""
        if q.shape[-1] not in _HEAD_DIMS:
            return f"head_dim {q.shape[-1]} isn't 64 or 128"
        if q.dtype not in _DTYPES:
            return f"dtype {q.dtype} isn't float16, bfloat16 or float32"
        if q.shape[-2] < _FEWEST_TOKENS:
            return f"fewer than {_FEWEST_TOKENS} tokens"
        return None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, thresholds: ThresholdTensors, *, scale: float, keep: range
    ) -> Attended:
        """Attend with SpargeAttn's kernel; the output is quantised (int8 q and k, fp8 or fp16 v)."""
        if keep not in (range(0), range(0, 1)):
            return self._attend_own_map(q, k, v, thresholds, scale=scale, keep=keep)
        shared = {
            "is_causal": False,
            "scale": scale,
            "simthreshd1": thresholds.simthreshd1,
            "pvthreshd": thresholds.pvthreshd,
            "attention_sink": bool(keep),
            "tensor_layout": "HND",
            "return_sparsity": True,
        }
        if thresholds.rule == "cdf":
            kernel = self._kernels.spas_sage2_attn_meansim_cuda
            output, sparsity = kernel(q, k, v, cdfthreshd=thresholds.select, **shared)
        else:
            kernel = self._kernels.spas_sage2_attn_meansim_topk_cuda
            output, sparsity = kernel(q, k, v, topk=thresholds.select, **shared)
        num_q, num_k = self.blocks.counts(q.shape[-2], k.shape[-2])
        pairs = q.shape[0] * q.shape[1] * num_q * num_k
        # The kernel's figure is a float32 fraction; rounding gives back the whole number of pairs below 2^23.
        computed = torch.tensor([round((1.0 - sparsity) * pairs)], dtype=torch.float64, device=q.device)
        return Attended(output.to(q.dtype), computed)

    def _attend_own_map(
        self, q: Tensor, k: Tensor, v: Tensor, thresholds: ThresholdTensors, *, scale: float, keep: range
    ) -> Attended:
        computed = block_map(q, k, thresholds, self.blocks, keep)
        output = self._kernels.block_sparse_sage2_attn_cuda(
            q, k, v, mask_id=computed.contiguous(), scale=scale, pvthreshd=thresholds.pvthreshd, tensor_layout="HND"
        )
        return Attended(output.to(q.dtype), computed.sum(dim=(0, 2, 3), dtype=torch.float64))
