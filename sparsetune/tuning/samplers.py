"""Optuna's samplers, set up for searches of some dozens of trials."""

import warnings
from collections.abc import Callable

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler

from sparsetune.errors import TuningError


def _tpe(seed: int, num_startup: int) -> BaseSampler:
    # Groups: trials of a budget and those of a reach have some parameters of their own, and share the others. The
    # constant liar: trials that run count as bad ones, so that workers and processes don't all try the same place.
    return optuna.samplers.TPESampler(
        seed=seed, multivariate=True, group=True, n_startup_trials=num_startup, constant_liar=True
    )


def _gp(seed: int, num_startup: int) -> BaseSampler:
    return optuna.samplers.GPSampler(seed=seed, n_startup_trials=num_startup, warn_independent_sampling=False)


def _nsga2(seed: int, num_startup: int) -> BaseSampler:
    # The default population of 50 is more trials than most searches have.
    return optuna.samplers.NSGAIISampler(seed=seed, population_size=max(4, num_startup))


def _cmaes(seed: int, num_startup: int) -> BaseSampler:
    return optuna.samplers.CmaEsSampler(seed=seed, n_startup_trials=num_startup, warn_independent_sampling=False)


def _random(seed: int, num_startup: int) -> BaseSampler:
    return optuna.samplers.RandomSampler(seed=seed)


SAMPLERS: dict[str, Callable[[int, int], BaseSampler]] = {
    "tpe": _tpe, "gp": _gp, "nsga2": _nsga2, "cmaes": _cmaes, "random": _random
}  # fmt: skip
"""Makes a sampler of a seed and a number of trials to sample at random first."""


def make_sampler(name: str, seed: int, n_trials: int, goal: str) -> BaseSampler:
    """Make a sampler.

    Args:
        name: one of `SAMPLERS`.
        seed: of its random numbers.
        n_trials: trials the study will have; a short one samples at random for fewer of them.
        goal: what trials compete in; `pareto` is two objectives.

    Raises:
        TuningError: the sampler is unknown, or can't do two objectives.
    """
    if name not in SAMPLERS:
        raise TuningError(f"the sampler must be one of {', '.join(SAMPLERS)}, but is {name!r}")
    if name == "cmaes" and goal == "pareto":
        raise TuningError("sampler cmaes must have one objective, but --objective pareto has two; use tpe, gp or nsga2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # multivariate TPE, its constant liar, GP: pinned
        return SAMPLERS[name](seed, max(4, min(10, n_trials // 4)))
