"""What a trial is worth to Optuna: its parameters asked for, its policy run, its value and constraints told."""

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import optuna

from sparsetune.config.models import Goal
from sparsetune.errors import GenerationError
from sparsetune.evaluation.pair import PromptResult
from sparsetune.tuning.events import TrialResult, tell
from sparsetune.tuning.goal import values
from sparsetune.tuning.runner import TrialRunner, mean, mean_sparsity
from sparsetune.tuning.space import SearchSpace

OWNER = "owner"
"""User attribute of a trial: the host and process that runs it, so that a process that died is recognised."""

KEPT = (
    "params", "state", "reason", "sparsity", "psnr", "psnr_worst", "frame_cosine", "feasible", "seconds", "shortfalls",
    "seconds_sparse", "predicted_error",
)  # fmt: skip
"""What the storage keeps of a `TrialResult`, by the names of its fields."""

HOPELESS_DB = 6.0
"""A trial whose mean PSNR over the prompts so far misses the gate by more than this is given up."""

BEATEN = 0.95
"""A trial whose sparsity so far is under this fraction of the best feasible trial's is given up: it can't win, since
sparsity hardly differs from prompt to prompt."""


@dataclass
class Objective:
    """Runs the trials that Optuna asks for.

    Args:
        runner: renders and judges them.
        space: what a trial's parameters mean.
        goal: what trials that meet the gate compete in.
        penalised: whether the sampler knows no constraints, see `goal.values`.
        aimed: whether the sampler looks around the best that met the gate, rather than over the whole range.
        best_sparsity: of the trials that met the gate so far.
    """

    runner: TrialRunner
    space: SearchSpace
    goal: Goal = "sparsity"
    penalised: bool = False
    aimed: bool = False
    best_sparsity: float = 0.0

    def __call__(self, trial: optuna.Trial) -> float | tuple[float, float]:
        """Run a trial and give its value.

        Raises:
            optuna.TrialPruned: it was given up.
            GenerationError: a rendering failed; Optuna marks the trial failed.
            TimeIsUp: the deadline passed before all prompts were rendered; the trial has no outcome.
        """
        trial.set_user_attr(OWNER, [socket.gethostname(), os.getpid()])
        params = self.space.suggest(trial, self.best_sparsity if self.aimed else 0.0)

        def give_up(results: Sequence[PromptResult]) -> str | None:
            return self._give_up(results) or self._beaten(trial, results)

        outcome = self.runner.run(trial.number, params, self.space.policy(params), give_up)
        if outcome.feasible and outcome.sparsity is not None:
            self.best_sparsity = max(self.best_sparsity, outcome.sparsity)
        _record(trial, outcome)
        if outcome.sparsity is not None and not self.penalised:  # CMA-ES warns of constraints that it won't use
            for name, missing in outcome.shortfalls.items():
                trial.set_constraint(name, missing)
        tell(self.runner.listeners, lambda listener: listener.on_trial(outcome))
        if outcome.state == "pruned":
            raise optuna.TrialPruned(outcome.reason)
        if outcome.state == "failed" or outcome.sparsity is None:
            raise GenerationError(outcome.reason or "the trial rendered nothing")
        return values(self.goal, outcome, self.penalised)

    def _give_up(self, results: Sequence[PromptResult]) -> str | None:
        """Say why a trial that has prompts left isn't worth them, or None where it is."""
        if len(results) == len(self.runner.prompts):
            return None
        psnr, sparsity = mean(results, "psnr"), mean_sparsity(results)
        after = f"after {len(results)} of {len(self.runner.prompts)} prompts"
        if psnr < self.runner.gate.min_psnr - HOPELESS_DB:
            return f"psnr {psnr:.1f} dB {after}, the gate is {self.runner.gate.min_psnr:g} dB"
        if self.goal == "sparsity" and sparsity < BEATEN * self.best_sparsity:
            return f"sparsity {sparsity:.3f} {after}, the best has {self.best_sparsity:.3f}"
        return None

    def _beaten(self, trial: optuna.Trial, results: Sequence[PromptResult]) -> str | None:
        """Say that a trial is worse than the best one on the same prompts, where Wilcoxon's test finds it so."""
        if self.goal == "pareto":  # no one trial is the best
            return None
        last = results[-1]
        figure = last.sparsity if self.goal == "sparsity" else last.seconds_sparse
        trial.report(figure or 0.0, len(results) - 1)
        if len(results) == len(self.runner.prompts) or not trial.should_prune():
            return None
        return f"worse than the best trial on the first {len(results)} prompts (Wilcoxon's test)"


def _record(trial: optuna.Trial, outcome: TrialResult) -> None:
    """Keep what a later run of the study needs to know of a trial."""
    for name in KEPT:
        value = getattr(outcome, name)
        trial.set_user_attr(name, dict(value) if isinstance(value, Mapping) else value)
