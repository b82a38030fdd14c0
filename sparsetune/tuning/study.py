"""The Optuna study: where trials are kept, how it is resumed, and what it found."""

import contextlib
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from sparsetune.config.models import Goal
from sparsetune.errors import TuningError
from sparsetune.metrics import Gate
from sparsetune.tuning.asktell import AskTell
from sparsetune.tuning.bench import digest
from sparsetune.tuning.bisect import NUM_TRIALS, Tried, next_budget
from sparsetune.tuning.events import TrialResult
from sparsetune.tuning.goal import directions, largest_shortfall
from sparsetune.tuning.objective import OUTCOME, OWNER, Objective
from sparsetune.tuning.runner import TimeIsUp
from sparsetune.tuning.samplers import make_sampler
from sparsetune.tuning.space import AIM, BUDGETS, CALIBRATED, REACHES, THRESHOLDS, SearchSpace

_HEARTBEAT_SECONDS = 10
_GRACE_SECONDS = 60
_SIGNATURE = "sparsetune"
_LEADS, _BEYOND = "leads", "beyond"
_SAME_FAILURES = 3
_JOURNAL = "journal:"

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
    num_workers: int = 1,
) -> optuna.Study:
    """Create a study, or open the one of that name to go on with it.

    A trial whose process died is put in the queue again: at once where it ran on this host, and where it ran on
    another after a minute without a heartbeat.

    Args:
        storage_url: any SQL database's URL, e.g. `sqlite:///mlruns/optuna.db`, or `journal:PATH` of a journal file.
        name: the study's name.
        signature: what its trials share, as JSON values.
        seed: of the sampler; trials that were done already move it on.
        n_trials: trials the study will have; a short one samples at random for fewer of them.
        sampler: one of `samplers.SAMPLERS`.
        goal: what trials compete in.
        num_workers: trials that run at a time.

    Raises:
        TuningError: the storage can't be opened, the sampler is unknown, or the study of that name has another
            signature.
    """
    storage = _open_storage(storage_url)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # the pruner for paired instances, pinned
        pruner = optuna.pruners.WilcoxonPruner(p_threshold=_P_WORSE)
    study = optuna.create_study(
        storage=storage, study_name=name, directions=directions(goal), pruner=pruner, load_if_exists=True
    )
    given = json.loads(json.dumps(signature))
    known = study.user_attrs.get(_SIGNATURE)
    if known is None:
        study.set_user_attr(_SIGNATURE, given)
    elif known != given:
        differing = sorted(key for key in known | given if known.get(key) != given.get(key))
        listed = "; ".join(f"{key} was {known.get(key)} and is {given.get(key)}" for key in differing)
        raise TuningError(
            f"a study that is resumed must have the settings it began with, but {name} differs in {listed}; "
            "give another --study-name to begin a new one"
        )
    _requeue_dead(study)
    study.sampler = make_sampler(sampler, seed + len(study.get_trials(deepcopy=False)), n_trials, goal, num_workers)
    return study


def search(study: optuna.Study, objective: Objective, n_trials: int, seconds: float | None) -> None:
    """Run trials until the study has `n_trials`, or `seconds` are over; as many at a time as the engine has workers.

    When time is up, the trials in hand end after the prompts in hand, and a later run tries them again. Trials that
    failed for want of memory or gave NaN are kept as failed, and the search goes on.

    Raises:
        TuningError: three trials in a row failed for the same reason.
        EngineError: no worker is left.
        KeyboardInterrupt: Ctrl-C; what is done is kept, and the trials that ran are put in the queue again.
    """
    space, runner = objective.space, objective.runner
    if not study.get_trials(deepcopy=False):
        for start in space.warm_start():
            study.enqueue_trial(start.params, user_attrs={THRESHOLDS: start.thresholds})
    objective.best_sparsity = max((result.sparsity or 0.0 for result in feasible(study, space)), default=0.0)
    left = n_trials - num_done(study)
    runner.deadline = None if seconds is None else time.perf_counter() + seconds
    with AskTell(study, objective) as under_way:
        try:
            while True:
                while left > 0 and len(under_way) < runner.engine.num_workers and not runner.is_over:
                    under_way.ask()
                    left -= 1
                if not len(under_way):
                    return
                under_way.tell_next()
                _check_failures(list(runner.results.values()))
                if not isinstance(study.sampler, optuna.samplers.RandomSampler):  # who asks for those gets them
                    _enqueue_lead(study, objective)
        except BaseException as cut_off:
            for trial in under_way.cut_off():
                _enqueue_again(study, trial)
            if not isinstance(cut_off, TimeIsUp):
                raise


def _check_failures(results: Sequence[TrialResult]) -> None:
    """Check that the last trials to end didn't all fail for one reason."""
    last = results[-_SAME_FAILURES:]
    failed_alike = {trial.state for trial in last} == {"failed"} and len({trial.reason for trial in last}) == 1
    if len(last) == _SAME_FAILURES and failed_alike:
        raise TuningError(f"trials must not all fail, but the last {len(last)} failed alike: {last[0].reason}")


def _enqueue_lead(study: optuna.Study, objective: Objective) -> None:
    """Enqueue what is known to be worth a trial before the sampler is asked, where nothing else waits.

    First the budgets that lead to the gate, then what lies just beyond the best. Budgets one at a time, since the next
    depends on how the last one fared; other workers meanwhile get what the sampler asks.
    """
    space, trials = objective.space, study.get_trials(deepcopy=False)
    if any(trial.state == TrialState.WAITING for trial in trials):
        return
    running = [trial for trial in trials if trial.state == TrialState.RUNNING]
    if any(_LEADS in trial.user_attrs for trial in running):
        return
    if sum(_LEADS in trial.user_attrs for trial in trials) < NUM_TRIALS:
        budget = next_budget(_tried(trials, space, objective.runner.gate), *BUDGETS)
        if budget is not None and any(trial.params.get("l1") == budget for trial in running):
            return
        if budget is not None:
            study.enqueue_trial(space.at(budget).params, user_attrs={THRESHOLDS: CALIBRATED, _LEADS: True})
            return
    num_beyond = sum(_BEYOND in trial.user_attrs for trial in trials)
    if objective.aimed and objective.best_sparsity and space.kind == "budget" and num_beyond < len(REACHES):
        marks = {THRESHOLDS: CALIBRATED, AIM: objective.best_sparsity, _BEYOND: True}
        study.enqueue_trial(space.beyond(REACHES[num_beyond]).params, user_attrs=marks)


def _tried(trials: Sequence[FrozenTrial], space: SearchSpace, gate: Gate) -> list[Tried]:
    """The budgets that were tried for all layers, with what their videos came to."""
    tried = []
    for trial in trials:
        outcome = trial.user_attrs.get(OUTCOME, {})
        budget, psnr = space.is_at(outcome.get("params", {})), outcome.get("psnr")
        # One that was given up because another is sparser says nothing about the gate.
        if budget is not None and psnr is not None and (trial.state == TrialState.COMPLETE or psnr < gate.min_psnr):
            tried.append(Tried(budget, -largest_shortfall(outcome["shortfalls"])))
    return tried


def num_done(study: optuna.Study) -> int:
    """Count the trials that ended with an outcome, failed ones included; one that was cut off has none."""
    return sum(OUTCOME in trial.user_attrs for trial in study.get_trials(deepcopy=False))


def _requeue_dead(study: optuna.Study) -> None:
    """Fail the trials that processes of this host left behind when they died, and put them in the queue again."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        host, process = trial.user_attrs.get(OWNER, (None, None))
        if host == socket.gethostname() and not _is_alive(int(process)):
            study.tell(trial.number, state=TrialState.FAIL)
            _enqueue_again(study, trial)


def _enqueue_again(study: optuna.Study, trial: FrozenTrial) -> None:
    if OUTCOME in trial.user_attrs:
        return
    asked = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    aim = {AIM: trial.user_attrs[AIM]} if AIM in trial.user_attrs else {}
    study.enqueue_trial(asked, user_attrs={THRESHOLDS: trial.user_attrs.get(THRESHOLDS, CALIBRATED)} | aim)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def results(study: optuna.Study, objective: Objective) -> tuple[TrialResult, ...]:
    """Give all trials that ended, in order; those of this run with every prompt's result."""
    ended = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    trials = study.get_trials(deepcopy=False, states=ended)
    return tuple(
        objective.runner.results.get(trial.number) or _recalled(trial, objective.space)
        for trial in trials
        if trial.number in objective.runner.results or OUTCOME in trial.user_attrs
    )


def feasible(study: optuna.Study, space: SearchSpace) -> tuple[TrialResult, ...]:
    """Give the complete trials that met the gate."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return tuple(_recalled(trial, space) for trial in trials if trial.user_attrs[OUTCOME]["feasible"])


def _recalled(trial: FrozenTrial, space: SearchSpace) -> TrialResult:
    known = trial.user_attrs[OUTCOME]
    return TrialResult(number=trial.number, policy=space.policy(known["params"]), prompts=(), **known)


def _open_storage(url: str) -> BaseStorage:
    if not url.startswith(_JOURNAL) and "://" not in url:
        raise TuningError(
            f"the study's storage must be a database's URL or journal:PATH, but is {url}; give e.g. sqlite:///optuna.db"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # journals, and heartbeats, which are pinned
            if url.startswith(_JOURNAL):
                path = Path(url.removeprefix(_JOURNAL).removeprefix("//"))
                path.parent.mkdir(parents=True, exist_ok=True)
                return JournalStorage(JournalFileBackend(str(path)))
            return RDBStorage(
                url,
                heartbeat_interval=_HEARTBEAT_SECONDS,
                grace_period=_GRACE_SECONDS,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=2),
            )
    except (SQLAlchemyError, StorageInternalError, ImportError, ValueError, OSError) as error:
        cause = " ".join(str(error).split())[:200]
        raise TuningError(f"the study's storage must be a database that opens, but {url} doesn't: {cause}") from error
