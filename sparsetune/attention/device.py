"""Devices: their names, the one that a setting means, and what Triton can run on."""

import platform

import torch
from torch import Tensor

_TRITON_DIMS = (16, 32, 64, 128, 256)


def device_name(device: torch.device) -> str:
    """Return the product name, e.g. `NVIDIA H100 80GB HBM3`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def device_of(setting: str) -> torch.device:
    """Return the device of a setting: `auto` is a GPU where there is one, else the CPU; others are PyTorch's names."""
    if setting == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(setting)


def fits_triton(x: Tensor) -> bool:
    """Whether our Triton kernels can read x (…, head_dim): on a GPU, with 16, 32 to 256 channels side by side."""
    return x.is_cuda and x.stride(-1) == 1 and x.shape[-1] in _TRITON_DIMS
