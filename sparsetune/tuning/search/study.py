"""The Optuna study, which several processes may share: its storage, sampler, pruner and lock."""

import contextlib
import copy
import functools
import hashlib
import json
import logging
import math
import os
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from sparsetune.attention.policy import Policy
from sparsetune.config.models import Goal
from sparsetune.errors import TuningError
from sparsetune.locks import exclusive, exclusive_if_free
from sparsetune.tuning.events import StudyState, TrialResult
from sparsetune.tuning.search.ranking import directions
from sparsetune.tuning.search.samplers import make_sampler
from sparsetune.urls import sqlite_path, without_credentials

logger = logging.getLogger(__name__)

OUTCOME = "outcome"
"""User attribute of a trial: what a later run of the study needs of its `TrialResult`. An interrupted trial has none,
and is enqueued again."""

PROCESS = "process"
"""User attribute of a trial: its process, as id and random token."""

HEARTBEAT_SECONDS, GRACE_SECONDS = 10, 60

_SIGNATURE = "sparsetune"
_JOURNAL = "journal:"
_SQLITE_TIMEOUT_SECONDS = 60
_LOCK_TIMEOUT_SECONDS = 300
"""A process that is suspended while it holds PostgreSQL's lock loses it after this time."""

_P_WORSE = 0.05
"""Significance at which a trial is pruned as worse than the best one on the same prompts."""


class NoTrialLeft(Exception):
    """All trials of the study have an outcome, or run in this or other processes."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Optuna's own messages and its warnings that multivariate TPE, heartbeats and journals are experimental.

    For a whole search: Optuna ignores those warnings itself where it has to, but not safely with several threads.
    """
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)


def open_study(
    storage_url: str,
    name: str,
    signature: Mapping[str, Any],
    seed: int,
    n_trials: int,
    sampler: str = "tpe",
    goal: Goal = "sparsity",
) -> "SharedStudy":
    """Create a study, or load the one of that name to resume it.

    The storage is an SQL database's URL, e.g. `sqlite:///mlruns/optuna.db`, or `journal:PATH` of a journal file. The
    signature holds all settings that its trials must share, as JSON values.

    Raises:
        TuningError: the storage can't be opened, the sampler is unknown, or the study of that name has another
            signature.
    """
    per_trial = make_sampler(sampler, seed, n_trials, goal)
    storage = _open_storage(storage_url)
    pruner = optuna.pruners.WilcoxonPruner(p_threshold=_P_WORSE)
    with study_lock(storage_url, name):
        optuna.create_study(storage=storage, study_name=name, directions=directions(goal), load_if_exists=True)
        study = SharedStudy(storage_url, name, storage, per_trial, pruner, n_trials)
        _check_signature(study, json.loads(json.dumps(signature)))
    return study


def _check_signature(study: optuna.Study, given: Mapping[str, Any]) -> None:
    known = study.user_attrs.get(_SIGNATURE)
    if known is None:
        study.set_user_attr(_SIGNATURE, given)
    elif known != given:
        differing = sorted(key for key in known | given if known.get(key) != given.get(key))
        listed = "; ".join(f"{key} was {known.get(key)} and is {given.get(key)}" for key in differing)
        raise TuningError(
            f"study {study.study_name} cannot be resumed with other settings: {listed}; "
            "give another --study-name to begin a new one"
        )


class SharedStudy(optuna.Study, StudyState):
    """A study whose `n_trials` trials several processes share; each trial is run by one of them.

    An interrupted trial fails without an outcome; the next process that checks enqueues it again. Dead processes are
    detected by their heartbeat, and where the storage is a file at once, by a lock file that they held.
    """

    def __init__(
        self, url: str, name: str, storage: BaseStorage, sampler: BaseSampler, pruner: BasePruner, n_trials: int
    ) -> None:
        super().__init__(study_name=name, storage=storage, sampler=sampler, pruner=pruner)
        self.n_trials = n_trials
        self.enqueue_next: Callable[[list[FrozenTrial]], None] = lambda trials: None
        """Called with all trials under the lock before `ask`; may enqueue further ones."""
        self.suggest: Callable[[optuna.Trial], object] = lambda trial: None
        """Called with a new trial under the lock: other processes must not see it without its parameters."""
        self.best_sparsity = 0.0
        """Of the feasible trials of all processes, at the last `ask`."""
        self._url = url
        self._process = f"{os.getpid()}-{uuid.uuid4().hex}"
        self._is_running = False
        self._database = storage if isinstance(storage, _Database) else None
        self._asking = threading.Lock()

    def ask(self, fixed_distributions: dict[str, BaseDistribution] | None = None) -> optuna.Trial:
        """Return the next trial, an enqueued one first.

        Raises:
            NoTrialLeft: those that ended and those that run are enough.
        """
        with self._asking, study_lock(self._url, self.study_name):
            trials = self._requeue()
            if sum(count(trials)) >= self.n_trials:
                raise NoTrialLeft
            self.best_sparsity = best_sparsity(trials)
            self.enqueue_next(trials)
            trial = super().ask(fixed_distributions)
            if self._database is not None:  # a trial that has no heartbeat at all is never taken for stale
                study_id = self._database.get_study_id_from_name(self.study_name)
                trial_id = self._database.get_trial_id_from_study_id_trial_number(study_id, trial.number)
                self._database.record_heartbeat(trial_id)
            trial.set_user_attr(PROCESS, self._process)
            self.suggest(trial)
            return trial

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Hold this process's lock file while it runs trials; at the end, interrupted trials are enqueued."""
        with contextlib.ExitStack() as held:
            if (path := self._lock_of(self._process)) is not None:
                held.callback(path.unlink, missing_ok=True)
                held.enter_context(exclusive(path, what="this process's trials", setting="tune.storage"))
            self._is_running = True
            try:
                yield
            finally:
                self._is_running = False
                self.requeue()

    def requeue(self) -> list[FrozenTrial]:
        """Fail the trials of dead processes, enqueue interrupted ones again, and return all trials."""
        with self._asking, study_lock(self._url, self.study_name):
            optuna.storages.fail_stale_trials(self)
            return self._requeue()

    def num_done(self) -> int:
        return count(self.get_trials(deepcopy=False))[0]

    def earlier(self) -> tuple[TrialResult, ...]:
        done = [trial for trial in self.get_trials(deepcopy=False) if OUTCOME in trial.user_attrs]
        return tuple(
            TrialResult(
                number=trial.number, policy=Policy.uniform([("unread", 1)]), prompts=(), **trial.user_attrs[OUTCOME]
            )
            for trial in done
        )

    def num_running_elsewhere(self) -> int:
        """Count the trials that other processes run; 0 if the storage can't be read."""
        try:
            running = _running(self.get_trials(deepcopy=False))
        except (StorageInternalError, SQLAlchemyError, OSError):
            return 0
        return sum(not self._is_ours(trial) and not self._is_stale(trial) for trial in running)

    def update_attr(self, key: str, change: Callable[[str | None], str]) -> str:
        with study_lock(self._url, self.study_name):
            known = self.user_attrs.get(key)
            value = change(known)
            if value != known:
                self.set_user_attr(key, value)
            return value

    def _requeue(self) -> list[FrozenTrial]:
        """`requeue` without the check of heartbeats, which `optimize` does itself; called under the lock."""
        trials = self.get_trials(deepcopy=False)
        stale = [trial for trial in trials if trial.state == TrialState.RUNNING and self._is_stale(trial)]
        for trial in stale:
            with contextlib.suppress(ValueError, UpdateFinishedTrialError):  # its heartbeat was missed just now
                self.tell(trial.number, state=TrialState.FAIL)
        trials = self.get_trials(deepcopy=False) if stale else trials
        retry = RetryHeartbeatStaleTrialCallback()
        retried = {number for trial in trials for number in retry.retry_history(trial)}
        interrupted = [trial for trial in trials if trial.state == TrialState.FAIL and OUTCOME not in trial.user_attrs]
        lost = [copy.deepcopy(trial) for trial in interrupted if trial.number not in retried]
        for trial in lost:
            trial.user_attrs.pop(PROCESS, None)
            retry(self, trial)
        return self.get_trials(deepcopy=False) if lost else trials

    def _is_ours(self, trial: FrozenTrial) -> bool:
        return bool(trial.user_attrs.get(PROCESS) == self._process)

    def _is_stale(self, trial: FrozenTrial) -> bool:
        """Whether a trial's process is known to have ended, without checking its heartbeat."""
        if PROCESS not in trial.user_attrs:  # it died while it held the lock
            return True
        if self._is_ours(trial):
            return not self._is_running
        path = self._lock_of(trial.user_attrs[PROCESS])
        if path is None:
            return False
        with exclusive_if_free(path, setting="tune.storage") as is_dead:
            if is_dead:
                path.unlink(missing_ok=True)
            return is_dead

    def _lock_of(self, process: str) -> Path | None:
        path = _file_of(self._url)
        return None if path is None else path.with_name(f"{path.name}.{process}.lock")


class _Database(RDBStorage):
    """A database whose heartbeats go on after an error, such as a restart of the server."""

    def record_heartbeat(self, trial_id: int) -> None:
        try:
            super().record_heartbeat(trial_id)
        except (StorageInternalError, SQLAlchemyError) as error:
            logger.warning("no heartbeat recorded; next try in %d s: %s", HEARTBEAT_SECONDS, error)


def best_sparsity(trials: list[FrozenTrial]) -> float:
    """Return the sparsity of the sparsest feasible trial that isn't slower than dense; 0 where there is none."""
    outcomes = [trial.user_attrs.get(OUTCOME, {}) for trial in trials]
    outcomes = [one for one in outcomes if (one.get("seconds_dense") or math.inf) > (one.get("seconds_sparse") or 0.0)]
    return max((outcome["sparsity"] or 0.0 for outcome in outcomes if outcome.get("feasible")), default=0.0)


def count(trials: list[FrozenTrial]) -> tuple[int, int]:
    """Return the number of trials with an outcome and of running ones."""
    return sum(OUTCOME in trial.user_attrs for trial in trials), len(_running(trials))


def _running(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    return [trial for trial in trials if trial.state == TrialState.RUNNING and OUTCOME not in trial.user_attrs]


def _open_storage(url: str) -> BaseStorage:
    if not url.startswith(_JOURNAL) and "://" not in url:
        raise TuningError(
            f"--storage must be a database's URL, e.g. sqlite:///optuna.db, or journal:PATH of a file, "
            f"got {without_credentials(url)}"
        )
    try:
        with study_lock(url, "tables"):  # processes that create the tables at the same time fail
            path = _file_of(url)
            if path is not None and url.startswith(_JOURNAL):
                path.parent.mkdir(parents=True, exist_ok=True)
                return JournalStorage(JournalFileBackend(str(path)))
            _check_tables(url)
            if url.startswith("sqlite"):  # lock files tell which processes live, also one that was suspended
                return RDBStorage(url, engine_kwargs={"connect_args": {"timeout": _SQLITE_TIMEOUT_SECONDS}})
            # A connection to a server may be cut off while a trial runs for an hour.
            return _Database(
                url,
                engine_kwargs={"pool_pre_ping": True},
                heartbeat_interval=HEARTBEAT_SECONDS,
                grace_period=GRACE_SECONDS,
            )
    except (SQLAlchemyError, StorageInternalError, ImportError, ValueError, OSError) as error:
        raise _unreachable(url, error) from error


def _check_tables(url: str) -> None:
    """Raise TuningError where Optuna would put its tables into MLflow's database, or another that alembic migrates.

    Both tools keep the version of their tables in the table `alembic_version`.
    """
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
    tables = set(sqlalchemy.inspect(engine).get_table_names())
    if "experiments" in tables or ("alembic_version" in tables and "studies" not in tables):
        raise TuningError(
            f"--storage {without_credentials(url)} is another tool's database: it has the tables "
            f"{', '.join(sorted(tables - {'alembic_version'})[:3])} ...; give Optuna one of its own, e.g. "
            "sqlite:///optuna.db"
        )


def _unreachable(url: str, error: BaseException) -> TuningError:
    reason = without_credentials(" ".join(str(error).split()))[:200]
    return TuningError(f"cannot open study storage {without_credentials(url)}: {reason}")


@contextlib.contextmanager
def study_lock(url: str, name: str) -> Iterator[None]:
    """Lock a study against other processes: by a file beside a journal or a SQLite file, or by PostgreSQL.

    For other databases it warns that there is no lock.

    Raises:
        TuningError: the storage can't be reached.
    """
    path, key = _file_of(url), hashlib.sha256(f"sparsetune {name}".encode()).digest()[:8]
    if path is not None:
        lock = path.with_name(f"{path.name}.{key.hex()}.lock")
        with exclusive(lock, what=f"study {name}", setting="tune.storage"):
            yield
    elif url.startswith("postgres"):
        with contextlib.ExitStack() as connected:
            try:
                connection = connected.enter_context(_engine(url).connect())
                # Both end with the transaction, which ends with the connection.
                timeout = f"SET LOCAL idle_in_transaction_session_timeout = '{_LOCK_TIMEOUT_SECONDS}s'"
                connection.execute(sqlalchemy.text(timeout))
                number = int.from_bytes(key, "big") >> 1  # PostgreSQL's keys are signed
                connection.execute(sqlalchemy.text(f"SELECT pg_advisory_xact_lock({number})"))
            except (SQLAlchemyError, ImportError) as error:
                raise _unreachable(url, error) from error
            yield
    else:
        if not url.startswith("sqlite"):
            _warn_unlocked(url.partition(":")[0])
        yield


@functools.cache
def _engine(url: str) -> sqlalchemy.Engine:
    return sqlalchemy.create_engine(url, pool_size=1, pool_recycle=60, pool_pre_ping=True)


def _file_of(url: str) -> Path | None:
    """Return a storage's file; None for a database server or SQLite in memory."""
    if url.startswith(_JOURNAL):
        return Path(url.removeprefix(_JOURNAL).removeprefix("//"))
    try:
        return sqlite_path(url)
    except (SQLAlchemyError, ValueError) as error:  # ValueError: a port that is no number
        raise _unreachable(url, error) from error


@functools.cache
def _warn_unlocked(backend: str) -> None:
    logger.warning(
        "several processes on one study in %s may run more trials than asked for; use PostgreSQL or a journal file",
        backend,
    )
