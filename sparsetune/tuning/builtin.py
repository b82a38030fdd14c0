"""SpargeAttn's own search."""

import importlib.util
from typing import NoReturn

import torch

from sparsetune.errors import TuningError


def refuse_builtin() -> NoReturn:
    """Say what SpargeAttn's own search needs, and that this version can't run it.

    Raises:
        TuningError: always.
    """
    missing = []
    if importlib.util.find_spec("spas_sage_attn") is None:
        missing.append("spas_sage_attn is not installed")
    if not torch.cuda.is_available():
        missing.append("there is no CUDA GPU")
    but = " and ".join(missing) or "this version of sparsetune can't run it yet"
    raise TuningError(
        f"--tuner builtin must have SpargeAttn's package and a CUDA GPU, but {but}; "
        "use --tuner optuna, which needs neither"
    )
