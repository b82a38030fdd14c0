"""What a trial is worth to Optuna: its parameters asked for, its policy begun, its value and constraints told."""

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import optuna
from optuna.trial import TrialState

from sparsetune.config.models import Goal
from sparsetune.evaluation.pair import PromptResult
from sparsetune.tuning.events import TrialResult, tell
from sparsetune.tuning.goal import values
from sparsetune.tuning.runner import TrialRunner, mean, mean_sparsity
from sparsetune.tuning.space import SearchSpace

OWNER = "owner"
"""User attribute of a trial: the host and process that runs it, so that a process that died is recognised."""

OUTCOME = "outcome"
"""User attribute of a trial that ended: what a later run of the study needs to know of its `TrialResult`. It is one,
since each is a transaction of the database."""

_KEPT = (
    "params", "state", "reason", "sparsity", "psnr", "psnr_worst", "frame_cosine", "feasible", "seconds", "shortfalls",
    "seconds_sparse", "predicted_error",
)  # fmt: skip

HOPELESS_DB = 6.0
"""A trial whose mean PSNR over the prompts so far misses the gate by more than this is given up."""

BEATEN = 0.95
"""A trial whose sparsity so far is under this fraction of the best feasible trial's is given up: it can't win, since
sparsity hardly differs from prompt to prompt."""


@dataclass
class Objective:
    """Begins the trials that Optuna asks for, and says what they came to.

    Args:
        runner: has them rendered and judges them.
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

    def begin(self, trial: optuna.Trial) -> None:
        """Ask for a trial's parameters and begin it."""
        trial.set_user_attr(OWNER, [socket.gethostname(), os.getpid()])
        params = self.space.suggest(trial, self.best_sparsity if self.aimed else 0.0)

        def give_up(results: Sequence[PromptResult]) -> str | None:
            return self._give_up(results) or self._beaten(trial, results)

        self.runner.begin(trial.number, params, self.space.policy(params), give_up)

    def end(self, trial: optuna.Trial, outcome: TrialResult) -> float | tuple[float, float] | TrialState:
        """Keep a trial's outcome and tell the listeners; gives its value, or how else it ended."""
        if outcome.feasible and outcome.sparsity is not None:
            self.best_sparsity = max(self.best_sparsity, outcome.sparsity)
        _record(trial, outcome)
        if outcome.sparsity is not None and not self.penalised:  # CMA-ES warns of constraints that it won't use
            for name, missing in outcome.shortfalls.items():
                trial.set_constraint(name, missing)
        tell(self.runner.listeners, lambda listener: listener.on_trial(outcome))
        if outcome.state == "complete":
            return values(self.goal, outcome, self.penalised)
        return TrialState.PRUNED if outcome.state == "pruned" else TrialState.FAIL

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
    kept = {name: getattr(outcome, name) for name in _KEPT}
    trial.set_user_attr(
        OUTCOME, {name: dict(value) if isinstance(value, Mapping) else value for name, value in kept.items()}
    )
