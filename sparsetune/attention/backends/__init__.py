"""The kernels that an attention call can run on, and how one is chosen."""

import logging

import torch

from sparsetune.attention.backends.backend import Attended, Backend
from sparsetune.attention.backends.dense import DenseBackend
from sparsetune.attention.backends.reference import ReferenceBackend
from sparsetune.attention.backends.sparge import SpargeBackend
from sparsetune.errors import BackendError

__all__ = ["BACKENDS", "Attended", "Backend", "DenseBackend", "ReferenceBackend", "SpargeBackend", "choose_backend"]

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "sparge", "dense")


def choose_backend(name: str, device: torch.device) -> Backend:
    """Make the backend of that name for tensors on `device`.

    `auto` is SpargeAttn's kernel where it can run and the plain PyTorch reference elsewhere.

    Raises:
        BackendError: the name is unknown, or the backend can't run here.
    """
    if name == "auto":
        reason = SpargeBackend.missing(device)
        if reason and device.type == "cuda":
            logger.warning("sparse attention runs on the reference backend, which is slow: %s", reason)
        return ReferenceBackend() if reason else SpargeBackend(device)
    if name == "reference":
        return ReferenceBackend()
    if name == "dense":
        return DenseBackend()
    if name == "sparge":
        if reason := SpargeBackend.missing(device):
            raise BackendError(
                f"backend sparge must have spas_sage_attn and a CUDA GPU, but {reason}; "
                "use --backend reference, or install it as https://github.com/thu-ml/SpargeAttn says"
            )
        return SpargeBackend(device)
    raise BackendError(f"backend must be one of {', '.join(BACKENDS)}, but is {name!r}")
