"""MLflow: runs of evaluations and tuning, and its UI on the right store.

Importing this imports nothing else: its names are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsetune.tracking.listener import TrackingListener
    from sparsetune.tracking.store import Store, connect, resolve_store
    from sparsetune.tracking.ui import serve

__all__ = ["Store", "TrackingListener", "connect", "resolve_store", "serve"]

_MODULES = {"TrackingListener": "listener", "serve": "ui"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"sparsetune.tracking.{_MODULES.get(name, 'store')}"), name)
