import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sparsetune.errors import TrackingError
from sparsetune.tracking.lookup import resolve_checkpoint
from sparsetune.tracking.registry import Registry
from sparsetune.tracking.store import MissingError, store_errors


class _Forbidding(BaseHTTPRequestHandler):
    """A server that is well, and permits nothing, in the words of MLflow's basic authentication."""

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


def test_our_own_errors_pass() -> None:
    with pytest.raises(MissingError, match=r"^as it is$"), store_errors("read it"):
        raise MissingError("as it is")
