"""The listener that records evaluations and tuning in MLflow."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparsetune.config import Config
from sparsetune.errors import TrackingError
from sparsetune.evaluation.events import EvaluationEnded, EvaluationListener, EvaluationStarted, PromptDone, StepDone
from sparsetune.tracking.evaluation import log_end, log_prompt, log_start
from sparsetune.tracking.monitor import SystemMonitor
from sparsetune.tracking.recorder import Recorder
from sparsetune.tracking.reporting import Reporting
from sparsetune.tracking.runs import MODEL, Run, study_tag
from sparsetune.tracking.study import STATUS, log_study_end, log_study_start, log_trial, trial_runs, trial_started_ms
from sparsetune.tuning.events import StudyStarted, TrialPrompt, TrialResult, TrialStep, TuningListener, TuningResult
from sparsetune.tuning.others import Alone, Others

if TYPE_CHECKING:
    from mlflow.entities import Metric

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
        self._others: Others = Alone()
        self._trials: dict[int, str] = {}
        self._monitor: SystemMonitor | None = None
        self._watched: Run | None = None

    def on_start(self, event: EvaluationStarted) -> None:
        """Begin an evaluation's run."""
        if self._study is not None:
            self.recorder.attempt(self._begin_evaluation, event)
        else:
            self._begin_evaluation(event)

    def on_step(self, event: StepDone | TrialStep) -> None:
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
        if evaluation is None and self._others.num_running() > 0:
            self.recorder.release(run)
        else:
            self.recorder.attempt(self.recorder.fail, run, error)

    def on_study_start(self, event: StudyStarted) -> None:
        """Begin a tuning's run, or open it again where the study goes on; all processes on a study share one."""
        self._others = event.others

        def begin(known: str | None) -> str:
            study = self._study = self._begin_study(event, known)
            return study.run_id

        # In the study's turn: of processes that start at once, the first begins the run.
        self.run_id = event.others.note(f"mlflow {self.recorder.store.shown} {self.recorder.experiment}", begin)

    def _begin_study(self, event: StudyStarted, known: str | None) -> Run:
        study = self.recorder.take_up(event.study_name, known) if event.num_done or known else None
        self._trials = trial_runs(study) if study and event.num_done else {}
        is_first = study is None or (event.num_done > 0 and event.others.num_running() == 0)
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
