"""The objective function of a study: renders a trial's policy on the tune prompts and compares with dense video."""

import logging
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field, replace
from typing import Self

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial

from sparsetune.attention.policy import Policy
from sparsetune.config.models import Goal, TrialVideos
from sparsetune.errors import GenerationError, TuningError
from sparsetune.evaluation.prompt import PromptResult
from sparsetune.executor import Event, Executor, Incident, Started, StepDone, Task, Worker, run_all
from sparsetune.metrics import Gate, relative_error
from sparsetune.models.prompts import AnyPrompt
from sparsetune.tuning.context import TimeIsUp, TuningContext
from sparsetune.tuning.events import (
    Parameter,
    Prediction,
    TrialPrompt,
    TrialResult,
    TrialStarted,
    TrialState,
    TuningListener,
    notify,
)
from sparsetune.tuning.search.ranking import leaders, mean, mean_sparsity, shortfalls, values
from sparsetune.tuning.search.space import SearchSpace
from sparsetune.tuning.search.study import OUTCOME, SharedStudy, best_sparsity

logger = logging.getLogger(__name__)

METRICS = ("frame_cosine", "frame_l1", "psnr", "frame_diff", "psnr_frame_min")
"""What a trial measures on each prompt, besides the gate's metrics."""

PRUNE_BELOW_GATE_DB = 6.0
"""A trial whose mean PSNR over the prompts so far misses the gate by more than this is pruned."""

PRUNE_BELOW_BEST = 0.95
"""A trial whose sparsity so far is under this fraction of the best feasible trial's is pruned: sparsity hardly differs
from prompt to prompt, so it can't win."""

_MAX_EQUAL_FAILURES = 3
_NUM_WITH_ALL_VIDEOS = 3  # trials
_STORED = (
    "params", "state", "reason", "sparsity", "psnr", "psnr_worst", "frame_cosine", "feasible", "seconds", "shortfalls",
    "seconds_sparse", "seconds_dense", "seconds_noise", "predicted_error", "predicted_seconds", "blocks_run",
)  # fmt: skip

Prune = Callable[[Sequence[PromptResult]], str | None]
"""Returns the reason to prune a trial after its results so far, or None."""

Score = Callable[[AnyPrompt, Policy], Task[PromptResult]]
"""Returns the task that renders and measures a prompt under a policy."""


class SearchStopped(Exception):
    """Another thread of the search failed, or Ctrl-C was pressed."""


class LostTrial(Exception):
    """Another process found this one's heartbeat stale and failed its trial."""


@dataclass
class _Trial:
    number: int
    params: Mapping[str, Parameter]
    policy: Policy
    one_by_one: bool
    results: dict[int, PromptResult] = field(default_factory=dict)
    workers: dict[int, Worker] = field(default_factory=dict)
    videos: dict[int, Future[bytes | None] | bytes | None] = field(default_factory=dict)
    worker: Worker | None = None

    @property
    def in_order(self) -> list[PromptResult]:
        return [self.results[index] for index in sorted(self.results)]


@dataclass
class TrialRunner:
    """Renders and measures policies on the tune prompts; thread-safe. Listeners are called one at a time."""

    executor: Executor
    prompts: tuple[AnyPrompt, ...]
    score: Score
    gate: Gate
    listeners: Sequence[TuningListener] = ()
    predict: Callable[[Policy], Prediction] = lambda _: Prediction()
    deadline: float | None = None  # of `time.perf_counter()`; no further prompt begins after it

    def __post_init__(self) -> None:
        self._notifying = threading.RLock()
        self._stopped = threading.Event()

    @classmethod
    def of(cls, context: TuningContext, predict: Callable[[Policy], Prediction] = lambda _: Prediction()) -> Self:
        gate = context.search_gate
        metrics = tuple(dict.fromkeys((*METRICS, *gate.metrics)))
        return cls(
            executor=context.executor,
            prompts=context.prompts,
            score=lambda prompt, policy: context.score(
                prompt, policy, metrics, with_video=context.trial_videos != "none"
            ),
            gate=gate,
            listeners=context.listeners,
            predict=predict,
        )

    def run(
        self, number: int, params: Mapping[str, Parameter], policy: Policy, prune: Prune | None = None
    ) -> TrialResult:
        """Run one trial and return its outcome.

        `prune` is called after each prompt with the results so far; without it all prompts are rendered at once.

        Raises:
            TimeIsUp: the deadline passed before the last prompt.
            SearchStopped: `stop` was called meanwhile.
        """
        began, trial = time.perf_counter(), _Trial(number, params, policy, one_by_one=prune is not None)
        state: TrialState = "complete"
        reason: str | None = None
        try:
            for index, result in self._one_by_one(trial) if prune else self._all_at_once(trial):
                trial.results[index], trial.videos[index] = replace(result, video=None), result.video
                event = TrialPrompt(number, index, len(self.prompts), trial.results[index], trial.workers.get(index))
                self.notify(lambda listener, event=event: listener.on_prompt(event))  # type: ignore[misc]
                if prune and (reason := prune(trial.in_order)) is not None:
                    state = "pruned"
                    break
        except GenerationError as error:
            state, reason = "failed", str(error)
            if prune is None:  # the other prompts' results are of no use
                self.executor.cancel_all()
        return self._outcome(trial, state, reason, time.perf_counter() - began)

    def notify(self, call: Callable[[TuningListener], None]) -> None:
        with self._notifying:
            notify(self.listeners, call)

    def stop(self) -> None:
        """Cancel the trials of all threads, even in the middle of a prompt."""
        self._stopped.set()
        self.executor.cancel_all()

    @property
    def is_over(self) -> bool:
        return self.deadline is not None and time.perf_counter() > self.deadline

    def _one_by_one(self, trial: _Trial) -> Iterator[tuple[int, PromptResult]]:
        for index, prompt in enumerate(self.prompts):
            if self._stopped.is_set():
                raise SearchStopped
            if self.is_over:
                raise TimeIsUp
            future = self.executor.submit(self.score(prompt, trial.policy), self._listen(trial, index))
            if self._stopped.is_set():  # just now, too early to cancel this one
                self.executor.cancel_all()
            try:
                result = future.result()
            except CancelledError as error:
                raise SearchStopped from error
            yield index, result

    def _all_at_once(self, trial: _Trial) -> Iterator[tuple[int, PromptResult]]:
        tasks = [self.score(prompt, trial.policy) for prompt in self.prompts]
        for index, ended in run_all(self.executor, tasks, lambda index, event: self._listen(trial, index)(event)):
            yield index, ended.result()

    def _listen(self, trial: _Trial, index: int) -> Callable[[Event], None]:
        def on_event(event: Event) -> None:
            what, worker = event.what, event.worker
            if isinstance(what, Incident):
                self.notify(lambda listener: listener.on_incident(what))
            elif isinstance(what, Started):
                trial.workers[index] = worker
                if trial.worker is None or (trial.worker != worker and trial.one_by_one):
                    trial.worker = worker
                    name = None if worker.pid == os.getpid() else worker.label
                    started = TrialStarted(trial.number, trial.params, trial.policy, name)
                    self.notify(lambda listener: listener.on_trial_start(started))
            elif isinstance(what, StepDone) and what.side == "sparse":
                step = replace(what, trial=trial.number, index=index, num_renderings=len(self.prompts), worker=worker)
                self.notify(lambda listener: listener.on_step(step))

        return on_event

    def _outcome(self, trial: _Trial, state: TrialState, reason: str | None, seconds: float) -> TrialResult:
        results = trial.in_order
        measured = bool(results)
        missing = shortfalls(results, self.gate) if measured else {}
        dense = [result.denoising_dense for result in results if result.denoising_dense is not None]
        sparse = [result.denoising_sparse if dense else result.seconds_sparse for result in results]
        speedups = [result.speedup for result in results if result.speedup is not None]
        predicted = self.predict(trial.policy)
        return TrialResult(
            number=trial.number,
            params=dict(trial.params),
            state=state,
            reason=reason,
            policy=trial.policy,
            prompts=tuple(results),
            sparsity=mean_sparsity(results) if measured else None,
            psnr=mean(results, "psnr") if measured else None,
            psnr_worst=min(result.metrics["psnr"] for result in results) if measured else None,
            frame_cosine=mean(results, "frame_cosine") if measured else None,
            feasible=state == "complete" and all(shortfall <= 0 for shortfall in missing.values()),
            seconds=seconds,
            shortfalls=missing,
            seconds_sparse=statistics.mean(each or 0.0 for each in sparse) if measured else None,
            seconds_dense=statistics.mean(dense) if dense else None,
            seconds_noise=relative_error(speedups),
            predicted_error=predicted.error,
            predicted_seconds=predicted.seconds,
            blocks_run=statistics.mean(one.blocks_run or 0.0 for one in results) if measured else None,
            worker=trial.worker,
            videos=_encoded(trial),
        )


def _encoded(trial: _Trial) -> dict[int, bytes]:
    """Wait for a trial's videos; their indices are those of `TrialResult.prompts`."""
    encoded = (trial.videos[index] for index in sorted(trial.videos))
    found = ((video.result() if isinstance(video, Future) else video) for video in encoded)
    return {index: video for index, video in enumerate(found) if video is not None}


@dataclass
class Objective:
    """Optuna's objective function, and the callback after each trial."""

    runner: TrialRunner
    space: SearchSpace
    goal: Goal = "sparsity"
    penalised: bool = False  # whether the value has a penalty, for samplers without constraints; see `ranking.values`
    aimed: bool = False  # whether trials target a sparsity relative to the best feasible trial's, not an error budget
    adaptive: bool = True  # whether budgets near the gate are tried before the sampler's proposals
    trial_videos: TrialVideos = "worst"
    results: dict[int, TrialResult] = field(default_factory=dict)  # of this process, in the order in which they ended
    error: BaseException | None = None  # what stopped the search
    has_lost: bool = False  # whether another process just failed a trial of this one

    def __call__(self, trial: optuna.Trial) -> float | tuple[float, float]:
        try:
            return self._run(trial)
        except (optuna.TrialPruned, GenerationError, TimeIsUp, SearchStopped):
            raise
        except UpdateFinishedTrialError as error:
            self.has_lost = True
            logger.warning(
                "trial %d is dropped: this process had no heartbeat for so long that another one runs it", trial.number
            )
            raise LostTrial from error
        except BaseException as error:
            self.stop(error)
            raise

    def suggest(self, trial: optuna.Trial) -> dict[str, Parameter]:
        assert isinstance(trial.study, SharedStudy)
        return self.space.suggest(trial, trial.study.best_sparsity if self.aimed else 0.0)

    def after_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Notify the listeners of a trial that ended; an Optuna callback.

        Raises:
            TuningError: three trials in a row failed for the same reason.
        """
        result = self.results[trial.number]
        self.results[trial.number] = replace(result, videos={})
        shown = replace(result, videos=self._recorded_videos(result))
        try:
            self.runner.notify(lambda listener: listener.on_trial(shown))
            last = list(self.results.values())[-_MAX_EQUAL_FAILURES:]
            reasons = {each.reason if each.state == "failed" else None for each in last}
            if len(last) == _MAX_EQUAL_FAILURES and len(reasons) == 1 and None not in reasons:
                raise TuningError(f"the last {len(last)} trials failed for the same reason: {last[0].reason}")
        except BaseException as error:
            self.stop(error)
            raise

    def stop(self, error: BaseException) -> None:
        self.error = self.error or error
        self.runner.stop()

    def _recorded_videos(self, result: TrialResult) -> Mapping[int, bytes]:
        """All videos of a trial that is among the best so far, so that those of the final best are there too."""
        best = leaders(self.goal, tuple(self.results.values()), _NUM_WITH_ALL_VIDEOS)
        if self.trial_videos == "all" or result.number in [each.number for each in best]:
            return result.videos
        return {index: video for index, video in result.videos.items() if index == result.worst_prompt}

    def _run(self, trial: optuna.Trial) -> float | tuple[float, float]:
        params = self.suggest(trial)
        policy = self.space.policy(params)
        result = self.runner.run(trial.number, params, policy, lambda results: self._prune(trial, results))
        self._record(trial, result)
        if result.state == "pruned":
            raise optuna.TrialPruned(result.reason)
        if result.state == "failed":
            raise GenerationError(result.reason or "the trial failed")
        return values(self.goal, result, self.penalised)

    def _prune(self, trial: optuna.Trial, results: Sequence[PromptResult]) -> str | None:
        """Report a trial's last prompt; returns the reason to prune it, or None."""
        done, num_prompts = len(results), len(self.runner.prompts)
        if done < num_prompts:
            psnr, sparsity = mean(results, "psnr"), mean_sparsity(results)
            after = f"after {done} of {num_prompts} prompts"
            if psnr < self.runner.gate.min_psnr - PRUNE_BELOW_GATE_DB:
                return f"psnr {psnr:.1f} dB {after}, the gate is {self.runner.gate.min_psnr:g} dB"
            best = best_sparsity(trial.study.get_trials(deepcopy=False)) if self.goal == "sparsity" else 0.0
            if sparsity < PRUNE_BELOW_BEST * best:
                return f"sparsity {sparsity:.3f} {after}, the best has {best:.3f}"
        if self.goal == "pareto":  # has no single best trial
            return None
        figure = results[-1].sparsity if self.goal == "sparsity" else results[-1].cost
        trial.report(figure or 0.0, done - 1)
        # Wilcoxon's test needs more than one prompt, and costs queries.
        if done in (1, num_prompts) or not trial.should_prune():
            return None
        return f"worse than the best trial on the first {done} prompts (Wilcoxon's test)"

    def _record(self, trial: optuna.Trial, result: TrialResult) -> None:
        # First: a trial that has an outcome is never run again, and its constraints can be set only once.
        trial.set_user_attr(OUTCOME, {name: getattr(result, name) for name in _STORED})
        self.results[result.number] = result
        if result.sparsity is not None and not self.penalised:  # CMA-ES warns of constraints that it won't use
            for name, missing in result.shortfalls.items():
                trial.set_constraint(name, missing)
