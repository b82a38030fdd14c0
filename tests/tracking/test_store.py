import http.client
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import requests
import sqlalchemy
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from sparsetune.errors import TrackingError
from sparsetune.tracking import Store, connect, resolve_store
from sparsetune.tracking.lookup import resolve_checkpoint
from sparsetune.tracking.registry import Registry
from sparsetune.tracking.store import MissingError, check_answers, experiment_id, store_errors
from tests.tracking.conftest import tracking


def test_the_default_is_sqlite_with_artifacts_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = resolve_store(tracking(), {})
    assert store.uri == f"sqlite:///{tmp_path.as_posix()}/mlruns/mlflow.db"
    assert (store.registry_uri, store.artifact_root) == (store.uri, tmp_path / "mlruns" / "artifacts")
    assert not store.is_server
    assert not (tmp_path / "mlruns").exists()


def test_mlflows_environment_comes_before_the_default_and_the_setting_before_both() -> None:
    environ = {"MLFLOW_TRACKING_URI": "http://one:5000", "MLFLOW_REGISTRY_URI": "http://two:5000"}
    store = resolve_store(tracking(), environ)
    assert (store.uri, store.registry_uri) == ("http://one:5000", "http://two:5000")
    assert store.is_server and store.artifact_root is None
    assert resolve_store(tracking(uri="http://three:5000"), environ).uri == "http://three:5000"


@pytest.mark.parametrize(
    ("uri", "meant"),
    [
        ("127.0.0.1:5000", "has no scheme; write http://127.0.0.1:5000"),
        ("runs.example:5000/mlflow", "has no scheme; write http://runs.example:5000/mlflow"),
        ("http://127.0.0.1:5000/#/experiments/1", "is a page of a UI; write http://127.0.0.1:5000"),
        ("https://ada:pw@runs.example/ml/#/models", "is a page of a UI; write https://runs.example/ml"),
    ],
)
def test_an_address_that_is_not_mlflow_s_is_answered_with_what_to_write(uri: str, meant: str) -> None:
    for given in ({"MLFLOW_TRACKING_URI": uri}, {"MLFLOW_REGISTRY_URI": uri}):
        with pytest.raises(TrackingError) as raised:
            resolve_store(tracking(), given)
        assert str(raised.value).endswith(meant) and "pw" not in str(raised.value)


def test_a_relative_sqlite_uri_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = resolve_store(tracking(uri="sqlite:///runs/a.db"), {})
    assert store.uri == f"sqlite:///{tmp_path.as_posix()}/runs/a.db"
    assert store.artifact_root == tmp_path / "runs" / "artifacts"


@pytest.mark.parametrize(("uri", "local"), [("postgresql+psycopg2://u:p@host/db", True), ("databricks", False)])
def test_artifacts_of_a_database_lie_in_the_root_and_of_a_service_there(uri: str, local: bool) -> None:
    assert (resolve_store(tracking(uri=uri), {}).artifact_root is not None) is local


def test_experiments_are_made_once_with_artifacts_in_the_store(
    client: MlflowClient, store: Store, experiment: str
) -> None:
    made = experiment_id(client, store, experiment)
    assert experiment_id(client, store, experiment) == made
    assert store.artifact_root is not None
    expected = (store.artifact_root / experiment.replace("/", "-")).as_uri()
    assert client.get_experiment(made).artifact_location == expected


def test_a_deleted_experiment_says_how_to_restore_it(client: MlflowClient, store: Store, experiment: str) -> None:
    made = experiment_id(client, store, experiment)
    client.delete_experiment(made)
    with pytest.raises(TrackingError, match=rf"is deleted; restore it.*restore -x {made}"):
        experiment_id(client, store, experiment)


def test_a_store_that_cannot_be_made_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TrackingError, match="cannot use the tracking store") as raised:
        connect(resolve_store(tracking(root=tmp_path / "file" / "mlruns"), {}))
    assert "\n" not in str(raised.value)


def test_a_database_that_is_none_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is no database, however long it may be " * 100)
    with pytest.raises(TrackingError, match="file is not a database") as raised:
        connect(resolve_store(tracking(root=tmp_path), {}))
    assert "\n" not in str(raised.value)


def test_a_database_server_that_is_away_is_said_at_once() -> None:
    with pytest.raises(
        TrackingError, match=r"cannot use the tracking store postgresql\+psycopg2://127\.0\.0\.1:9/db.*refused"
    ):
        connect(resolve_store(tracking(uri="postgresql+psycopg2://me:secret@127.0.0.1:9/db"), {}))


def test_a_server_that_is_down_is_said_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(TrackingError, match=rf"tracking server http://127\.0\.0\.1:{port} does not answer"):
        connect(resolve_store(tracking(uri=f"http://127.0.0.1:{port}"), {}))


def test_a_server_that_asks_for_a_password_is_there() -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        check_answers(f"http://127.0.0.1:{server.server_port}/")
        thread.join()


def test_importing_tracking_imports_nothing_heavy() -> None:
    program = "import sys, sparsetune.tracking; print({'mlflow', 'torch', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.slow
def test_making_a_store_says_nothing(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom sparsetune.config import TrackingConfig\nfrom sparsetune.tracking import *\n"
        "connect(resolve_store(TrackingConfig(root=sys.argv[1]), {})).create_experiment('a')"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


class _Forbidding(BaseHTTPRequestHandler):
    """A healthy server that denies all requests, with the messages of MLflow's basic authentication."""

    def do_GET(self) -> None:
        well = self.path == "/health"
        self.send_response(200 if well else 403)
        self.end_headers()
        self.wfile.write(b"OK" if well else b"Permission denied")

    do_POST = do_PATCH = do_DELETE = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def forbidding() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Forbidding)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_server_whose_api_hangs_behind_a_good_health_check_is_said_in_time() -> None:
    released = threading.Event()

    class Hanging(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/health":
                released.wait(30)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hanging) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            with pytest.raises(TrackingError, match="does not answer: timed out"):
                check_answers(f"http://127.0.0.1:{server.server_port}", seconds=0.2)
        finally:
            released.set()
            server.shutdown()


def test_credentials_in_an_address_are_not_part_of_the_host_that_is_asked() -> None:
    seen: list[str | None] = []

    class Noting(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers.get("Authorization"))
            self.send_response(401)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Noting) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        check_answers(f"http://ada:s3cret@127.0.0.1:{server.server_port}")
        thread.join()
    assert seen == [None]


def test_no_permission_says_whom_to_ask(forbidding: str, working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    from sparsetune.config import TrackingConfig
    from sparsetune.tracking import resolve_store

    client = MlflowClient(forbidding, forbidding)
    registry = Registry(client, resolve_store(TrackingConfig(uri=forbidding), {}), "demo-sparse")
    message = r"^cannot .*Permission denied.*ask for permission, or set MLFLOW_TRACKING_USERNAME"
    for attempt in (
        registry.register,
        lambda: registry.set_alias("champion", "1"),
        lambda: registry.aliased("champion"),
    ):
        with pytest.raises(TrackingError, match=message) as raised:
            attempt()
        assert "\n" not in str(raised.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", forbidding)
    with pytest.raises(TrackingError, match=r"Permission denied|status 403"):
        resolve_checkpoint("models:/demo-sparse@champion")


def test_other_errors_are_one_line_that_begins_with_what_failed() -> None:
    message = r"^cannot read the store: first; check tracking\.uri"
    with pytest.raises(TrackingError, match=message) as raised, store_errors("read the store"):
        raise OSError("\nfirst\nsecond")
    assert not isinstance(raised.value, MissingError)


@pytest.mark.parametrize(
    "error",
    [
        MlflowException("refused"),
        sqlalchemy.exc.DatabaseError("SELECT 1", None, Exception("locked")),
        requests.ConnectionError("gone"),
        http.client.BadStatusLine("gone"),
        PermissionError("denied"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        ModuleNotFoundError("No module named 'psycopg2'", name="psycopg2"),
    ],
    ids=repr,
)
def test_errors_of_a_store_are_tracking_errors(error: Exception) -> None:
    with pytest.raises(TrackingError, match=r"^cannot read the store: ") as raised, store_errors("read the store"):
        raise error
    assert raised.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        KeyError("sparsetune"),
        TypeError("takes 1 argument"),
        ValueError("not in list"),
        AssertionError("never"),
        PackageNotFoundError("sparsetune"),
        ImportError("cannot import name 'x' from 'sparsetune.files'", name="sparsetune.files"),
    ],
    ids=repr,
)
def test_our_own_bugs_are_not_the_stores_errors(error: Exception) -> None:
    with pytest.raises(type(error), match=re.escape(str(error))) as raised, store_errors("read the store"):
        raise error
    assert raised.value is error


@pytest.mark.parametrize("uri", ["postgresql://host:port/db", "http://host:port"])
def test_a_port_that_is_no_number_is_an_error_without_it_as_it_may_be_a_password(uri: str) -> None:
    with pytest.raises(TrackingError, match=rf"{uri.removesuffix('port/db').removesuffix('port')}\*\*\*.*correct"):
        connect(resolve_store(tracking(uri=uri), {}))


def test_our_own_errors_pass() -> None:
    with pytest.raises(MissingError, match=r"^as it is$"), store_errors("read it"):
        raise MissingError("as it is")
