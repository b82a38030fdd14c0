"""A client of a tracking server that loses nothing when the server goes away."""

import json
import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import DatasetInput, LoggedModelInput, Metric, Param, Run, RunData, RunInfo, RunStatus, RunTag
from mlflow.utils.async_logging.run_operations import RunOperations

from sparsetune.errors import TrackingError
from sparsetune.tracking.delivery import Delivery
from sparsetune.tracking.operations import (
    Begin,
    Dataset,
    Files,
    Inputs,
    Model,
    Operation,
    Status,
    Text,
    Write,
    new_stand_in,
)
from sparsetune.tracking.sender import Sender
from sparsetune.tracking.spool import new_session
from sparsetune.tracking.store import Store

_LOG = logging.getLogger(__name__)


class Outbox(MlflowClient):
    """Writes every operation to disk, has a thread send it, and forgets it when the server has it.

    So recording waits for no server, but for its first run to be begun and, in the end, for all to be sent.
    Where the server fails, operations stay on disk, in order, and are tried again; those that are left in the
    end are told of, for `sparsetune sync`. Reading goes to the server directly. Only what `tracking.runs` writes
    goes through the spool.

    A run has a stand-in for its id until it is begun, which may be used as one.

    Args:
        store: the server.
        experiment: id of the experiment that all runs belong to.
        spool: folder of all sessions.
    """

    def __init__(self, store: Store, experiment: str, spool: Path) -> None:
        super().__init__(tracking_uri=store.uri, registry_uri=store.registry_uri)
        self.store = store
        self._experiment = experiment
        self._spool = spool
        self._sender: Sender | None = None
        self._held = ExitStack()

    def create_run(
        self,
        experiment_id: str,
        start_time: int | None = None,
        tags: dict[str, Any] | None = None,
        run_name: str | None = None,
    ) -> Run:
        """Begin a run.

        Raises:
            TrackingError: it is the session's first, and the server doesn't take it.
        """
        stand_in, start = new_stand_in(), start_time or _now()
        begin = Begin(run=stand_in, experiment_id=experiment_id, name=run_name, start_ms=start, tags=tags or {})
        run_id = stand_in
        if self._sender is None:
            sender = self._put(begin)
            sender.wait()
            if sender.delivery.num_sent == 0:
                raise TrackingError(self._give_up(sender))
            run_id = sender.delivery.ids[stand_in]
        else:
            self._put(begin)
        status = RunStatus.to_string(RunStatus.RUNNING)
        info = RunInfo(run_id, experiment_id, "", status, start, None, "active", run_name=run_name)
        return Run(info, RunData())

    def log_batch(
        self,
        run_id: str,
        metrics: Sequence[Metric] = (),
        params: Sequence[Param] = (),
        tags: Sequence[RunTag] = (),
        synchronous: bool | None = None,
    ) -> RunOperations | None:
        """Write metrics, parameters and tags."""
        rows = tuple((metric.key, metric.value, metric.timestamp, metric.step) for metric in metrics)
        named = {param.key: param.value for param in params}
        self._put(Write(run=run_id, metrics=rows, params=named, tags={tag.key: tag.value for tag in tags}))
        return None

    def set_tag(self, run_id: str, key: str, value: Any, synchronous: bool | None = None) -> RunOperations | None:
        """Write a tag."""
        self._put(Write(run=run_id, tags={key: str(value)}))
        return None

    def log_artifact(self, run_id: str, local_path: str, artifact_path: str | None = None) -> None:
        """Write a file as an artifact."""
        self._put(Files(run=run_id, folder=artifact_path), Path(local_path))

    def log_artifacts(self, run_id: str, local_dir: str, artifact_path: str | None = None) -> None:
        """Write all files of a folder as artifacts."""
        self._put(Files(run=run_id, folder=artifact_path), Path(local_dir))

    def log_text(self, run_id: str, text: str, artifact_file: str) -> None:
        """Write a text as an artifact."""
        self._put(Text(run=run_id, path=artifact_file, text=text))

    def log_dict(self, run_id: str, dictionary: dict[str, Any], artifact_file: str) -> None:
        """Write JSON as an artifact."""
        self.log_text(run_id, json.dumps(dictionary, indent=2, ensure_ascii=False, default=str), artifact_file)

    def log_inputs(
        self,
        run_id: str,
        datasets: Sequence[DatasetInput] | None = None,
        models: Sequence[LoggedModelInput] | None = None,
    ) -> None:
        """Name the data sets of a run."""
        assert not models
        self._put(Inputs(run=run_id, datasets=tuple(_dataset(one) for one in datasets or ())))

    def log_checkpoint_model(self, run_id: str, checkpoint: Path) -> None:
        """Log a checkpoint as a model of sparsetune's flavour."""
        self._put(Model(run=run_id), checkpoint)

    def update_run(self, run_id: str, status: str | None = None, name: str | None = None) -> None:
        """Set a run's status."""
        assert status is not None and name is None
        self._put(Status(run=run_id, status=status))

    def set_terminated(self, run_id: str, status: str | None = None, end_time: int | None = None) -> None:
        """End a run, now unless told otherwise."""
        self._put(Status(run=run_id, status=status or "FINISHED", end_ms=end_time or _now()))

    def settle(self) -> None:
        """Send what waits; tell what stays, and leave it to `sparsetune sync`."""
        sender, self._sender = self._sender, None
        if sender is None:
            return
        sender.stop()
        session = sender.delivery.session
        left = len(session.pending())
        session.remove_if_empty()
        self._held.close()
        if left:
            _LOG.warning(
                "%d writes to the tracking server %s wait in %s (%s); send them with `sparsetune sync`",
                left,
                self.store.shown,
                session.folder,
                sender.reason,
            )

    def _put(self, operation: Operation, source: Path | None = None) -> Sender:
        if self._sender is None:
            self._sender = Sender(self._new_delivery(), self.store)
        self._sender.put(operation, source)
        return self._sender

    def _new_delivery(self) -> Delivery:
        session = new_session(self._spool, self.store.shown, self._experiment)
        while not self._held.enter_context(session.held()):  # `sparsetune sync` may hold a new one for a moment
            self._held.close()
            session = new_session(self._spool, self.store.shown, self._experiment)
        server = MlflowClient(tracking_uri=self.store.uri, registry_uri=self.store.registry_uri)
        return Delivery(session, server, repeated=False)

    def _give_up(self, sender: Sender) -> str:
        """Forget a session whose first run couldn't be begun, and tell why."""
        reason = sender.reason
        sender.drop()
        self.settle()
        return f"the tracking server {self.store.shown} must take a run, but: {reason}; look into its log"


def _dataset(given: DatasetInput) -> Dataset:
    dataset = given.dataset
    context = next((tag.value for tag in given.tags if tag.key == "mlflow.data.context"), "")
    return Dataset(
        name=dataset.name,
        digest=dataset.digest,
        source_type=dataset.source_type,
        source=dataset.source,
        profile=dataset.profile,
        context=context,
    )


def _now() -> int:
    return time.time_ns() // 1_000_000
