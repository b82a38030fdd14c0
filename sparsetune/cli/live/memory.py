"""The memory that the work holds, read without waking any library that isn't at work."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_GIB = 1024.0**3
_STATM = Path("/proc/self/statm")


@dataclass(frozen=True)
class Memory:
    """What this process holds, in GiB.

    Args:
        process: resident memory; None where the system doesn't tell.
        gpu: what PyTorch holds on its GPU; None where no GPU is in use, as for the others.
        gpu_peak: the most that it held.
        gpu_total: of that GPU.
    """

    process: float | None = None
    gpu: float | None = None
    gpu_peak: float | None = None
    gpu_total: float | None = None

    @property
    def text(self) -> str:
        """Say it in a line; empty where nothing is known."""
        parts = []
        if self.gpu is not None and self.gpu_peak is not None and self.gpu_total is not None:
            parts.append(f"GPU {self.gpu:.1f} of {self.gpu_total:.1f} GiB, peak {self.gpu_peak:.1f}")
        if self.process is not None:
            parts.append(f"process {self.process:.1f} GiB")
        return ", ".join(parts)


def read_memory() -> Memory:
    """Read it now. PyTorch is asked only where it is imported and uses a GPU already."""
    torch: Any = sys.modules.get("torch")
    process = _resident()
    cuda = getattr(torch, "cuda", None)
    if cuda is None or not cuda.is_initialized():
        return Memory(process)
    device = cuda.current_device()
    return Memory(
        process,
        cuda.memory_reserved(device) / _GIB,
        cuda.max_memory_reserved(device) / _GIB,
        cuda.get_device_properties(device).total_memory / _GIB,
    )


def _resident() -> float | None:
    try:
        pages = int(_STATM.read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None  # not Linux
    return pages * os.sysconf("SC_PAGE_SIZE") / _GIB
