"""What a trial is worth to Optuna: its parameters asked for, its policy begun, its value and constraints told."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from sparsetune.config.models import Goal
from sparsetune.evaluation.prompt import PromptResult
from sparsetune.tuning.events import TrialResult
from sparsetune.tuning.search.ranking import values
from sparsetune.tuning.search.runner import TrialRunner, mean, mean_sparsity
from sparsetune.tuning.search.shared import OUTCOME, PARAMS, LostTrialError
from sparsetune.tuning.search.space import SearchSpace

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
    """

    runner: TrialRunner
    space: SearchSpace
    goal: Goal = "sparsity"
    penalised: bool = False
    aimed: bool = False

    def prepare(self, trial: optuna.Trial) -> None:
        """Ask for a trial's parameters, and let other processes see what is tried."""
        trial.set_user_attr(PARAMS, self.space.suggest(trial, best_sparsity(trial.study) if self.aimed else 0.0))

    def begin(self, trial: optuna.Trial) -> None:
        """Begin a trial that was prepared."""
        params = trial.user_attrs[PARAMS]

        def give_up(results: Sequence[PromptResult]) -> str | None:
            try:
                return self._give_up(trial, results) or self._beaten(trial, results)
            except UpdateFinishedTrialError:
                return "another process tries it again"  # which `end` will find

        self.runner.begin(trial.number, params, self.space.policy(params), give_up)

    def end(self, trial: optuna.Trial, outcome: TrialResult) -> float | tuple[float, float] | TrialState:
        """Keep a trial's outcome; gives its value, or how else it ended.

        Raises:
            LostTrialError: another process took the trial over.
        """
        try:
            if outcome.sparsity is not None and not self.penalised:  # CMA-ES warns of constraints that it won't use
                for name, missing in outcome.shortfalls.items():
                    trial.set_constraint(name, missing)
            _record(trial, outcome)
        except UpdateFinishedTrialError as error:
            raise LostTrialError from error
        if outcome.state == "complete":
            return values(self.goal, outcome, self.penalised)
        return TrialState.PRUNED if outcome.state == "pruned" else TrialState.FAIL

    def _give_up(self, trial: optuna.Trial, results: Sequence[PromptResult]) -> str | None:
        """Say why a trial that has prompts left isn't worth them, or None where it is."""
        if len(results) == len(self.runner.prompts):
            return None
        psnr, sparsity = mean(results, "psnr"), mean_sparsity(results)
        after = f"after {len(results)} of {len(self.runner.prompts)} prompts"
        if psnr < self.runner.gate.min_psnr - HOPELESS_DB:
            return f"psnr {psnr:.1f} dB {after}, the gate is {self.runner.gate.min_psnr:g} dB"
        best = best_sparsity(trial.study) if self.goal == "sparsity" else 0.0
        return f"sparsity {sparsity:.3f} {after}, the best has {best:.3f}" if sparsity < BEATEN * best else None

    def _beaten(self, trial: optuna.Trial, results: Sequence[PromptResult]) -> str | None:
        """Say that a trial is worse than the best one on the same prompts, where Wilcoxon's test finds it so."""
        if self.goal == "pareto":  # no one trial is the best
            return None
        last = results[-1]
        figure = last.sparsity if self.goal == "sparsity" else last.seconds_sparse
        trial.report(figure or 0.0, len(results) - 1)
        # Of one prompt the test can't tell anything, and asking costs queries.
        if len(results) in (1, len(self.runner.prompts)) or not trial.should_prune():
            return None
        return f"worse than the best trial on the first {len(results)} prompts (Wilcoxon's test)"


def best_sparsity(study: optuna.Study) -> float:
    """Give the sparsity of the sparsest trial that met the gate, whichever process ran it; 0 where none did."""
    outcomes = [trial.user_attrs.get(OUTCOME, {}) for trial in study.get_trials(deepcopy=False)]
    return max((outcome["sparsity"] or 0.0 for outcome in outcomes if outcome.get("feasible")), default=0.0)


def _record(trial: optuna.Trial, outcome: TrialResult) -> None:
    kept = {name: getattr(outcome, name) for name in _KEPT}
    trial.set_user_attr(
        OUTCOME, {name: dict(value) if isinstance(value, Mapping) else value for name, value in kept.items()}
    )
