"""The kernels that an attention call can run on, and how one is chosen."""

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
    "Choice",
    "DenseBackend",
    "FlexBackend",
    "ReferenceBackend",
    "SpargeBackend",
    "backend_choice",
    "choose_backend",
    "missing_backends",
]

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "sparge", "flex", "dense")

_REMEDIES = {
    "sparge": "have spas_sage_attn and a CUDA GPU, but {}; "
    "use --backend reference, or install it as https://github.com/thu-ml/SpargeAttn says",
    "flex": "have a CUDA GPU, Ampere or newer, but {}; use --backend reference",
}


@dataclass(frozen=True)
class Choice:
    """A backend, and why it is this one in a few words."""

    backend: Backend
    reason: str


def missing_backends(device: torch.device) -> dict[str, str | None]:
    """Say of each backend why it can't run on `device`; None where it can."""
    return {
        "sparge": SpargeBackend.missing(device),
        "flex": FlexBackend.missing(device),
        "reference": None,
        "dense": None,
    }


def backend_choice(name: str, device: torch.device) -> Choice:
    """Make the backend of that name for tensors on `device`, and say why.

    `auto` is SpargeAttn's kernel where it can run, FlexAttention on other GPUs that can run that, and the plain
    PyTorch reference elsewhere.

    Raises:
        BackendError: the name is unknown, or the backend can't run here.
    """
    if name not in BACKENDS:
        raise BackendError(f"backend must be one of {', '.join(BACKENDS)}, but is {name!r}; choose one of them")
    missing = missing_backends(device)
    if name != "auto":
        if reason := missing[name]:
            raise BackendError(f"backend {name} must {_REMEDIES[name].format(reason)}")
        return Choice(_MAKERS[name](device), "asked for")
    chosen = next(candidate for candidate, reason in missing.items() if reason is None)
    why = "; ".join(f"not {other}: {reason}" for other, reason in missing.items() if reason is not None)
    choice = Choice(_MAKERS[chosen](device), f"auto; {why}" if why else "auto: the fastest of those that run here")
    if device.type == "cuda":
        _say_once(chosen, choice.reason)
    return choice


@functools.cache
def _say_once(chosen: str, reason: str) -> None:
    level = logging.WARNING if chosen == "reference" else logging.INFO
    slow = ", which is slow" if chosen == "reference" else ""
    logger.log(level, "sparse attention runs on backend %s%s (%s)", chosen, slow, reason)


def choose_backend(name: str, device: torch.device) -> Backend:
    """Make a backend as `backend_choice` does."""
    return backend_choice(name, device).backend


_MAKERS: dict[str, Callable[[torch.device], Backend]] = {
    "sparge": SpargeBackend,
    "flex": lambda device: FlexBackend(),
    "reference": lambda device: ReferenceBackend(),
    "dense": lambda device: DenseBackend(),
}
