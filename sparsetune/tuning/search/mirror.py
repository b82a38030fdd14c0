"""A study's SQL storage, and what this process knows of it without reading: the trials that it runs itself.

Optuna reads every unfinished trial again whenever it looks at a study, some six times for each new trial, and writes
each of its figures in a transaction of its own. With 64 trials under way that took 250 ms a trial.
"""

import contextlib
import copy
import datetime
import json
import threading
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna.distributions import BaseDistribution, check_distribution_compatibility, distribution_to_json
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._cached_storage import _CachedStorage, _StudyInfo
from optuna.storages._rdb import models
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.trial import FrozenTrial, TrialState

_NEEDED = (
    "_get_trials", "_set_trial_attr_without_commit", "_set_trial_intermediate_value_without_commit",
    "check_trial_is_updatable", "scoped_session",
)  # fmt: skip
"""Of Optuna 5.0's; another release may do without, and is then used as it comes."""


@dataclass
class _Unwritten:
    """What is still to be written of a trial."""

    params: list[tuple[str, float, BaseDistribution]] = field(default_factory=list)
    user_attrs: dict[str, Any] = field(default_factory=dict)
    system_attrs: dict[str, Any] = field(default_factory=dict)
    intermediate_values: dict[int, float] = field(default_factory=dict)

    def is_due(self, to_the_last: bool) -> bool:
        """Whether it is to be written; intermediate values alone can wait, but not beyond the trial's end."""
        return bool(self.params or self.user_attrs or self.system_attrs or (to_the_last and self.intermediate_values))


class Mirror(_CachedStorage):
    """Keeps the running trials of this process in memory, beside the finished ones that Optuna's own cache keeps.

    Who runs a trial is the only one to change it, until another process takes this one for dead and ends the trial: the
    next write finds that out. A trial's intermediate values are written with whatever is written of it next.

    Args:
        backend: the storage.
    """

    def __init__(self, backend: RDBStorage) -> None:
        super().__init__(backend)
        self._ours: dict[int, _Unwritten] = {}
        self._last_read: dict[int, int] = {}
        self._still: set[int] | None = None
        self._gathers: int | None = None
        self._mirror_lock = threading.RLock()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Read the study once, and write in one transaction what this thread changes of our trials in the block."""
        with self._mirror_lock:
            self._still, self._gathers = set(), threading.get_ident()
        try:
            yield
        finally:
            with self._mirror_lock:
                self._still = self._gathers = None
                self._write(list(self._ours))

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Create a trial; one that runs at once is ours."""
        with self._mirror_lock:
            trial_id = super().create_new_trial(study_id, template_trial)
            if template_trial is None:
                self._ours[trial_id] = _Unwritten()
            return trial_id

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """End a trial, or take one that waits, which is ours from then on."""
        with self._mirror_lock:
            self._write([trial_id], to_the_last=True)
            with self._noticing(trial_id):
                if not super().set_trial_state_values(trial_id, state, values):
                    return False
            if trial_id in self._ours and state.is_finished():
                self._change(
                    trial_id,
                    state=state,
                    values=values,
                    datetime_complete=datetime.datetime.now(),  # as Optuna has it
                )
                del self._ours[trial_id]
                return True
            self._read_again(trial_id)
            if state == TrialState.RUNNING:
                self._ours[trial_id] = _Unwritten()
            return True

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        """Set a parameter."""
        with self._mirror_lock:
            if trial_id not in self._ours:
                return super().set_trial_param(trial_id, param_name, param_value_internal, distribution)
            self._ours[trial_id].params.append((param_name, param_value_internal, distribution))
            trial = self._known(trial_id)
            value = distribution.to_external_repr(param_value_internal)
            self._change(
                trial_id,
                params={**trial.params, param_name: value},
                distributions={**trial.distributions, param_name: distribution},
            )
            self._write_unless_gathering(trial_id)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set a user attribute."""
        with self._mirror_lock:
            if trial_id not in self._ours:
                return super().set_trial_user_attr(trial_id, key, value)
            read = _as_read(value)  # before it is taken in: what isn't JSON can't be written
            self._ours[trial_id].user_attrs[key] = value
            self._change(trial_id, user_attrs={**self._known(trial_id).user_attrs, key: read})
            self._write_unless_gathering(trial_id)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set a system attribute."""
        with self._mirror_lock:
            if trial_id not in self._ours:
                return super().set_trial_system_attr(trial_id, key, value)
            read = _as_read(value)
            self._ours[trial_id].system_attrs[key] = value
            self._change(trial_id, system_attrs={**self._known(trial_id).system_attrs, key: read})
            self._write_unless_gathering(trial_id)

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        """Set an intermediate value."""
        with self._mirror_lock:
            if trial_id not in self._ours:
                return super().set_trial_intermediate_value(trial_id, step, intermediate_value)
            self._ours[trial_id].intermediate_values[step] = intermediate_value
            known = self._known(trial_id).intermediate_values
            self._change(trial_id, intermediate_values={**known, step: intermediate_value})

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """Give a trial, which the caller may change."""
        with self._mirror_lock:
            return copy.deepcopy(self._known(trial_id)) if trial_id in self._ours else super().get_trial(trial_id)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Give all trials, or those in some states, by number."""
        with self._mirror_lock:
            self._read_trials_from_remote_storage(study_id)
            known = self._studies[study_id].trials.values()  # they came in the order of their numbers
            trials = [trial for trial in known if states is None or trial.state in states]
        return copy.deepcopy(trials) if deepcopy else trials

    def _read_trials_from_remote_storage(self, study_id: int) -> None:
        with self._mirror_lock:
            if self._still is not None and study_id in self._still:
                return
            study = self._studies.setdefault(study_id, _StudyInfo())
            # A study's ids rise in the order in which its trials are created, since that locks the study.
            read = self._backend._get_trials(
                study_id,
                states=None,
                included_trial_ids=study.unfinished_trial_ids - self._ours.keys(),
                trial_id_greater_than=self._last_read.get(study_id, -1),
            )
            for trial in read:
                self._last_read[study_id] = max(trial._trial_id, self._last_read.get(study_id, -1))
                if trial._trial_id not in self._ours:
                    self._take_in(study_id, trial)
            if self._still is not None:
                self._still.add(study_id)

    def _take_in(self, study_id: int, trial: FrozenTrial) -> None:
        with self._lock:
            self._add_trials_to_cache(study_id, [trial])
            unfinished = self._studies[study_id].unfinished_trial_ids
            (unfinished.discard if trial.state.is_finished() else unfinished.add)(trial._trial_id)

    def _add_trials_to_cache(self, study_id: int, trials: list[FrozenTrial]) -> None:
        study = self._studies[study_id]
        last = next(reversed(study.trials), -1)
        in_order = all(trial.number > last or trial.number in study.trials for trial in trials)
        super()._add_trials_to_cache(study_id, trials)
        if not in_order:
            study.trials = dict(sorted(study.trials.items()))

    def _known(self, trial_id: int) -> FrozenTrial:
        study_id, number = self._trial_id_to_study_id_and_number[trial_id]
        return self._studies[study_id].trials[number]

    def _change(self, trial_id: int, **fields: object) -> None:
        """Put a changed copy in a trial's place: others hold what was read."""
        study_id, number = self._trial_id_to_study_id_and_number[trial_id]
        changed = copy.copy(self._studies[study_id].trials[number])
        for name, value in fields.items():
            setattr(changed, name, value)
        self._take_in(study_id, changed)

    def _read_again(self, trial_id: int) -> None:
        if trial_id in self._trial_id_to_study_id_and_number:
            self._take_in(self._trial_id_to_study_id_and_number[trial_id][0], self._backend.get_trial(trial_id))

    @contextlib.contextmanager
    def _noticing(self, trial_id: int) -> Iterator[None]:
        """Notice that another process ended a trial of ours."""
        try:
            yield
        except UpdateFinishedTrialError:
            if self._ours.pop(trial_id, None) is not None:
                self._read_again(trial_id)
            raise

    def _write_unless_gathering(self, trial_id: int) -> None:
        if self._gathers != threading.get_ident():
            self._write([trial_id])

    def _write(self, trial_ids: Sequence[int], to_the_last: bool = False) -> None:
        for trial_id in trial_ids:
            unwritten = self._ours.get(trial_id)
            if unwritten is not None and unwritten.is_due(to_the_last):
                with self._noticing(trial_id):
                    self._write_one(trial_id, unwritten)
                self._ours[trial_id] = _Unwritten()

    def _write_one(self, trial_id: int, unwritten: _Unwritten) -> None:
        backend, known = self._backend, self._studies[self._trial_id_to_study_id_and_number[trial_id][0]]
        with _create_scoped_session(backend.scoped_session, ignore_integrity_error=True) as session:
            state: Any = models.TrialModel.find_or_raise_by_id(trial_id, session).state
            backend.check_trial_is_updatable(trial_id, state)
            for name, value, distribution in unwritten.params:
                check_distribution_compatibility(known.param_distribution.setdefault(name, distribution), distribution)
                session.add(
                    models.TrialParamModel(
                        trial_id=trial_id, param_name=name, param_value=value,
                        distribution_json=distribution_to_json(distribution),
                    )
                )  # fmt: skip
            for model, attrs in (
                (models.TrialUserAttributeModel, unwritten.user_attrs),
                (models.TrialSystemAttributeModel, unwritten.system_attrs),
            ):
                for key, attr in attrs.items():
                    backend._set_trial_attr_without_commit(session, model, trial_id, key, attr)
            for step, figure in unwritten.intermediate_values.items():
                backend._set_trial_intermediate_value_without_commit(session, trial_id, step, figure)


def mirrored(backend: RDBStorage) -> BaseStorage:
    """Give a storage that keeps what this process knows; with an Optuna unlike the one known here, as it comes."""
    return Mirror(backend) if all(hasattr(backend, name) for name in _NEEDED) else backend


def together(storage: BaseStorage) -> contextlib.AbstractContextManager[None]:
    """Read once and write in one transaction within the block, where a storage can."""
    return storage.together() if isinstance(storage, Mirror) else contextlib.nullcontext()


def _as_read(value: Any) -> Any:
    """Give a value as it comes back from the database."""
    return json.loads(json.dumps(value))
