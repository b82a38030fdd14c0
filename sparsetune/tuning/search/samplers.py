"""Optuna samplers with a seed for each trial."""

from collections.abc import Callable, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from sparsetune.config.models import Goal
from sparsetune.errors import TuningError

SAMPLERS: dict[str, Callable[[int, int], BaseSampler]] = {
    # Groups: trials with `l1` and those with `reach` have some parameters of their own, and share the others. Without
    # constant_liar: it would read all running trials for each group, and a seed per trial keeps workers apart.
    "tpe": lambda seed, num_startup: optuna.samplers.TPESampler(
        seed=seed, multivariate=True, group=True, n_startup_trials=num_startup, constant_liar=False
    ),
    "gp": lambda seed, num_startup: optuna.samplers.GPSampler(
        seed=seed, n_startup_trials=num_startup, warn_independent_sampling=False
    ),
    # The default population of 50 is more trials than most searches have.
    "nsga2": lambda seed, num_startup: optuna.samplers.NSGAIISampler(seed=seed, population_size=max(4, num_startup)),
    "cmaes": lambda seed, num_startup: optuna.samplers.CmaEsSampler(
        seed=seed, n_startup_trials=num_startup, warn_independent_sampling=False
    ),
    "random": lambda seed, _: optuna.samplers.RandomSampler(seed=seed),
}
"""Called with the seed and the number of random trials to start with."""


def make_sampler(name: str, seed: int, n_trials: int, goal: Goal) -> BaseSampler:
    """Make the sampler of a study of `n_trials`; a short one starts with fewer random trials.

    Raises:
        TuningError: the sampler is unknown, or can't do the two objectives of `pareto`.
    """
    if name not in SAMPLERS:
        raise TuningError(f"--sampler must be one of {', '.join(SAMPLERS)}, got {name!r}")
    if name == "cmaes" and goal == "pareto":
        raise TuningError("sampler cmaes can't do the two objectives of --objective pareto; use tpe, gp or nsga2")
    num_startup = max(4, min(10, n_trials // 4))
    return SamplerPerTrial(lambda number: SAMPLERS[name](seed + number, num_startup))


class SamplerPerTrial(BaseSampler):
    """Samples each trial with a new sampler, made from the trial's number.

    So parameters depend only on that number and the storage, not on the process or its earlier trials.
    """

    def __init__(self, make: Callable[[int], BaseSampler]) -> None:
        self._make = make
        self._samplers: dict[int, BaseSampler] = {}

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._samplers[trial.number] = self._make(trial.number)
        self._samplers[trial.number].before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._samplers[trial.number].infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._samplers[trial.number].sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        sampler = self._samplers[trial.number]
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        sampler = self._samplers.pop(trial.number, None)
        if sampler is not None:  # none for a trial of another process
            sampler.after_trial(study, trial, state, values)
