"""The listener that records evaluations and tuning in MLflow."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparsetune.config import Config
from sparsetune.errors import TrackingError
from sparsetune.evaluation.events import EvaluationEnded, EvaluationListener, EvaluationStarted, PromptDone
from sparsetune.executor import StepDone
from sparsetune.tracking.log_evaluation import log_end, log_prompt, log_start
from sparsetune.tracking.log_report import Reporting
from sparsetune.tracking.log_study import (
    STATUS,
    log_study_end,
    log_study_start,
    log_trial,
    trial_runs,
    trial_started_ms,
)
from sparsetune.tracking.monitor import SystemMonitor
from sparsetune.tracking.run_logger import MODEL, Run, study_tag
from sparsetune.tuning.events import StudyStarted, StudyState, TrialPrompt, TrialResult, TuningListener, TuningResult

if TYPE_CHECKING:
    from mlflow.entities import Metric

import atexit
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVarTuple

from sparsetune.errors import SparsetuneError
from sparsetune.tracking.run_logger import Status, find_study, start_run
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


_LOG = logging.getLogger(__name__)


class TrackingListener(EvaluationListener, TuningListener):
    """Records each evaluation as a run, and a tuning as a run with a child run a trial.

    All runs of a model are in one experiment, `sparsetune/MODEL` where the configuration names none. An
    evaluation during a tuning is a child run of it.

    Args:
        config: the configuration, for its `tracking` section and the model's name.

    Raises:
        TrackingError: the store can't be used, here or when the first run begins; what fails later only warns,
            see `Recorder`.
    """

    def __init__(self, config: Config) -> None:
        self.recorder = Recorder(config)
        self._reporting = Reporting(config)
        self.run_id: str | None = None
        """The run begun last: the tuning's while there is one, else the evaluation's."""
        self._evaluation: Run | None = None
        self._study: Run | None = None
        self._shared = StudyState()
        self._trials: dict[int, str] = {}
        self._monitor: SystemMonitor | None = None
        self._watched: Run | None = None

    def on_start(self, event: EvaluationStarted) -> None:
        """Begin an evaluation's run."""
        if self._study is not None:
            self.recorder.attempt(self._begin_evaluation, event)
        else:
            self._begin_evaluation(event)

    def on_step(self, event: StepDone) -> None:
        """Steps aren't recorded."""

    def on_prompt(self, event: PromptDone | TrialPrompt) -> None:
        """Record a prompt of an evaluation; those of a trial are recorded with it."""
        if self._evaluation is not None and isinstance(event, PromptDone):
            self.recorder.attempt(log_prompt, self._evaluation, event, self._samples(self._evaluation))

    def on_end(self, event: EvaluationEnded) -> None:
        """Record an evaluation's result and end its run."""
        run, self._evaluation = self._evaluation, None
        if run is not None:
            self.recorder.attempt(log_end, run, event, self._last_samples(run))
            self.recorder.attempt(self._reporting.evaluation, run, event)
            self.recorder.attempt(self.recorder.end, run)

    def on_failure(self, error: BaseException) -> None:
        """End the evaluation's run with the cause, or the tuning's where no evaluation is going on.

        A tuning's run that other processes of the study still write to is left to them.
        """
        evaluation, self._evaluation = self._evaluation, None
        run = evaluation or self._study
        if evaluation is None:
            self._study = None
        if run is None:
            return
        self.recorder.attempt(run.log, self._last_samples(run))
        if evaluation is None and self._shared.num_running_elsewhere() > 0:
            self.recorder.release(run)
        else:
            self.recorder.attempt(self.recorder.fail, run, error)

    def on_study_start(self, event: StudyStarted) -> None:
        """Begin a tuning's run, or open it again where the study goes on; all processes on a study share one."""
        self._shared = event.study

        def begin(known: str | None) -> str:
            study = self._study = self._begin_study(event, known)
            return study.run_id

        # In the study's turn: of processes that start at once, the first begins the run.
        self.run_id = event.study.update_attr(f"mlflow {self.recorder.store.shown} {self.recorder.experiment}", begin)

    def _begin_study(self, event: StudyStarted, known: str | None) -> Run:
        study = self.recorder.take_up(event.study_name, known) if event.num_done or known else None
        self._trials = trial_runs(study) if study and event.num_done else {}
        is_first = study is None or (event.num_done > 0 and event.study.num_running_elsewhere() == 0)
        goes_on = study is not None
        if study is None:
            tags = {"study": study_tag(event.study_name), MODEL: event.config["model"]["name"]}
            study = self.recorder.begin(f"tune {event.study_name}", "tuning", tags=tags)
        if is_first:  # the samples of two processes would mix in one run
            self._watch(study)
        log_study_start(study, event, goes_on=goes_on)
        return study

    def on_trial(self, result: TrialResult) -> None:
        """Record a trial that ended, with the time that it took."""
        if self._study is not None:
            self.recorder.attempt(self._record_trial, self._study, result)

    def evaluation_listeners(self) -> tuple[EvaluationListener, ...]:
        """Record the winner's evaluation too."""
        return (self,)

    def on_study_end(self, result: TuningResult) -> None:
        """Record the winner and end the tuning's run."""
        run, self._study = self._study, None
        if run is not None and result.left_to is not None:
            self.recorder.attempt(run.log, self._last_samples(run))
            self.recorder.release(run)
        elif run is not None:
            self.recorder.attempt(self._read_trials, run, result)
            self.recorder.attempt(log_study_end, run, result, self._trials, self.recorder.page, self._last_samples(run))
            self.recorder.attempt(self._reporting.tuning, run, result)
            self.recorder.attempt(self.recorder.end, run)

    def _begin_evaluation(self, event: EvaluationStarted) -> None:
        kind = "tuned" if event.config.get("use_tuned") else "default"
        tags = {"policy": kind, "tuner": event.config.get("tuner"), MODEL: event.config.get("model_name")}
        self._evaluation = self.recorder.begin(f"eval {kind}", "evaluation", self._study, tags)
        self.run_id = (self._study or self._evaluation).run_id
        if self._study is None:
            self._watch(self._evaluation)
        log_start(self._evaluation, event, with_model=self._study is None)

    def _record_trial(self, study: Run, trial: TrialResult) -> None:
        run = self.recorder.begin(f"trial {trial.number}", "trial", study, start_ms=trial_started_ms(trial))
        self._trials[trial.number] = run.run_id
        log_trial(run, trial)
        self.recorder.end(run, STATUS[trial.state])
        study.log(self._samples(study))

    def _read_trials(self, run: Run, result: TuningResult) -> None:
        """Find the runs of the trials that other processes recorded."""
        if all(trial.number in self._trials for trial in result.trials):
            return
        try:
            self._trials = trial_runs(run) | self._trials
        except TrackingError as error:  # the rest can still be written: a server's writes are kept in the spool
            _LOG.warning("the tuning's table doesn't name the runs of trials of other processes: %s", error)

    def _watch(self, run: Run) -> None:
        """Note from here on what the machine does, in this run."""
        self._monitor, self._watched = SystemMonitor(run.start_ms), run

    def _samples(self, run: Run) -> "Sequence[Metric]":
        return self._monitor.take() if self._monitor is not None and run is self._watched else ()

    def _last_samples(self, run: Run) -> "Sequence[Metric]":
        if self._monitor is not None and run is self._watched:
            self._monitor.stop()
        return self._samples(run)
