"""What computes, by name."""

import platform

import torch


def device_name(device: torch.device) -> str:
    """Name the device as a person would, e.g. `NVIDIA H100 80GB HBM3`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()
