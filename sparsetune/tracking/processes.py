"""Runs of processes that died: each recording process holds a lock file, by whose name its runs are tagged."""

import atexit
import contextlib
import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sparsetune.locks import exclusive, exclusive_if_free, is_held
from sparsetune.tracking.lookup import search
from sparsetune.tracking.store import Store, store_errors
from sparsetune.urls import sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_LOG = logging.getLogger(__name__)

PROCESS = "sparsetune.process"
"""Tag of a run: the process that writes it."""

_SETTING = "tracking.root"


def lock_folder(store: Store, root: Path) -> Path:
    """Return the folder of the lock files: beside a SQLite store, else `tracking.root`."""
    database = sqlite_path(store.uri)
    return root if database is None else database.parent


def hold_process_lock(folder: Path) -> str:
    """Hold a lock file in a folder until this process exits, and return its process's name."""
    process, held = f"{os.getpid()}-{uuid.uuid4().hex}", contextlib.ExitStack()
    held.enter_context(exclusive(_lock_of(folder, process), what="this process's runs", setting=_SETTING))
    atexit.register(held.close)
    return process


def end_left_runs(client: "MlflowClient", folder: Path) -> int:
    """End as KILLED the runs that dead processes left open; return how many there were."""
    num_ended = 0
    for path in _lock_files(folder):
        with exclusive_if_free(path, setting=_SETTING) as is_dead:
            if not is_dead:
                continue
            for run in _open_runs(client, path):
                with store_errors(f"write to run {run.info.run_id}"):
                    client.set_tag(run.info.run_id, "error", "its process died before it ended the run")
                    client.set_terminated(run.info.run_id, "KILLED")
                num_ended += 1
    if num_ended:
        _LOG.info("%d run(s) of processes that died end as KILLED", num_ended)
    return num_ended


def num_dead_processes(folder: Path) -> int:
    """Count the processes that died and may have left runs open."""
    return sum(not is_held(path) for path in _lock_files(folder))


def _open_runs(client: "MlflowClient", lock: Path) -> "Iterator[Run]":
    process = lock.name.removeprefix(_PREFIX).removesuffix(_SUFFIX)
    yield from search(client, f"tags.`{PROCESS}` = '{process}' and attributes.status = 'RUNNING'")


_PREFIX, _SUFFIX = ".process-", ".lock"


def _lock_of(folder: Path, process: str) -> Path:
    return folder / f"{_PREFIX}{process}{_SUFFIX}"


def _lock_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(_lock_of(Path(), "*").name))
