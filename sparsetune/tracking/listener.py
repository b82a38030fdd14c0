"""The listener that records evaluations and tuning in MLflow."""

import atexit
import logging
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVarTuple

from sparsetune.config import Config
from sparsetune.errors import SparsetuneError, TrackingError
from sparsetune.evaluation.events import EvaluationEnded, EvaluationListener, EvaluationStarted, PromptDone
from sparsetune.executor import StepDone
from sparsetune.signals import deferring_interrupts
from sparsetune.tracking.log_evaluation import log_end, log_prompt, log_start
from sparsetune.tracking.log_report import ReportLogger
from sparsetune.tracking.log_study import (
    STATUS,
    log_study_end,
    log_study_start,
    log_trial,
    trial_runs,
    trial_started_ms,
)
from sparsetune.tracking.processes import PROCESS, end_left_runs, hold_process_lock, lock_folder
from sparsetune.tracking.publisher import Publisher
from sparsetune.tracking.run_logger import RunLogger, Status, find_study, start_run, study_tag
from sparsetune.tracking.store import (
    KEY,
    MODEL,
    SERVER,
    Store,
    cause_of,
    check_answers,
    connect,
    experiment_id,
    local_store,
    resolve_store,
    store_errors,
)
from sparsetune.tuning.events import StudyStarted, StudyState, TrialPrompt, TrialResult, TuningListener, TuningResult

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

_LOG = logging.getLogger(__name__)

START_SECONDS = 3.0
"""Within which a tracking server must answer before the first run."""

Arguments = TypeVarTuple("Arguments")


class RunRecorder:
    """Begins and ends runs in a configuration's store and experiment.

    With a tracking server, runs are recorded in the local store and published from there. The store is opened when the
    first run begins, and what fails up to then raises TrackingError, also a server at whose address nothing listens.
    What fails later is logged once, and nothing is recorded from then on; the work goes on.
    """

    def __init__(self, config: Config) -> None:
        configured = resolve_store(config.tracking)
        self.server: Store | None = configured if configured.is_server else None
        self.store: Store = local_store(config.tracking) if self.server else configured
        named = config.tracking.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME")
        self.experiment = named or f"sparsetune/{config.model.name}"
        self.problem: str | None = None
        self.publisher: Publisher | None = None
        self._client: MlflowClient | None = None
        self._experiment_id = ""
        self._root, self._process = config.tracking.root, ""
        self._open: list[RunLogger] = []
        self._down = None if self.server is None else self._check_server(self.server)

    @property
    def page(self) -> str:
        """The experiment's page in MLflow's UI; empty before the first run."""
        return f"#/experiments/{self._experiment_id}" if self._experiment_id else ""

    def begin(
        self,
        name: str,
        kind: str,
        parent: RunLogger | None = None,
        tags: Mapping[str, object] | None = None,
        start_ms: int | None = None,
    ) -> RunLogger:
        """Begin a run; should the process exit before its end, it ends as KILLED."""
        client = self._connected()
        tags = {**(tags or {}), SERVER: self.server.shown if self.server else None}
        tags[PROCESS] = self._process
        with deferring_interrupts():
            run = start_run(client, self._experiment_id, name, kind=kind, parent=parent, tags=tags, start_ms=start_ms)
            self._open.append(run)
        if parent is None:
            self.publish()
        return run

    def resume(self, study: str, key: str | None = None) -> RunLogger | None:
        """Reopen the run of a study with a key, or its newest one."""
        run = find_study(self._connected(), self._experiment_id, study, key)
        if run is not None:
            with deferring_interrupts():
                run.reopen()
                self._open.append(run)
            run.log(tags={SERVER: self.server.shown if self.server else None, PROCESS: self._process})
            self.publish()
        return run

    def release(self, run: RunLogger) -> None:
        """Leave a run open for the other processes that write to it."""
        self._open.remove(run)
        self.publish(run)

    def end(self, run: RunLogger, status: Status = "FINISHED") -> None:
        with deferring_interrupts():
            run.finish(status)
            self._open.remove(run)
        self.publish(run)

    def fail(self, run: RunLogger, error: BaseException) -> None:
        with deferring_interrupts():
            self._open.remove(run)
            run.fail(error)
        self.publish(run)

    def abandon(self) -> None:
        """End every run that is still open: as KILLED, or as FAILED where recording it failed."""
        status: Status = "KILLED" if self.problem is None else "FAILED"
        left, self._open = self._open, []
        try:
            with deferring_interrupts():
                for run in left:
                    run.finish(status)
        except (SparsetuneError, OSError) as error:
            _LOG.warning("runs stay open in MLflow: %s", error)
        if left:
            self.publish(*left)

    def attempt(self, work: Callable[[*Arguments], object], *arguments: *Arguments) -> None:
        """Record something, unless recording has failed before; a failure is logged, and ends recording only."""
        if self.problem is not None:
            return
        try:
            work(*arguments)
        except Exception as error:  # a bug in recording must not end a search of hours either
            self.problem = cause_of(error)
            debugging = _LOG.isEnabledFor(logging.DEBUG)
            _LOG.warning("nothing is recorded in MLflow from here on: %s", self.problem, exc_info=debugging)

    def publish(self, *ended: RunLogger) -> None:
        """Have runs that ended and all open ones published; after the last run, wait a bounded time for that."""
        if self.publisher is None:
            return
        self.publisher.publish(run.run_id for run in (*ended, *reversed(self._open)))
        if ended and not self._open:
            self.publisher.flush()

    def _connected(self) -> "MlflowClient":
        if self._client is None:
            client = connect(self.store)
            self._experiment_id = experiment_id(client, self.store, self.experiment)
            if self.server is not None:
                self.publisher = Publisher(client, self.server, self._down)
            self._client = client
            folder = lock_folder(self.store, self._root)
            end_left_runs(client, folder)
            self._process = hold_process_lock(folder)
            atexit.register(self.abandon)
        return self._client

    def _check_server(self, server: Store) -> str | None:
        """Check that something listens; return what was logged of a server that doesn't answer yet, if any."""
        try:
            check_answers(server.uri, seconds=START_SECONDS)
        except TrackingError as error:
            cause = error.__cause__
            if not isinstance(getattr(cause, "reason", cause), TimeoutError):
                raise
            _LOG.warning("%s; runs are kept in the local store meanwhile", error)
            return str(error)
        return None


class TrackingListener(EvaluationListener, TuningListener):
    """Records each evaluation as a run, and a tuning as a run with a child run a trial.

    All runs of a model are in one experiment, `sparsetune/MODEL` where the configuration names none. An evaluation
    during a tuning is a child run of it.

    Args:
        config: the configuration, for its `tracking` section and the model's name.

    Raises:
        TrackingError: the store can't be used, here or when the first run begins; later failures are only logged.
    """

    def __init__(self, config: Config) -> None:
        self.recorder = RunRecorder(config)
        self._report = ReportLogger(config)
        self.run_id: str | None = None
        """Id of the current run: the tuning's while there is one, else the evaluation's."""
        self._evaluation: RunLogger | None = None
        self._study: RunLogger | None = None
        self._shared = StudyState()
        self._trials: dict[int, str] = {}
        self._monitor: SystemMetricsMonitor | None = None

    def on_start(self, event: EvaluationStarted) -> None:
        if self._study is not None:
            self.recorder.attempt(self._begin_evaluation, event)
        else:
            self._begin_evaluation(event)

    def on_step(self, event: StepDone) -> None:
        """Do nothing: steps aren't recorded."""

    def on_prompt(self, event: PromptDone | TrialPrompt) -> None:
        """Record a prompt of an evaluation; those of a trial are recorded with it."""
        if self._evaluation is not None and isinstance(event, PromptDone):
            self.recorder.attempt(log_prompt, self._evaluation, event)
            self.recorder.publish()

    def on_end(self, event: EvaluationEnded) -> None:
        run, self._evaluation = self._evaluation, None
        if run is not None:
            self.recorder.attempt(log_end, run, event)
            self.recorder.attempt(self._report.evaluation, run, event)
            self.recorder.attempt(self._stop_monitor, run)
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
        self.recorder.attempt(self._stop_monitor, run)
        if evaluation is None and self._shared.num_running_elsewhere() > 0:
            self.recorder.release(run)
        else:
            self.recorder.attempt(self.recorder.fail, run, error)

    def on_study_start(self, event: StudyStarted) -> None:
        """Begin or resume a tuning's run; all processes on a study share one."""
        self._shared = event.study
        store = self.recorder.server or self.recorder.store
        # Under the study's lock: of processes that start at once, the first begins the run.
        event.study.update_attr(
            f"mlflow {store.shown} {self.recorder.experiment}", lambda known: self._begin_study(event, known)
        )

    def _begin_study(self, event: StudyStarted, known: str | None) -> str:
        """Begin or resume a study's run; return its key, by which processes on other hosts publish it too."""
        study = self.recorder.resume(event.study_name, known) if event.num_done or known else None
        self._trials = trial_runs(study) if study and event.num_done else {}
        is_first = study is None or (event.num_done > 0 and event.study.num_running_elsewhere() == 0)
        resumed = study is not None
        if self.recorder.server is None:
            known = None
        if study is None:
            tags = {"study": study_tag(event.study_name), MODEL: event.config["model"]["name"], KEY: known}
            study = self.recorder.begin(f"tune {event.study_name}", "tuning", tags=tags)
        if is_first:  # the samples of two processes would mix in one run
            self._start_monitor(study)
        log_study_start(study, event, resumed=resumed)
        self._study, self.run_id = study, study.run_id
        return known or study.run_id

    def on_trial(self, result: TrialResult) -> None:
        if self._study is not None:
            self.recorder.attempt(self._record_trial, self._study, result)

    def evaluation_listeners(self) -> tuple[EvaluationListener, ...]:
        return (self,)

    def on_study_end(self, result: TuningResult) -> None:
        run, self._study = self._study, None
        if run is None:
            return
        self.recorder.attempt(self._stop_monitor, run)
        if result.left_to is not None:
            self.recorder.release(run)
            return
        self.recorder.attempt(self._read_trials, run, result)
        self.recorder.attempt(self._tag_winner, run, result)
        self.recorder.attempt(log_study_end, run, result, self._trials, self.recorder.page)
        self.recorder.attempt(self._report.tuning, run, result)
        self.recorder.attempt(self.recorder.end, run)

    def _begin_evaluation(self, event: EvaluationStarted) -> None:
        kind = "tuned" if event.config.get("use_tuned") else "default"
        tags = {"policy": kind, "tuner": event.config.get("tuner"), MODEL: event.config.get("short_name")}
        self._evaluation = self.recorder.begin(f"eval {kind}", "evaluation", self._study, tags)
        self.run_id = (self._study or self._evaluation).run_id
        if self._study is None:
            self._start_monitor(self._evaluation)
        log_start(self._evaluation, event, with_model=self._study is None)

    def _record_trial(self, study: RunLogger, trial: TrialResult) -> None:
        run = self.recorder.begin(f"trial {trial.number}", "trial", study, start_ms=trial_started_ms(trial))
        self._trials[trial.number] = run.run_id
        log_trial(run, trial)
        self.recorder.end(run, STATUS[trial.state])

    def _tag_winner(self, run: RunLogger, result: TuningResult) -> None:
        """Tag the winning trial's run, and no longer that of an earlier end of a resumed study."""
        client, winner = run.client, None if result.best is None else self._trials.get(result.best.number)
        before = client.get_run(run.run_id).data.tags.get("best.run_id")
        recorded = set(self._trials.values())
        for run_id, wins in ((before, False), (winner, True)):
            if run_id in recorded and (wins or run_id != winner):
                trial = RunLogger(client, str(run_id))
                trial.amend({"winner": wins})
                self.recorder.publish(trial)

    def _read_trials(self, run: RunLogger, result: TuningResult) -> None:
        """Find the runs of the trials that other processes recorded."""
        numbers = {trial.number for trial in result.trials}
        if numbers - self._trials.keys():
            self._trials = trial_runs(run) | self._trials
        publisher = self.recorder.publisher
        if publisher is not None and numbers - self._trials.keys():
            try:
                self._trials = publisher.copies.trial_runs(run.run_id) | self._trials
            except TrackingError as error:
                _LOG.warning("the tuning's table lacks the runs of trials on other hosts: %s", error)

    def _start_monitor(self, run: RunLogger) -> None:
        """Log CPU, memory, disk, network and GPUs from here on, unless MLflow's own variable turns that off."""
        if os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING") == "false":
            return
        try:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
        except ImportError:  # no psutil
            return
        logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)
        uri = self.recorder.store.uri
        self._monitor = SystemMetricsMonitor(run.run_id, resume_logging=True, tracking_uri=uri)  # type: ignore[no-untyped-call]
        self._monitor.start()  # type: ignore[no-untyped-call]

    def _stop_monitor(self, run: RunLogger) -> None:
        monitor = self._monitor
        if monitor is None or monitor._run_id != run.run_id:
            return
        self._monitor = None
        with store_errors(f"write to run {run.run_id}"):
            monitor.finish()  # type: ignore[no-untyped-call]
            monitor.publish_metrics(monitor.aggregate_metrics())  # type: ignore[no-untyped-call]
            monitor.mlflow_logger.flush()  # type: ignore[no-untyped-call]
