"""What both listeners share: the store, the experiment, and what happens when the store fails."""

import atexit
import logging
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVarTuple

from sparsetune.config import Config
from sparsetune.errors import SparsetuneError
from sparsetune.tracking.runs import Run, Status, find_study, start_run
from sparsetune.tracking.spool import spool_folder
from sparsetune.tracking.store import Store, check_answers, connect, experiment_id, resolve_store

if TYPE_CHECKING:
    from mlflow import MlflowClient

_LOG = logging.getLogger(__name__)

Arguments = TypeVarTuple("Arguments")


class Recorder:
    """Begins and ends runs in a configuration's store and experiment.

    The store is connected to when the first run begins; a server is asked for a sign of life at once. What
    fails up to then raises. What fails later ends no work: a server that goes away has its writes kept in the
    spool, see `Outbox`; any other failure is told in one warning, and nothing is recorded from then on.

    Args:
        config: the configuration; its `tracking` section and the model's name are read.

    Raises:
        TrackingError: a tracking server doesn't answer.
    """

    def __init__(self, config: Config) -> None:
        self.store: Store = resolve_store(config.tracking)
        self.experiment = experiment_name(config)
        self.spool = spool_folder(config.tracking)
        self.problem: str | None = None
        self._client: MlflowClient | None = None
        self._experiment_id = ""
        self._open: list[Run] = []
        if self.store.is_server:
            check_answers(self.store.uri)

    @property
    def page(self) -> str:
        """The experiment's page in MLflow's UI, to be added to its link; empty before the first run."""
        return f"#/experiments/{self._experiment_id}" if self._experiment_id else ""

    def begin(
        self,
        name: str,
        kind: str,
        parent: Run | None = None,
        tags: Mapping[str, object] | None = None,
        start_ms: int | None = None,
    ) -> Run:
        """Begin a run; should the process exit before its end, it ends as KILLED.

        Raises:
            TrackingError: the store fails.
        """
        client = self._connected()
        run = start_run(client, self._experiment_id, name, kind=kind, parent=parent, tags=tags, start_ms=start_ms)
        self._open.append(run)
        return run

    def take_up(self, study: str, run_id: str | None = None) -> Run | None:
        """Open the run of a tuning again, one that was interrupted or that other processes write to; None without one.

        Args:
            study: the study's name.
            run_id: the run; None is the newest of the study.

        Raises:
            TrackingError: the store fails.
        """
        run = find_study(self._connected(), self._experiment_id, study, run_id)
        if run is not None:
            run.reopen()
            self._open.append(run)
        return run

    def release(self, run: Run) -> None:
        """Leave a run as it is, for the other processes that write to it."""
        self._open.remove(run)
        self.attempt(self._settle)

    def end(self, run: Run, status: Status = "FINISHED") -> None:
        """End a run."""
        self._open.remove(run)
        run.finish(status)
        self._settle()

    def fail(self, run: Run, error: BaseException) -> None:
        """End a run with the error that ended its work."""
        self._open.remove(run)
        run.fail(error)
        self._settle()

    def abandon(self) -> None:
        """End every run that is still open: as KILLED, or as FAILED where recording it failed."""
        status: Status = "KILLED" if self.problem is None else "FAILED"
        left, self._open = self._open, []
        try:
            for run in left:
                run.finish(status)
            self._settle()
        except (SparsetuneError, OSError) as error:
            _LOG.warning("runs that were begun in MLflow stay open: %s", error)

    def attempt(self, work: Callable[[*Arguments], object], *arguments: *Arguments) -> None:
        """Do some recording, unless it has failed before; a failure is told, and ends recording alone."""
        if self.problem is not None:
            return
        try:
            work(*arguments)
        except (SparsetuneError, OSError) as error:
            self.problem = str(error)
            _LOG.warning("nothing is recorded in MLflow from here on: %s", error)

    def _connected(self) -> "MlflowClient":
        if self._client is None:
            client = connect(self.store)
            self._experiment_id = experiment_id(client, self.store, self.experiment)
            if self.store.is_server:
                client = self._outbox()
            self._client = client
            atexit.register(self.abandon)
        return self._client

    def _outbox(self) -> "MlflowClient":
        """Send first what earlier processes left: it may be of the same runs."""
        from sparsetune.tracking.outbox import Outbox
        from sparsetune.tracking.sync import BUSY, sync

        for session in sync(self.spool, self.store, only_this=True):
            if session.left and session.reason != BUSY:
                _LOG.warning("%d earlier writes still wait in %s: %s", session.left, session.folder, session.reason)
            elif session.sent:
                _LOG.warning("%d earlier writes were sent to the tracking server", session.sent)
        return Outbox(self.store, self._experiment_id, self.spool)

    def _settle(self) -> None:
        if self._client is not None and self.store.is_server and not self._open:
            from sparsetune.tracking.outbox import Outbox

            assert isinstance(self._client, Outbox)
            self._client.settle()


def experiment_name(config: Config) -> str:
    """Name the experiment: `tracking.experiment`, else MLFLOW_EXPERIMENT_NAME, else after the model."""
    return config.tracking.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or f"sparsetune/{config.model.name}"
