"""The Optuna study: where trials are kept, how it is resumed, and what it found."""

import contextlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial
from sqlalchemy.exc import SQLAlchemyError

from sparsetune.config.models import Goal
from sparsetune.errors import TuningError
from sparsetune.executor import Executor
from sparsetune.tuning.context import digest
from sparsetune.tuning.events import TrialResult, tell
from sparsetune.tuning.search.asktell import AskTell
from sparsetune.tuning.search.objective import Objective
from sparsetune.tuning.search.ranking import directions
from sparsetune.tuning.search.runner import TimeIsUp
from sparsetune.tuning.search.shared import OUTCOME, SharedStudy
from sparsetune.tuning.search.space import SearchSpace
from sparsetune.tuning.search.turn import JOURNAL, journal_path, turn, unreachable


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


_SIGNATURE = "sparsetune"
_SAME_FAILURES = 3

_SQLITE_SECONDS = 60
"""How long a SQLite database may be busy with others before that is an error."""

_P_WORSE = 0.05
"""Significance at which a trial is given up as worse than the best on the same prompts."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Optuna's own messages off the terminal: listeners tell what happens."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)


def default_name(model: str, signature: Mapping[str, Any]) -> str:
    """Name a study after the model and all that its trials share, so that the same command finds it again."""
    return f"{model}-{digest(signature)[:8]}"


def open_study(
    storage_url: str,
    name: str,
    signature: Mapping[str, Any],
    seed: int,
    n_trials: int,
    sampler: str = "tpe",
    goal: Goal = "sparsity",
) -> SharedStudy:
    """Create a study, or open the one of that name to go on with it; several processes may, at once or one by one.

    Args:
        storage_url: any SQL database's URL, e.g. `sqlite:///mlruns/optuna.db`, or `journal:PATH` of a journal file.
        name: the study's name.
        signature: what its trials share, as JSON values.
        seed: of the sampler; trial 17 is asked for with the 17th seed after it.
        n_trials: trials the study will have; a short one samples at random for fewer of them.
        sampler: one of `samplers.SAMPLERS`.
        goal: what trials compete in.

    Raises:
        TuningError: the storage can't be opened, the sampler is unknown, or the study of that name has another
            signature.
    """
    make_sampler(sampler, seed, n_trials, goal)  # an unknown one is said before anything is made
    storage = _open_storage(storage_url)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # the pruner for paired instances, pinned
        pruner = optuna.pruners.WilcoxonPruner(p_threshold=_P_WORSE)
    with turn(storage_url, name):
        optuna.create_study(storage=storage, study_name=name, directions=directions(goal), load_if_exists=True)
        study = SharedStudy(
            storage_url, name, storage, pruner, lambda number: make_sampler(sampler, seed + number, n_trials, goal)
        )
        _check_signature(study, json.loads(json.dumps(signature)))
        study.revive()
    return study


def _check_signature(study: SharedStudy, given: Mapping[str, Any]) -> None:
    known = study.user_attrs.get(_SIGNATURE)
    if known is None:
        study.set_user_attr(_SIGNATURE, given)
    elif known != given:
        differing = sorted(key for key in known | given if known.get(key) != given.get(key))
        listed = "; ".join(f"{key} was {known.get(key)} and is {given.get(key)}" for key in differing)
        raise TuningError(
            f"a study that is resumed must have the settings it began with, but {study.study_name} differs in "
            f"{listed}; give another --study-name to begin a new one"
        )


def search(study: SharedStudy, objective: Objective, n_trials: int, seconds: float | None) -> None:
    """Run trials until the study has `n_trials`, or `seconds` are over; as many at a time as the engine has workers.

    Other processes may do the same: trials are shared out, and one that has none left waits until those of the others
    are done, since it will have to try them again should the others die. When time is up, the trials in hand end after
    the prompts in hand, and are put in the queue again. Trials that failed for want of memory or gave NaN are kept as
    failed, and the search goes on; a worker on which three in a row fail for one reason is left out, where there are
    others.

    Raises:
        TuningError: three trials in a row failed for the same reason, on as many workers or on all that there are.
        ExecutorError: no worker is left.
        KeyboardInterrupt: Ctrl-C; what is done is kept, and the trials that ran are put in the queue again.
    """
    runner = objective.runner
    runner.deadline = None if seconds is None else time.perf_counter() + seconds
    waited_for = 0
    with AskTell(study, objective, n_trials) as under_way:
        try:
            while True:
                while len(under_way) < runner.engine.num_workers and not runner.is_over and under_way.ask():
                    pass
                if len(under_way):
                    under_way.tell_next()
                    _check_failures(runner.engine, list(runner.results.values()))
                elif runner.is_over or study.num_done() >= n_trials:
                    return
                else:
                    waited_for = _wait(study, objective, waited_for)
        except BaseException as cut_off:
            under_way.cut_off()
            if not isinstance(cut_off, TimeIsUp):
                raise


def _wait(study: SharedStudy, objective: Objective, waited_for: int) -> int:
    """Wait a moment for other processes, and tell of it where their trials weren't as many before."""
    running = study.num_running()
    if running != waited_for:
        what = "1 trial" if running == 1 else f"{running} trials"
        tell(objective.runner.listeners, lambda listener: listener.on_wait(what))
    study.wait()
    return running


def _check_failures(engine: Executor, results: Sequence[TrialResult]) -> None:
    """Check that the last trials to end didn't all fail for one reason; where it may be one worker's, leave that out.

    Raises:
        TuningError: they did, on different workers.
    """
    if not results or results[-1].state != "failed":
        return
    last, sick = results[-_SAME_FAILURES:], results[-1].worker
    workers = {trial.worker for trial in last}
    if _failed_alike(last) and len(workers) >= min(_SAME_FAILURES, engine.num_workers):
        raise TuningError(f"trials must not all fail, but the last {len(last)} failed alike: {last[0].reason}")
    theirs = [trial for trial in results if trial.worker == sick][-_SAME_FAILURES:]
    elsewhere = {trial.reason for trial in [each for each in results if each.worker != sick][-_SAME_FAILURES:]}
    if sick is not None and engine.num_workers > 1 and _failed_alike(theirs) and theirs[0].reason not in elsewhere:
        engine.leave_out(sick, f"the last {len(theirs)} trials on it failed alike: {theirs[0].reason}")


def _failed_alike(trials: Sequence[TrialResult]) -> bool:
    alike = {trial.state for trial in trials} == {"failed"} and len({trial.reason for trial in trials}) == 1
    return alike and len(trials) == _SAME_FAILURES


def results(study: SharedStudy, objective: Objective) -> tuple[TrialResult, ...]:
    """Give all trials that have an outcome, in order; those of this run with every prompt's result."""
    return tuple(
        objective.runner.results.get(trial.number) or _recalled(trial, objective.space)
        for trial in study.get_trials(deepcopy=False)
        if trial.number in objective.runner.results or OUTCOME in trial.user_attrs
    )


def has_feasible(study: SharedStudy) -> bool:
    """Say whether any trial met the gate."""
    return any(trial.user_attrs.get(OUTCOME, {}).get("feasible") for trial in study.get_trials(deepcopy=False))


def _recalled(trial: FrozenTrial, space: SearchSpace) -> TrialResult:
    known = trial.user_attrs[OUTCOME]
    return TrialResult(number=trial.number, policy=space.policy(known["params"]), prompts=(), **known)


def _open_storage(url: str) -> BaseStorage:
    if not url.startswith(JOURNAL) and "://" not in url:
        raise TuningError(
            f"the study's storage must be a database's URL or journal:PATH, but is {url}; give e.g. sqlite:///optuna.db"
        )
    try:
        # In a turn, since tables are made: of processes that begin at once, all but one would fail.
        with turn(url, "tables"), warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # journals, pinned
            path = journal_path(url)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                return JournalStorage(JournalFileBackend(str(path)))
            if url.startswith("sqlite"):
                return RDBStorage(url, engine_kwargs={"connect_args": {"timeout": _SQLITE_SECONDS}})
            # A connection may have been cut off while a trial ran for an hour.
            return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
    except (SQLAlchemyError, StorageInternalError, ImportError, ValueError, OSError) as error:
        raise unreachable(url, error) from error
