"""What a tracking store or registry refuses, as an error that says what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

from sparsetune.errors import SparsetuneError, TrackingError
from sparsetune.tracking.store import first_line

_NOT_PERMITTED = ("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED")
_MISSING = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND")


class MissingError(TrackingError):
    """The store has no such run, model, version or alias."""


@contextmanager
def asking(must: str, *, missing: str = "check its name or id") -> Iterator[None]:
    """Turn what MLflow and the systems under it raise into an error of one line.

    Args:
        must: how the message begins, e.g. `run 12ab must be readable`.
        missing: what to do where the store has no such thing.

    Raises:
        MissingError: there is no such thing.
        TrackingError: anything else: no permission, a name that MLflow refuses, a store that is away.
    """
    try:
        yield
    except SparsetuneError:
        raise
    except Exception as error:  # MLflow passes on whatever its stores raise: SQLAlchemy's, requests', OS errors
        code = str(getattr(error, "error_code", ""))
        reason = first_line(error)
        if code in _MISSING:
            raise MissingError(f"{must}, but: {reason}; {missing}") from error
        if code in _NOT_PERMITTED:
            raise TrackingError(
                f"{must}, but you aren't permitted to: {reason}; ask those who run the server, or set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            ) from error
        raise TrackingError(f"{must}, but: {reason}; check tracking.uri and MLFLOW_TRACKING_URI") from error
