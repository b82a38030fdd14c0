"""MLflow's own UI, started on the right store."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

from sparsetune.config import TrackingConfig
from sparsetune.errors import TrackingError
from sparsetune.tracking.database import ARTIFACTS, prepare_database
from sparsetune.tracking.store import KIND, Store, connect, store_errors
from sparsetune.urls import sqlite_path, without_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment


START_SECONDS = 120.0
"""How long the UI may take to answer; on two busy cores it was seen to take 20 s."""


def serve(
    uri: str,
    host: str = "127.0.0.1",
    port: int = 5000,
    *,
    registry_uri: str | None = None,
    page: Callable[[str], str] = lambda uri: "",
    say: Callable[[str], None] = print,
) -> None:
    """Serve a store in MLflow's UI until Ctrl-C; of a tracking server only the link is printed.

    `registry_uri` is a database apart from the store, and `page` returns what to append to the UI's link. Raises
    TrackingError where the port is taken or the UI doesn't start.
    """
    if uri.startswith(("http://", "https://")):
        say(f"the tracking server has its own UI: {without_credentials(uri).rstrip('/')}/{page(uri)}")
        return
    with running_ui(uri, host, port, registry_uri) as (link, process):
        say(f"MLflow's UI is at {link}{page(link)} (Ctrl-C stops it)")
        process.wait()
        raise TrackingError(f"MLflow's UI ended with status {process.returncode}; start it again")


@contextmanager
def running_ui(
    uri: str, host: str = "127.0.0.1", port: int = 5000, registry_uri: str | None = None
) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """Run MLflow's UI; yield its link and process once it answers, and stop it at the end.

    Ctrl-C ends the block quietly. Raises TrackingError where the port is taken, or the UI isn't installed or doesn't
    start.
    """
    if importlib.util.find_spec("flask") is None:
        raise TrackingError(
            "MLflow's UI is not installed, only its client; run: pip install mlflow (in a checkout: make ui)"
        )
    _check_free(host, port)
    for database in dict.fromkeys((uri, registry_uri or uri)):
        if sqlite_path(database) is not None:
            with store_errors(f"use the tracking store {without_credentials(database)}"):
                prepare_database(database)
    with tempfile.TemporaryFile() as log:
        # A session of its own keeps Ctrl-C from reaching the workers before us, and lets all of them be stopped.
        process = subprocess.Popen(
            _command(uri, host, port),
            stdout=log,
            stderr=log,
            env=_environment(uri, registry_uri),
            start_new_session=True,
        )
        previous = signal.signal(signal.SIGTERM, _interrupt)
        try:
            shown = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
            link = f"http://{shown}:{port}/"
            _wait_until_up(link, process, log)
            yield link, process
        except KeyboardInterrupt:
            pass
        finally:
            signal.signal(signal.SIGTERM, previous)
            _stop(process)


def _command(uri: str, host: str, port: int) -> list[str]:
    command = [sys.executable, "-m", "mlflow", "ui", "--host", host, "--port", str(port)]
    database = sqlite_path(uri)
    if database is not None:
        command += ["--default-artifact-root", (database.parent / ARTIFACTS).as_uri()]
    # One worker is enough for one person, and each further one imports MLflow anew.
    return [*command, "--workers", "1"]


def _environment(uri: str, registry_uri: str | None) -> dict[str, str]:
    quiet = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # The job runner is for judging language models, and takes several processes.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    # Not an option of the command: everybody on the machine could read a database's password there.
    stores = {"MLFLOW_BACKEND_STORE_URI": uri, "MLFLOW_REGISTRY_STORE_URI": registry_uri or uri}
    return quiet | dict(os.environ) | stores


def _check_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise TrackingError(
                f"the UI cannot listen on {host}:{port}: {reason}; stop what runs there, or choose "
                f"another port, e.g. {port + 1 if 0 < port < 65535 else 5001}"
            ) from error


def _wait_until_up(link: str, process: "subprocess.Popen[bytes]", log: IO[bytes]) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{link}health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    log.seek(0)
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    happened = (
        f"it ended with status {process.returncode}" if process.poll() is not None else f"{START_SECONDS:g} s passed"
    )
    raise TrackingError(
        f"MLflow's UI does not answer at {link}: {happened}: {lines[-1] if lines else 'no output'}; "
        "check the store's URI"
    )


def _stop(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its workers too: they would keep the port
        process.wait()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


SHARE_KEY = "sparsetune"
_TAG = f"mlflow.sharedViewState.{SHARE_KEY}"
"""Where MLflow's UI looks for the view that a link's `viewStateShareKey` names; its own 'Share' button writes one."""

_KIND = "mlflow.experimentKind"
"""What MLflow's UI offers for an experiment: pages for training runs and models, or for language models."""

_WIDTHS = {
    "metrics.`sparsity/overall`": 130,
    "metrics.`psnr/mean`": 110,
    "metrics.`psnr/min`": 110,
    "metrics.`score`": 80,
    "tags.`verdict`": 110,
    "tags.`gate`": 90,
    "tags.`review`": 90,
    "attributes.`Models`": 150,
}
"""Columns in order, with their width in pixels."""

VIEW = {
    "orderByKey": "attributes.start_time",
    "orderByAsc": False,
    "selectedColumns": list(_WIDTHS),
    "columnOrder": ["attributes.`Run Name`", "runDateAndNestInfo", *_WIDTHS, "duration"],
    "columnWidths": _WIDTHS,
    "chartsSearchFilter": "sparsity/overall|psnr/mean|psnr/min|score",
}
"""The view: newest run first, with how sparse it is, how good, and what was decided about it."""


def page_of(uri: str, config: TrackingConfig) -> str:
    try:
        return experiment_page(connect(Store(uri, uri, None)), config)
    except TrackingError:
        return ""


def experiment_page(client: "MlflowClient", config: TrackingConfig) -> str:
    """Return the UI's page of the configured experiment, else of the newest run's; empty before the first run.

    The view is written on the experiment once; where that isn't permitted, the page is the plain one.
    """
    with store_errors("read the recorded runs"):
        found = _experiment(client, config.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME"))
    if found is None:
        return ""
    page = f"#/experiments/{found.experiment_id}/runs"
    tags = {_TAG: json.dumps(VIEW), _KIND: found.tags.get(_KIND, "custom_model_development")}
    try:
        with store_errors("write the view"):
            for tag, value in tags.items():
                if found.tags.get(tag) != value:
                    client.set_experiment_tag(found.experiment_id, tag, value)
    except TrackingError:
        return page
    return f"{page}?viewStateShareKey={SHARE_KEY}&workflowType=machine_learning"


def _experiment(client: "MlflowClient", name: str | None) -> "Experiment | None":
    if name is not None:
        return client.get_experiment_by_name(name)
    every = client.search_experiments()
    newest = client.search_runs(
        [experiment.experiment_id for experiment in every],
        f"tags.`{KIND}` LIKE '%'",
        max_results=1,
        order_by=["attributes.start_time DESC"],
    )
    return client.get_experiment(newest[0].info.experiment_id) if newest else None
