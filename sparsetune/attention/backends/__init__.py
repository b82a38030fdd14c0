"""Attention backends by name, and the choice of one."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparsetune.attention.backends.backend import AttentionOutput, Backend, DenseBackend
from sparsetune.attention.backends.flex import FlexBackend
from sparsetune.attention.backends.reference import ReferenceBackend
from sparsetune.attention.backends.sparge import SpargeBackend
from sparsetune.errors import BackendError

__all__ = [
    "BACKENDS",
    "AttentionOutput",
    "Backend",
    "BackendChoice",
    "DenseBackend",
    "FlexBackend",
    "ReferenceBackend",
    "SpargeBackend",
    "backend_choice",
    "choose_backend",
    "missing_backends",
    "skips_work",
]

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "sparge", "flex", "dense")

_REQUIREMENTS = {
    "sparge": "spas_sage_attn and a CUDA GPU, but {}; "
    "use --backend reference, or install it from https://github.com/thu-ml/SpargeAttn",
    "flex": "a CUDA GPU, Ampere or newer, but {}; use --backend reference",
}


@dataclass(frozen=True)
class BackendChoice:
    """A backend, and why it was chosen."""

    backend: Backend
    reason: str


_SKIP_WORK = {"sparge", "flex"}


def skips_work(kernel: str) -> bool:
    """Whether a kernel leaves out the block pairs that a policy drops, so that sparsity saves seconds."""
    return kernel in _SKIP_WORK


def missing_backends(device: torch.device) -> dict[str, str | None]:
    """Return for each backend why it can't run on `device`; None where it can."""
    return {
        "sparge": SpargeBackend.missing(device),
        "flex": FlexBackend.missing(device),
        "reference": None,
        "dense": None,
    }


def backend_choice(name: str, device: torch.device) -> BackendChoice:
    """Choose the backend of that name for tensors on `device`; BackendError where it is unknown or can't run here.

    `auto` is SpargeAttn's kernel where it can run, FlexAttention on other GPUs that can run that, and the plain
    PyTorch reference elsewhere.
    """
    if name not in BACKENDS:
        raise BackendError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    missing = missing_backends(device)
    if name != "auto":
        if why_not := missing[name]:
            raise BackendError(f"backend {name} needs {_REQUIREMENTS[name].format(why_not)}")
        return BackendChoice(_MAKERS[name](device), "asked for")
    chosen = next(candidate for candidate, why_not in missing.items() if why_not is None)
    why = "; ".join(f"not {other}: {why_not}" for other, why_not in missing.items() if why_not is not None)
    reason = f"auto; {why}" if why else "auto: the fastest of those that run here"
    if device.type == "cuda":
        _log_once(chosen, reason)
    return BackendChoice(_MAKERS[chosen](device), reason)


@functools.cache
def _log_once(chosen: str, reason: str) -> None:
    level = logging.WARNING if chosen == "reference" else logging.INFO
    slow = ", which is slow" if chosen == "reference" else ""
    logger.log(level, "sparse attention runs on backend %s%s (%s)", chosen, slow, reason)


def choose_backend(name: str, device: torch.device) -> Backend:
    return backend_choice(name, device).backend


_MAKERS: dict[str, Callable[[torch.device], Backend]] = {
    "sparge": SpargeBackend,
    "flex": lambda device: FlexBackend(),
    "reference": lambda device: ReferenceBackend(),
    "dense": lambda device: DenseBackend(),
}
