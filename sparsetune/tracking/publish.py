"""Publishing: copying runs from the local store to a tracking server.

Every pass writes what a run has and its copy on the server lacks, so it may stop anywhere and be repeated. The copy is
found by its key, the id of the local run. Local tags hold the run's server and the state that was published last.
"""

import hashlib
import json
import logging
import os
import re
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparsetune.config import TrackingConfig
from sparsetune.errors import SparsetuneError, TrackingError
from sparsetune.locks import exclusive
from sparsetune.tracking.database import ARTIFACTS
from sparsetune.tracking.flavor import FOLDER
from sparsetune.tracking.log_study import trial_runs
from sparsetune.tracking.logged_model import log_checkpoint_model
from sparsetune.tracking.lookup import parent_of, search
from sparsetune.tracking.processes import end_left_runs, lock_folder
from sparsetune.tracking.run_logger import RunLogger, table_names
from sparsetune.tracking.store import (
    KEY,
    PUBLISHED,
    SERVER,
    Store,
    check_answers,
    connect,
    experiment_id,
    first_line,
    is_store_error,
    local_store,
    resolve_store,
    store_errors,
)
from sparsetune.urls import sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

_LOG = logging.getLogger(__name__)

_MAX_FAILED = 3
"""Artifacts in a row that may fail before the rest waits for the next pass: each may take a minute."""


class ServerDownError(TrackingError):
    """The server doesn't answer."""


class ServerCopies:
    """The copies on one server of the runs of a local store."""

    def __init__(self, local: "MlflowClient", server: Store, *, live: bool = False) -> None:
        from mlflow import MlflowClient

        self.server, self._local, self._live = server, local, live
        database = sqlite_path(local.tracking_uri) or Path()
        self._lock, self._artifacts = database.with_name(".publish.lock"), database.with_name(ARTIFACTS)
        self._remote = MlflowClient(server.uri, server.registry_uri)
        self._ids: dict[str, str] = {}
        """Ids of experiments and runs on the server, by those in the local store."""
        self._written: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
        """Size and time of each uploaded artifact, by run id on the server."""

    def publish(self, run_id: str) -> bool:
        """Bring a run's copy up to date; return whether there was anything to do.

        Raises ServerDownError where the server doesn't answer, TrackingError where only this run fails.
        """
        try:
            with exclusive(self._lock, what="the publishing of runs", setting="tracking.root"):
                run = self._local.get_run(run_id)
                state = _state(run)
                if run.data.tags.get(PUBLISHED) == state:
                    return False
                check_answers(self.server.uri)  # MLflow itself waits for a minute
                self._publish(run)
                self._local.set_tag(run_id, PUBLISHED, state)
                return True
        except Exception as error:
            if not isinstance(error, SparsetuneError) and not is_store_error(error):
                raise
            try:
                check_answers(self.server.uri)
            except TrackingError as down:
                raise ServerDownError(str(down)) from error
            raise TrackingError(f"cannot publish run {run_id}: {first_line(error)}") from error

    def trial_runs(self, study_id: str) -> dict[int, str]:
        """Read the run ids on the server of a study's trials, by number."""
        check_answers(self.server.uri)
        with store_errors("read the trials' runs on the server"):
            copy = self._copy(self._local.get_run(study_id))
            return trial_runs(RunLogger(self._remote, copy.info.run_id))

    def _publish(self, run: "Run") -> None:
        server, parent = self._remote, parent_of(run)
        if parent is not None and parent not in self._ids:
            self._copy(self._local.get_run(parent))
        copy = self._copy(run)
        run_id = str(copy.info.run_id)
        if copy.info.lifecycle_stage != "active":
            raise TrackingError(f"run {run_id} was deleted on the server; restore it there, or delete it here too")
        logger = RunLogger(server, run_id)
        if parent is None and _ended(run):  # its tables and links name its children
            self._ids |= {child.data.tags.get(KEY, ""): str(child.info.run_id) for child in logger.children()}
        kept = {name: value for name, value in run.data.tags.items() if name not in (KEY, SERVER, PUBLISHED)}
        tags = {name: self._translated(value, run) for name, value in kept.items()}
        problems: list[str] = []
        with self._kept_going(problems):
            logger.log(
                self._new_metrics(run, copy),
                params={name: value for name, value in run.data.params.items() if name not in copy.data.params},
                tags={name: value for name, value in tags.items() if copy.data.tags.get(name) != value},
            )
        with self._kept_going(problems):
            if run.inputs and not (copy.inputs and copy.inputs.dataset_inputs):
                server.log_inputs(run_id, run.inputs.dataset_inputs)
        with self._kept_going(problems):
            if _ended(run):
                server.set_terminated(run_id, run.info.status, run.info.end_time)
            elif run.info.end_time is not None and copy.info.status != "RUNNING":  # it ended before and was resumed
                server.update_run(run_id, status="RUNNING")
        self._upload(run_id, run, problems)
        if problems:
            raise TrackingError("; ".join(problems[:3]))

    @contextmanager
    def _kept_going(self, problems: list[str]) -> Iterator[None]:
        """Note what the server refuses, so that it holds back nothing else; raises TrackingError where it is down."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, SparsetuneError) and not is_store_error(error):
                raise
            check_answers(self.server.uri)
            problems.append(first_line(error))

    def _copy(self, run: "Run") -> "Run":
        """Find the copy of a run, or create it.

        More than one is found where a request that had timed out was carried out after all, or where two hosts
        started a study at once; the one that has most is kept.
        """
        server, local_id = self._remote, str(run.info.experiment_id)
        if local_id not in self._ids:
            self._ids[local_id] = experiment_id(server, self.server, self._local.get_experiment(local_id).name)
        experiment = self._ids[local_id]
        key = run.data.tags.get(KEY, run.info.run_id)
        if not (found := _find(server, experiment, key)):
            server.create_run(experiment, run.info.start_time, {KEY: key}, run.info.run_name)
            found = _find(server, experiment, key)
        for twin in found[1:]:
            if twin.info.lifecycle_stage == "active":
                server.delete_run(twin.info.run_id)
        self._ids[run.info.run_id] = str(found[0].info.run_id)
        return found[0]

    def _new_metrics(self, run: "Run", copy: "Run") -> "list[Metric]":
        """Read metric entries since the latest ones on the server, which ignores those that it has.

        Oldest first, so that what a killed process left out isn't older than what it sent. Workers finish prompts in
        any order, so all entries are sent once more when a run has ended, but for system metrics, of which there are
        thousands: they are read only then.
        """
        ended = _ended(run)
        latest = {metric.key: (metric.step, metric.timestamp) for metric in copy.data._metric_objs}
        entries: list[Metric] = []
        for metric in run.data._metric_objs:
            known = latest.get(metric.key)
            is_system, changed = metric.key.startswith("system/"), known != (metric.step, metric.timestamp)
            if (changed and not (is_system and self._live and not ended)) or (ended and not is_system):
                history = self._local.get_metric_history(run.info.run_id, metric.key)
                since = known[1] if known is not None and (is_system or not ended) else 0
                entries += [entry for entry in history if entry.timestamp >= since]
        return sorted(entries, key=lambda entry: (entry.timestamp, entry.step))

    def _translated(self, text: str, run: "Run") -> str:
        """Replace the ids of runs, and of the experiment in links, by those on the server."""
        local = str(run.info.experiment_id)
        text = text.replace(f"#/experiments/{local}/", f"#/experiments/{self._ids[local]}/")
        return re.sub(r"\b[0-9a-f]{32}\b", lambda found: self._ids.get(found[0], found[0]), text)

    def _upload(self, run_id: str, run: "Run", problems: list[str]) -> None:
        """Upload what changed of a run's artifacts, small files first: proxies refuse large ones.

        Nothing is uploaded from outside the local store's artifacts, wherever a run's record says that its files are.
        """
        server, written, tables = self._remote, self._written[run_id], table_names(run.data.tags)
        folder, there = _artifact_folder(run), _artifacts(run)
        own = self._artifacts.resolve() / folder.parent.parent.name / run.info.run_id / "artifacts"
        if there and folder.resolve() != own:
            problems.append(f"its artifacts are in {folder}, outside {self._artifacts}; they are not uploaded")
            return
        failed = 0
        for name, state in sorted(there.items(), key=lambda item: item[1]):
            if written.get(name) == state or failed == _MAX_FAILED:
                continue
            failed += 1
            with self._kept_going(problems):
                if name in tables:
                    server.log_text(run_id, self._translated((folder / name).read_text(encoding="utf-8"), run), name)
                else:
                    server.log_artifact(run_id, str(folder / name), name.rpartition("/")[0] or None)
                written[name], failed = state, failed - 1
        has_model = run.outputs and run.outputs.model_outputs and f"{FOLDER}/manifest.json" in there
        if has_model and "model" not in written:
            with self._kept_going(problems):
                log_checkpoint_model(server, run_id, folder / FOLDER)
                written["model"] = (0, 0)
        if _ended(run) and there:
            with self._kept_going(problems):
                self._check_arrived(run_id, there.keys() & written.keys())

    def _check_arrived(self, run_id: str, names: Iterable[str]) -> None:
        """Raise TrackingError where the server lacks an upload: a proxy's login page answers it with success, too."""
        by_folder: dict[str, list[str]] = defaultdict(list)
        for name in names:
            by_folder[name.rpartition("/")[0]].append(name)
        for folder, expected in sorted(by_folder.items()):
            found = {one.path for one in self._remote.list_artifacts(run_id, folder or None)}
            if missing := [name for name in expected if name not in found]:
                for name in missing:
                    del self._written[run_id][name]
                raise TrackingError(f"the server lacks {', '.join(sorted(missing)[:3])} although the upload succeeded")


@dataclass(frozen=True)
class SyncResult:
    """How many runs a server was sent, and how many it still lacks, with the reason."""

    server: str
    sent: int
    left: int
    reason: str | None = None


def sync(config: TrackingConfig) -> list[SyncResult]:
    """Publish the runs of the local store that the configured server lacks, and list those of other servers.

    Nothing goes to a server that only a run's record names: it would get the user's credentials. Raises TrackingError
    where the local store can't be read.
    """
    store = local_store(config)
    if not Path(sqlite_path(store.uri) or "").is_file():
        return []
    client = connect(store)
    end_left_runs(client, lock_folder(store, config.root))
    by_server: dict[str, list[str]] = {}
    for run in unpublished_runs(client):
        by_server.setdefault(run.data.tags[SERVER], []).append(str(run.info.run_id))
    configured = resolve_store(config)
    return [
        _sync(ServerCopies(client, configured), run_ids)
        if shown == configured.shown and configured.is_server
        else SyncResult(shown, 0, len(run_ids), "not the configured server; give it with --tracking-uri")
        for shown, run_ids in by_server.items()
    ]


def _sync(copies: ServerCopies, run_ids: list[str]) -> SyncResult:
    sent, failures = 0, list[str]()
    for number, run_id in enumerate(run_ids):
        try:
            sent += copies.publish(run_id)
        except ServerDownError as error:
            return SyncResult(copies.server.shown, sent, len(run_ids) - number + len(failures), str(error))
        except TrackingError as error:
            failures.append(str(error))
    return SyncResult(copies.server.shown, sent, len(failures), failures[0] if failures else None)


def unpublished_runs(client: "MlflowClient", server: str | None = None) -> "Iterator[Run]":
    """Find the local runs that a server lacks, or lacks something of; children come before their parents."""
    for run in search(client, f"tags.`{SERVER}` " + ("LIKE '%'" if server is None else f"= '{server}'")):
        if run.data.tags.get(PUBLISHED) != _state(run):
            yield run


def _find(server: "MlflowClient", experiment: str, key: str) -> "list[Run]":
    """Find the copies of a run: active ones first, then those with most content."""
    from mlflow.entities import ViewType

    def rank(run: "Run") -> tuple[bool, int, str]:
        size = len(run.data.metrics) + len(run.data.params) + len(run.data.tags)
        return run.info.lifecycle_stage != "active", -size, str(run.info.run_id)

    return sorted(server.search_runs([experiment], f"tags.`{KEY}` = '{key}'", ViewType.ALL), key=rank)


def _ended(run: "Run") -> bool:
    return run.info.status in ("FINISHED", "FAILED", "KILLED")


def _state(run: "Run") -> str:
    """Describe what there is of a run: its end, or a digest of what it has so far."""
    if _ended(run):
        return str(run.info.end_time)
    tags = {name: value for name, value in run.data.tags.items() if name != PUBLISHED}
    content = run.to_dictionary() | {"data": [run.data.metrics, run.data.params, tags], "files": _artifacts(run)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _artifacts(run: "Run") -> dict[str, tuple[int, int]]:
    """Read size and time of each artifact: regular files in the run's own folder, no links to others."""
    found, folder = {}, _artifact_folder(run)
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                found[path.relative_to(folder).as_posix()] = (status.st_size, status.st_mtime_ns)
    return dict(sorted(found.items()))


def _artifact_folder(run: "Run") -> Path:
    from mlflow.utils.file_utils import local_file_uri_to_path

    return Path(local_file_uri_to_path(run.info.artifact_uri))  # type: ignore[no-untyped-call]
