"""Trials: policies rendered on the tune prompts, prompt by prompt, and judged against dense video."""

import math
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from sparsetune.attention.policy import Policy
from sparsetune.errors import GenerationError
from sparsetune.evaluation.prompt import PromptResult
from sparsetune.executor import Event, Executor, Incident, Started, StepDone, Task, TaskFuture, Worker
from sparsetune.metrics import Gate
from sparsetune.models.prompts import AnyPrompt
from sparsetune.tuning.context import TuningContext
from sparsetune.tuning.events import (
    Parameter,
    TrialPrompt,
    TrialResult,
    TrialStarted,
    TrialState,
    TuningListener,
    tell,
)

METRICS = ("frame_cosine", "frame_l1", "psnr", "frame_diff", "psnr_frame_min")
"""What a trial measures on each prompt."""

GiveUp = Callable[[Sequence[PromptResult]], str | None]
"""Says why a trial isn't worth further prompts, or None where it is."""

Score = Callable[[AnyPrompt, Policy], Task[PromptResult]]
"""Makes the task that renders and measures a prompt under a policy."""


class TimeIsUp(Exception):
    """The search's time ended in the middle of its work."""


@dataclass
class _Running:
    """A trial that is under way: what it is, and how far it got."""

    number: int
    params: Mapping[str, Parameter]
    policy: Policy
    give_up: GiveUp
    began: float
    results: dict[int, PromptResult] = field(default_factory=dict)
    submitted: int = 0
    in_turns: bool = True
    told: Worker | None = None
    ended: bool = False

    @property
    def in_order(self) -> list[PromptResult]:
        return [self.results[index] for index in sorted(self.results)]


@dataclass
class TrialRunner:
    """Has trials rendered and judges them; as many at a time as were begun.

    A trial's next prompt is handed out when its last one was judged: whether it is worth it is decided here, where all
    trials are known.

    Args:
        engine: renders.
        prompts: tune prompts.
        score: makes the task of a prompt.
        gate: constraints of the search.
        listeners: told what happens.
        predict: says what error calibration expects of a policy, None where it can't tell.
        deadline: `time.perf_counter()` after which no further prompt begins; None is never.
        results: the trials of this run, by number, in the order in which they ended.
    """

    engine: Executor
    prompts: tuple[AnyPrompt, ...]
    score: Score
    gate: Gate
    listeners: Sequence[TuningListener] = ()
    predict: Callable[[Policy], float | None] = lambda _: None
    deadline: float | None = None
    results: dict[int, TrialResult] = field(default_factory=dict)
    _in_flight: dict[TaskFuture[PromptResult], tuple[_Running, int]] = field(default_factory=dict, repr=False)
    _inbox: "queue.SimpleQueue[Any]" = field(default_factory=queue.SimpleQueue, repr=False)

    @classmethod
    def of(cls, bench: TuningContext, predict: Callable[[Policy], float | None] = lambda _: None) -> Self:
        """Run the trials of a search on its tune prompts."""
        return cls(
            engine=bench.engine,
            prompts=bench.prompts,
            score=lambda prompt, policy: bench.score(prompt, policy, METRICS),
            gate=bench.search_gate,
            listeners=bench.listeners,
            predict=predict,
        )

    @property
    def is_over(self) -> bool:
        """Whether the deadline passed."""
        return self.deadline is not None and time.perf_counter() > self.deadline

    def run(
        self, number: int, params: Mapping[str, Parameter], policy: Policy, give_up: GiveUp | None = None
    ) -> TrialResult:
        """Have one trial rendered and give its outcome; all its prompts at once, unless it may be given up."""
        if give_up is None:
            self.begin(number, params, policy, num_at_once=len(self.prompts))
        else:
            self.begin(number, params, policy, give_up)
        return self.next()

    def begin(
        self,
        number: int,
        params: Mapping[str, Parameter],
        policy: Policy,
        give_up: GiveUp = lambda _: None,
        num_at_once: int = 1,
    ) -> None:
        """Begin a trial.

        Args:
            number: the trial's number.
            params: what led to the policy.
            policy: what to run.
            give_up: asked after each prompt with the results so far; a reason ends the trial as pruned.
            num_at_once: prompts handed out at a time; more than one are in vain where the trial is given up.
        """
        running = _Running(number, params, policy, give_up, time.perf_counter(), in_turns=num_at_once == 1)
        for _ in range(min(num_at_once, len(self.prompts))):
            self._submit(running)

    def next(self) -> TrialResult:
        """Wait until a trial ends, and give its outcome.

        Raises:
            TimeIsUp: the deadline passed, and no trial ended with the prompts in hand.
        """
        while self._in_flight:
            what = self._inbox.get()
            if not isinstance(what, TaskFuture):
                self._tell(*what)
                continue
            if what not in self._in_flight:
                continue
            running, index = self._in_flight.pop(what)
            ended = None if running.ended else self._took(running, index, what)
            if ended is not None:
                running.ended = True
                self.results[running.number] = ended
                return ended
        raise TimeIsUp

    def abandon(self) -> None:
        """Forget the trials that are under way."""
        self._in_flight.clear()
        self.engine.cancel_all()

    def _submit(self, running: _Running) -> None:
        index, caller = running.submitted, threading.get_ident()

        def on_event(event: Event) -> None:
            if threading.get_ident() == caller:
                self._tell(running, index, event)
            else:
                self._inbox.put((running, index, event))

        running.submitted += 1
        future = self.engine.submit(self.score(self.prompts[index], running.policy), on_event)
        self._in_flight[future] = (running, index)
        future.add_done_callback(self._inbox.put)

    def _took(self, running: _Running, index: int, outcome: TaskFuture[PromptResult]) -> TrialResult | None:
        """Take in what a prompt came to; gives the trial's outcome where that ends it."""
        try:
            result = outcome.result()
        except GenerationError as error:
            return self._outcome(running, "failed", str(error), outcome.worker)
        running.results[index] = result
        event = TrialPrompt(running.number, index, len(self.prompts), result, outcome.worker)
        tell(self.listeners, lambda listener: listener.on_prompt(event))
        if (reason := running.give_up(running.in_order)) is not None:
            return self._outcome(running, "pruned", reason, outcome.worker)
        if len(running.results) == len(self.prompts):
            return self._outcome(running, "complete", None, outcome.worker)
        if running.submitted < len(self.prompts) and not self.is_over:
            self._submit(running)
        return None

    def _tell(self, running: _Running, index: int, event: Event) -> None:
        what, worker = event.what, event.worker
        if isinstance(what, Incident):
            incident = what
            tell(self.listeners, lambda listener: listener.on_incident(incident))
        if isinstance(what, Started) and (running.told is None or (running.told != worker and running.in_turns)):
            running.told = worker
            name = None if worker.pid == os.getpid() else worker.label
            started = TrialStarted(running.number, running.params, running.policy, name)
            tell(self.listeners, lambda listener: listener.on_trial_start(started))
        elif isinstance(what, StepDone) and what.side == "sparse":
            step = replace(what, trial=running.number, index=index, num_renderings=len(self.prompts), worker=worker)
            tell(self.listeners, lambda listener: listener.on_step(step))

    def _outcome(self, running: _Running, state: TrialState, reason: str | None, worker: Worker | None) -> TrialResult:
        results = running.in_order
        measured = bool(results)
        missing = shortfalls(results, self.gate) if measured else {}
        return TrialResult(
            number=running.number,
            params=dict(running.params),
            state=state,
            reason=reason,
            policy=running.policy,
            prompts=tuple(results),
            sparsity=mean_sparsity(results) if measured else None,
            psnr=mean(results, "psnr") if measured else None,
            psnr_worst=min(result.metrics["psnr"] for result in results) if measured else None,
            frame_cosine=mean(results, "frame_cosine") if measured else None,
            feasible=state == "complete" and all(shortfall <= 0 for shortfall in missing.values()),
            seconds=time.perf_counter() - running.began,
            shortfalls=missing,
            seconds_sparse=sum(result.seconds_sparse or 0.0 for result in results) / len(results) if measured else None,
            predicted_error=self.predict(running.policy),
            worker=worker,
        )


def shortfalls(results: Sequence[PromptResult], gate: Gate) -> dict[str, float]:
    """Say by how much results miss each bound of the gate; at most 0 where a bound is met.

    Strict bounds (`above`) become ≤ constraints: a metric exactly at its bound is taken as met.
    """
    if not results:
        return {"psnr": math.inf, "frame_cosine": math.inf}
    missing = {
        "psnr": gate.min_psnr - mean(results, "psnr"),
        "frame_cosine": gate.min_frame_cosine - mean(results, "frame_cosine"),
    }
    if gate.min_psnr_worst is not None:
        missing["psnr_worst"] = gate.min_psnr_worst - min(result.metrics["psnr"] for result in results)
    if gate.min_psnr_frame is not None:
        missing["psnr_frame"] = gate.min_psnr_frame - min(result.metrics["psnr_frame_min"] for result in results)
    return missing


def mean(results: Sequence[PromptResult], metric: str) -> float:
    """Average a metric over prompts."""
    return sum(result.metrics[metric] for result in results) / len(results)


def mean_sparsity(results: Sequence[PromptResult]) -> float:
    """Average the sparsity over prompts."""
    return sum(result.sparsity or 0.0 for result in results) / len(results)
