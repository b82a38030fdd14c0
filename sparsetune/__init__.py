"""Tune sparse attention for video diffusion models, and measure its effect on the videos.

Names are imported on first use, so that `import sparsetune` is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsetune import metrics
    from sparsetune.api import create_pipelines, load_checkpoint, sparsify
    from sparsetune.attention.policy import Policy
    from sparsetune.attention.step_cache import StepCache
    from sparsetune.checkpoint.storage import save_checkpoint
    from sparsetune.config import Config, resolve
    from sparsetune.errors import SparsetuneError
    from sparsetune.models.prompts import load_prompts
    from sparsetune.notebook import evaluate, tune

__version__ = "0.1.0"

__all__ = [
    "Config",
    "Policy",
    "SparsetuneError",
    "StepCache",
    "__version__",
    "create_pipelines",
    "evaluate",
    "load_checkpoint",
    "load_prompts",
    "metrics",
    "resolve",
    "save_checkpoint",
    "sparsify",
    "tune",
]

_MODULES = {
    "Config": "sparsetune.config",
    "Policy": "sparsetune.attention.policy",
    "SparsetuneError": "sparsetune.errors",
    "StepCache": "sparsetune.attention.step_cache",
    "create_pipelines": "sparsetune.api",
    "evaluate": "sparsetune.notebook",
    "load_checkpoint": "sparsetune.api",
    "load_prompts": "sparsetune.models.prompts",
    "resolve": "sparsetune.config",
    "save_checkpoint": "sparsetune.checkpoint.storage",
    "sparsify": "sparsetune.api",
    "tune": "sparsetune.notebook",
}


def __getattr__(name: str) -> Any:
    if name == "metrics":
        return import_module("sparsetune.metrics")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
