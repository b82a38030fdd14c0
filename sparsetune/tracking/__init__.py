"""MLflow: runs of evaluations and tuning, and its UI on the right store.

Importing this imports neither MLflow nor PyTorch; the listeners are loaded when first asked for.
"""

from typing import TYPE_CHECKING, Any

from sparsetune.tracking.store import Store, connect, resolve_store
from sparsetune.tracking.ui import serve

if TYPE_CHECKING:
    from sparsetune.tracking.listener import TrackingListener

__all__ = ["Store", "TrackingListener", "connect", "resolve_store", "serve"]


def __getattr__(name: str) -> Any:
    if name == "TrackingListener":
        from sparsetune.tracking.listener import TrackingListener

        return TrackingListener
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
