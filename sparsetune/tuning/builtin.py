"""SpargeAttn's own search."""

import importlib.util

import torch

from sparsetune.errors import TuningError


def check_builtin() -> None:
    """Check that SpargeAttn's own search can run here.

    Raises:
        TuningError: its package or a CUDA GPU is missing.
    """
    missing = []
    if importlib.util.find_spec("spas_sage_attn") is None:
        missing.append("the package spas_sage_attn is not installed")
    if not torch.cuda.is_available():
        missing.append("there is no CUDA GPU")
    if missing:
        raise TuningError(
            f"--tuner builtin must have SpargeAttn's package and a CUDA GPU, but {' and '.join(missing)}; use "
            "--tuner optuna, or install it as https://github.com/thu-ml/SpargeAttn says"
        )
