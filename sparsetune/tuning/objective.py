"""What a trial is worth: its policy rendered on the tune prompts and judged against dense video."""

import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import optuna

from sparsetune.attention.policy import Policy
from sparsetune.attention.sparsify import SparseHandle
from sparsetune.errors import GenerationError
from sparsetune.evaluation.baseline import BaselineCache
from sparsetune.evaluation.events import Side
from sparsetune.evaluation.pair import PromptResult, evaluate_prompt
from sparsetune.metrics import Gate
from sparsetune.models.generation import Renderer
from sparsetune.tuning.events import (
    Parameter,
    TrialPrompt,
    TrialResult,
    TrialStarted,
    TrialState,
    TrialStep,
    TuningListener,
    tell,
)
from sparsetune.tuning.space import SearchSpace

METRICS = ("frame_cosine", "frame_l1", "psnr", "frame_diff", "psnr_frame_min")
"""What a trial measures on each prompt."""

OWNER = "owner"
"""User attribute of a trial: the host and process that runs it, so that a process that died is recognised."""

HOPELESS_DB = 6.0
"""A trial whose mean PSNR over the prompts so far misses the gate by more than this is given up."""

BEATEN = 0.95
"""A trial whose sparsity so far is under this fraction of the best feasible trial's is given up: it can't win, since
sparsity hardly differs from prompt to prompt."""


@dataclass
class Objective:
    """Renders and judges trials, one after the other, on one pipeline.

    Args:
        renderer: of the pipeline.
        handle: installed on it; its policy is set for each trial.
        space: what a trial's parameters mean.
        prompts: tune prompts.
        seed: of every rendering.
        cache: the dense baselines.
        gate: constraints of the search.
        listeners: told what happens.
        results: the trials of this run, by number.
    """

    renderer: Renderer
    handle: SparseHandle
    space: SearchSpace
    prompts: tuple[str, ...]
    seed: int
    cache: BaselineCache
    gate: Gate
    listeners: Sequence[TuningListener] = ()
    results: dict[int, TrialResult] = field(default_factory=dict)
    best_sparsity: float = 0.0

    def __call__(self, trial: optuna.Trial) -> float:
        """Run a trial; what Optuna maximises is the mean sparsity.

        Raises:
            optuna.TrialPruned: it was given up.
            GenerationError: a rendering failed; Optuna marks the trial failed.
        """
        started = time.perf_counter()
        trial.set_user_attr(OWNER, [socket.gethostname(), os.getpid()])
        params = self.space.suggest(trial)
        policy = self.space.policy(params)
        tell(self.listeners, lambda listener: listener.on_trial_start(TrialStarted(trial.number, params, policy)))
        self.handle.policy = policy
        results: list[PromptResult] = []
        state: TrialState = "complete"
        reason: str | None = None
        try:
            for index in range(len(self.prompts)):
                results.append(self._judge(trial.number, index))
                reason = self._give_up(results)
                if reason is not None:
                    state = "pruned"
                    break
        except GenerationError as error:
            state, reason = "failed", str(error)
        outcome = self._outcome(trial.number, params, policy, results, state, reason, time.perf_counter() - started)
        self.results[trial.number] = outcome
        _record(trial, outcome)
        tell(self.listeners, lambda listener: listener.on_trial(outcome))
        if outcome.feasible and outcome.sparsity is not None:
            self.best_sparsity = max(self.best_sparsity, outcome.sparsity)
        if state == "pruned":
            raise optuna.TrialPruned(reason)
        if state == "failed" or outcome.sparsity is None:
            raise GenerationError(reason or "the trial rendered nothing")
        return outcome.sparsity

    def _judge(self, number: int, index: int) -> PromptResult:
        total = len(self.prompts)

        def watch(side: Side, step: int, num_steps: int, cached: bool) -> None:
            if side == "sparse":
                event = TrialStep(number, index, total, step, num_steps)
                tell(self.listeners, lambda listener: listener.on_step(event))

        result = evaluate_prompt(self.renderer, self.handle, self.prompts[index], self.seed, self.cache, METRICS, watch)
        if result.error is not None:
            raise GenerationError(result.error)
        tell(self.listeners, lambda listener: listener.on_prompt(TrialPrompt(number, index, total, result)))
        return result

    def _give_up(self, results: Sequence[PromptResult]) -> str | None:
        """Say why a trial that has prompts left isn't worth them, or None where it is."""
        if len(results) == len(self.prompts):
            return None
        psnr, sparsity = _mean(results, "psnr"), _mean_sparsity(results)
        after = f"after {len(results)} of {len(self.prompts)} prompts"
        if psnr < self.gate.min_psnr - HOPELESS_DB:
            return f"psnr {psnr:.1f} dB {after}, the gate is {self.gate.min_psnr:g} dB"
        if sparsity < BEATEN * self.best_sparsity:
            return f"sparsity {sparsity:.3f} {after}, the best has {self.best_sparsity:.3f}"
        return None

    def _outcome(
        self,
        number: int,
        params: Mapping[str, Parameter],
        policy: Policy,
        results: Sequence[PromptResult],
        state: TrialState,
        reason: str | None,
        seconds: float,
    ) -> TrialResult:
        measured = bool(results)
        missing = shortfalls(results, self.gate) if measured else {}
        return TrialResult(
            number=number,
            params=dict(params),
            state=state,
            reason=reason,
            policy=policy,
            prompts=tuple(results),
            sparsity=_mean_sparsity(results) if measured else None,
            psnr=_mean(results, "psnr") if measured else None,
            psnr_worst=min(result.metrics["psnr"] for result in results) if measured else None,
            frame_cosine=_mean(results, "frame_cosine") if measured else None,
            feasible=state == "complete" and all(shortfall <= 0 for shortfall in missing.values()),
            seconds=seconds,
            shortfalls=missing,
        )


def shortfalls(results: Sequence[PromptResult], gate: Gate) -> dict[str, float]:
    """Say by how much results miss each bound of the gate; at most 0 where a bound is met.

    Strict bounds (`above`) become ≤ constraints: a metric exactly at its bound is taken as met.
    """
    if not results:
        return {"psnr": math.inf, "frame_cosine": math.inf}
    missing = {
        "psnr": gate.min_psnr - _mean(results, "psnr"),
        "frame_cosine": gate.min_frame_cosine - _mean(results, "frame_cosine"),
    }
    if gate.min_psnr_worst is not None:
        missing["psnr_worst"] = gate.min_psnr_worst - min(result.metrics["psnr"] for result in results)
    if gate.min_psnr_frame is not None:
        missing["psnr_frame"] = gate.min_psnr_frame - min(result.metrics["psnr_frame_min"] for result in results)
    return missing


def _record(trial: optuna.Trial, outcome: TrialResult) -> None:
    """Keep what a later run of the study needs to know of a trial."""
    for name in ("sparsity", "psnr", "psnr_worst", "frame_cosine", "seconds"):
        trial.set_user_attr(name, getattr(outcome, name))
    trial.set_user_attr("params", dict(outcome.params))
    trial.set_user_attr("state", outcome.state)
    trial.set_user_attr("reason", outcome.reason)
    trial.set_user_attr("feasible", outcome.feasible)
    trial.set_user_attr("shortfalls", dict(outcome.shortfalls))
    if outcome.sparsity is not None:
        for name, missing in outcome.shortfalls.items():
            trial.set_constraint(name, missing)
        trial.report(outcome.sparsity, len(outcome.prompts) - 1)


def _mean(results: Sequence[PromptResult], metric: str) -> float:
    return sum(result.metrics[metric] for result in results) / len(results)


def _mean_sparsity(results: Sequence[PromptResult]) -> float:
    return sum(result.sparsity or 0.0 for result in results) / len(results)
