"""MLflow's global tracking store, set for a moment."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sparsetune.tracking.store import Store

_VARIABLE = "MLFLOW_TRACKING_URI"
_lock = threading.Lock()


@contextmanager
def global_store(store: Store) -> Iterator[None]:
    """Let MLflow's global tracking URI be the store's meanwhile, one thread at a time; afterwards it is as it was.

    MLflow's SQL registry asks the global store, not its client's, for the logged model that a version is made of. A
    registry that is a server asks its own, so nothing is set for one.
    """
    if store.registry_is_server:
        yield
        return
    import mlflow

    with _lock:
        variable = os.environ.pop(_VARIABLE, None)
        earlier = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None  # type: ignore[no-untyped-call]
        mlflow.set_tracking_uri(store.uri)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(earlier)  # type: ignore[arg-type]  # None is unset
            os.environ.pop(_VARIABLE, None)
            if variable is not None:
                os.environ[_VARIABLE] = variable
