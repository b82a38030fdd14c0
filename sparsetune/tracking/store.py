"""The MLflow store that runs are recorded in, its client and its errors."""

import http.client
import logging
import os
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsetune.config import TrackingConfig
from sparsetune.errors import SparsetuneError, TrackingError, UsageError
from sparsetune.files import expand
from sparsetune.tracking.database import ARTIFACTS, prepare_database
from sparsetune.tracking.moved import former_places, moved_text
from sparsetune.urls import scheme, sqlite_path, sqlite_url, without_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient

DATABASE = "mlflow.db"

KIND = "sparsetune.kind"
MODEL = "sparsetune.model"
PARENT = "mlflow.parentRunId"
"""Tags of runs: what a run is (`tuning`, `trial` or `evaluation`), the model's short name, and the parent's id."""

SERVER = "sparsetune.server"
PUBLISHED = "sparsetune.published"
"""Tags of local runs: the server that they are published on, and the state that it has; see `publish`."""

KEY = "sparsetune.key"
"""Tag that runs on a server are found by: the id of the local run. A local run that has it continues another host's."""

_ENVIRONMENT = {
    # Read when MLflow is imported or sends a request; what a user has set stays.
    # A tool that embeds MLflow must not send its users' usage anywhere; they can still turn this on.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # MLflow's own 7 retries of 120 s each hold a search up for minutes when its server goes away.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    # It would write the link of every run that ends to stdout, where results go.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # It would draw a bar on stderr for every file that is read back.
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # It would log every table that it creates.
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}

_LOG = logging.getLogger(__name__)
_RETRIES = logging.getLogger("urllib3.connectionpool")

_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")

_STORE_PACKAGES = {
    "alembic", "azure", "boto3", "botocore", "google", "http", "mlflow", "paramiko", "pysftp", "requests",
    "sqlalchemy", "sqlite3", "urllib3",
}  # fmt: skip
"""Packages that MLflow's stores are made of: MLflow passes on the errors that they define."""

_ANY_QUESTION = "/api/2.0/mlflow/experiments/get?experiment_id=0"
"""What a server is asked; not its /health, which also answers where the database behind it hangs."""

_GATEWAY_ERRORS = (502, 503, 504)
"""What a proxy answers when the server behind it is down."""

_NOT_PERMITTED = ("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED")
_MISSING = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND")
_HOST_AND_PORT = re.compile(r"[\w.-]+:\d{1,5}(/.*)?", re.DOTALL)
_URI_VARIABLE = "MLFLOW_TRACKING_URI"
_global_uri = threading.Lock()


@dataclass(frozen=True)
class Store:
    """Where runs are recorded; new experiments' artifacts go to `artifact_root`, None leaves that to the server."""

    uri: str
    registry_uri: str
    artifact_root: Path | None

    @property
    def shown(self) -> str:
        """The URI without user and password, for messages."""
        return without_credentials(self.uri)

    @property
    def is_database(self) -> bool:
        """Whether the store is a database that this process opens itself."""
        return scheme(self.uri) in _DATABASES

    @property
    def is_server(self) -> bool:
        return _is_server(self.uri)

    @property
    def registry_is_apart(self) -> bool:
        return self.registry_uri.rstrip("/") != self.uri.rstrip("/")

    @property
    def registry_is_server(self) -> bool:
        return _is_server(self.registry_uri)

    @property
    def copies_models(self) -> bool:
        """A registry's server makes versions only of logged models that it has itself."""
        return self.registry_is_apart and self.registry_is_server


def resolve_store(config: TrackingConfig, environ: Mapping[str, str] | None = None) -> Store:
    """Find the store: `tracking.uri`, else MLFLOW_TRACKING_URI, else SQLite in `tracking.root`.

    Artifacts lie beside a SQLite file, on the server's side of a server, and in `tracking.root` otherwise. The
    registry is MLFLOW_REGISTRY_URI's, else the same store. Raises TrackingError for an address without a scheme and for
    one of a page.
    """
    environ = os.environ if environ is None else environ
    root = expand(config.root).absolute()
    uri = _address(config.uri or environ.get("MLFLOW_TRACKING_URI") or sqlite_url(root / DATABASE))
    database = sqlite_path(uri)
    if database is not None:
        uri, artifacts = sqlite_url(database), database.parent / ARTIFACTS
    else:
        artifacts = root / ARTIFACTS
    registry = _address(environ.get("MLFLOW_REGISTRY_URI") or uri)
    registered = sqlite_path(registry)
    store = Store(uri, registry if registered is None else sqlite_url(registered), artifacts)
    return store if store.is_database else replace(store, artifact_root=None)


def local_store(config: TrackingConfig) -> Store:
    """Return the SQLite store in `tracking.root`, whatever `tracking.uri` and MLflow's variables say."""
    return resolve_store(config.model_copy(update={"uri": None}), {})


def _address(uri: str) -> str:
    if _HOST_AND_PORT.fullmatch(uri):
        raise TrackingError(f"the tracking URI {without_credentials(uri)} has no scheme; write http://{uri}")
    if _is_server(uri) and "#" in uri:
        server = without_credentials(uri.partition("#")[0].rstrip("/"))
        raise TrackingError(f"the tracking URI {without_credentials(uri)} is a page of a UI; write {server}")
    return uri


def _is_server(uri: str) -> bool:
    return scheme(uri) in ("http", "https")


def connect(store: Store) -> "MlflowClient":
    """Connect to a store; a missing SQLite store is created, which takes some seconds."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if store.is_server:
        check_answers(store.uri)
    if store.copies_models:
        check_answers(store.registry_uri, "registry", "MLFLOW_REGISTRY_URI")
    with store_errors(f"use the tracking store {store.shown}"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the libraries under MLflow, by one another
        from mlflow import MlflowClient

        for uri in dict.fromkeys((store.uri, store.registry_uri)):
            if scheme(uri) in _DATABASES:
                prepare_database(uri)
        database = sqlite_path(store.uri)
        if database is not None and (places := former_places(database)):
            _LOG.warning(moved_text(places))
        if not _RETRIES.level:  # urllib3 logs each in three lines; we log failures only
            _RETRIES.setLevel(logging.ERROR)
        client = MlflowClient(tracking_uri=store.uri, registry_uri=store.registry_uri)
        client.search_experiments(max_results=1)
    return client


def experiment_id(client: "MlflowClient", store: Store, name: str) -> str:
    """Find or create an experiment; raises TrackingError where it was deleted or can't be made."""
    with store_errors(f"use the tracking store {store.shown}"):
        found = client.get_experiment_by_name(name)
        if found is None:
            return _create_experiment(client, store, name)
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"the experiment {name!r} is deleted; restore it with "
            f"`mlflow experiments restore -x {found.experiment_id}`, or set tracking.experiment to another name"
        )
    return str(found.experiment_id)


def is_store_error(error: BaseException) -> bool:
    """Return whether a store, its database, network or file system failed; any other error is a bug of sparsetune.

    Damaged text files are the store's failures too, and missing packages, e.g. a database's driver; a name that
    sparsetune imports from itself, or its metadata, is not.
    """
    if isinstance(error, ImportError):
        ours = (error.name or "").partition(".")[0] == "sparsetune"
        return not ours and not isinstance(error, PackageNotFoundError)
    defined_in = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError | UnicodeDecodeError) or not defined_in.isdisjoint(_STORE_PACKAGES)


def cause_of(error: Exception) -> str:
    """Return an error's message in one line, with its type if it is a bug of sparsetune."""
    if isinstance(error, SparsetuneError):
        return str(error)
    if is_store_error(error):
        return first_line(error)
    return f"unexpected {type(error).__name__}: {first_line(error)}"


class MissingError(TrackingError, UsageError):
    """The store has no such run, model, version or alias."""


@contextmanager
def store_errors(action: str, *, missing: str = "check its name or id") -> Iterator[None]:
    """Turn what MLflow and the systems under it raise into TrackingError, of one line; see `is_store_error`.

    `action` is what could not be done, e.g. `read run 12ab`; `missing` what to do where the store has no such thing,
    which raises MissingError.
    """
    try:
        yield
    except Exception as error:
        if not is_store_error(error):
            raise
        code, reason = str(getattr(error, "error_code", "")), first_line(error)
        if code in _MISSING:
            raise MissingError(f"cannot {action}: {reason}; {missing}") from error
        if code in _NOT_PERMITTED:
            advice = (
                "ask for permission, or set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
                "MLFLOW_TRACKING_TOKEN"
            )
        elif isinstance(error, ImportError):
            advice = "install it, or set tracking.enabled off"
        else:
            advice = "check tracking.uri and MLFLOW_TRACKING_URI, or set tracking.enabled off"
        raise TrackingError(f"cannot {action}: {reason}; {advice}") from error


def first_line(error: BaseException) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return without_credentials(next(filter(None, lines), type(error).__name__))[:300]


def _create_experiment(client: "MlflowClient", store: Store, name: str) -> str:
    from mlflow.exceptions import MlflowException

    location = None
    if store.artifact_root is not None:
        location = (store.artifact_root / name.replace("/", "-")).as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except MlflowException:
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)  # another process made it just now


def paged(ask: Any, **arguments: Any) -> Iterator[Any]:
    token: str | None = None
    while True:
        page = ask(**arguments, max_results=1000, page_token=token)
        yield from page
        token = page.token or None
        if token is None:
            return


def check_answers(uri: str, kind: str = "tracking", variable: str = _URI_VARIABLE, seconds: float = 10.0) -> None:
    """Ask a server's API, without credentials, for an answer within `seconds`: MLflow itself retries for minutes.

    Raises TrackingError, caused by a TimeoutError where the server accepts the connection but doesn't answer.
    """
    shown = without_credentials(uri)
    try:
        parts = urllib.parse.urlsplit(uri)
        address = parts._replace(netloc=parts.netloc.rpartition("@")[2], path=parts.path.rstrip("/") + _ANY_QUESTION)
        with urllib.request.urlopen(address.geturl(), timeout=seconds):
            pass
    except (http.client.InvalidURL, ValueError):  # its message may hold a part of the password
        raise TrackingError(
            f"the address of the {kind} server, {shown}, is not valid; correct {variable} (in a password write %2F for "
            "/, %40 for @ and %23 for #)"
        ) from None
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError) and error.code not in _GATEWAY_ERRORS:
            return  # it answers; MLflow asks with the user's credentials
        reason = getattr(error, "reason", None) or error
        raise TrackingError(
            f"the {kind} server {shown} does not answer: {reason}; start it, correct {variable}, or "
            "set tracking.enabled off"
        ) from error


@contextmanager
def global_store(store: Store) -> Iterator[None]:
    """Set MLflow's global tracking URI to the store's inside the block, one thread at a time.

    MLflow's SQL registry looks up a version's logged model in the global store, not its client's. A registry that is a
    server uses its own store, so nothing is set for one.
    """
    if store.registry_is_server:
        yield
        return
    import mlflow

    with _global_uri:
        variable = os.environ.pop(_URI_VARIABLE, None)
        earlier = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None  # type: ignore[no-untyped-call]
        mlflow.set_tracking_uri(store.uri)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(earlier)  # type: ignore[arg-type]  # None is unset
            os.environ.pop(_URI_VARIABLE, None)
            if variable is not None:
                os.environ[_URI_VARIABLE] = variable
