"""What a process knows of a study without reading it, against what its database holds."""

from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event

from sparsetune.tuning.search import study as studies
from sparsetune.tuning.search.mirror import Mirror
from tests.executor.engines import FakeExecutor
from tests.tuning.test_study import make


@pytest.fixture(autouse=True)
def quiet():
    with studies.quiet():
        yield


def shown(trial: FrozenTrial) -> dict[str, object]:
    """What a trial is, but for when it ended, which differs by the time that writing takes."""
    return {
        name: getattr(trial, name)
        for name in ("number", "state", "params", "distributions", "user_attrs", "system_attrs", "datetime_start")
    } | (
        {"values": trial.values, "intermediate_values": trial.intermediate_values} if trial.state.is_finished() else {}
    )


def in_database(storage: RDBStorage, study: optuna.Study) -> list[dict[str, object]]:
    """Read all trials anew."""
    return [shown(trial) for trial in storage.get_all_trials(storage.get_study_id_from_name(study.study_name))]


class Watched(FakeExecutor):
    """Compares study and database whenever a prompt is submitted."""

    def submit(self, task, on_event):
        known = [shown(trial) for trial in self.study.get_trials(deepcopy=False)]
        assert known == in_database(self.database, self.study)
        assert [list(trial["params"]) for trial in known] == [list(trial.params) for trial in self.study.get_trials()]
        return super().submit(task, on_event)


def test_a_search_knows_what_the_database_holds(tmp_path: Path) -> None:
    engine = Watched(5)
    study, objective = make(tmp_path, num_prompts=3, n_trials=16, engine=engine)
    assert isinstance(study._storage, Mirror)
    engine.study, engine.database = study, RDBStorage(f"sqlite:///{tmp_path / 'optuna.db'}")
    studies.search(study, objective, 16, None)
    assert {trial.state for trial in study.get_trials()} == {TrialState.COMPLETE, TrialState.PRUNED}
    assert [shown(trial) for trial in study.get_trials()] == in_database(engine.database, study)
    engine.database.engine.dispose()


def test_the_same_trials_are_asked_for_as_with_optunas_own_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    for name in ("mirrored", "as it comes"):
        (tmp_path / name).mkdir()
        if name == "as it comes":
            monkeypatch.setattr(studies, "mirrored", lambda backend: backend)
        study, objective = make(tmp_path / name, num_prompts=3, n_trials=16, engine=FakeExecutor(4))
        studies.search(study, objective, 16, None)
        results = studies.results(study, objective)
        asked.append([replace(result, seconds=0.0, worker=None) for result in results])
    assert not isinstance(study._storage, Mirror)
    assert asked[0] == asked[1]


def take(study) -> optuna.Trial:
    return study.take(99, lambda trials: None, lambda trial: trial.suggest_float("x", 0.0, 1.0))


def test_what_other_processes_do_is_seen(tmp_path: Path) -> None:
    here, _ = make(tmp_path)
    there, _ = make(tmp_path)
    ours, theirs = take(here), take(there)
    assert [trial.state for trial in here.get_trials()] == [TrialState.RUNNING, TrialState.RUNNING]
    theirs.set_user_attr("seen", [1, 2])
    assert here.get_trials()[1].user_attrs["seen"] == [1, 2]
    there.tell(theirs, 0.5)
    assert here.get_trials()[1].value == 0.5 and here.get_trials()[1].params == theirs.params
    there.put({"x": 0.25})
    assert take(here).params == {"x": 0.25}
    here.tell(ours, 0.75)
    assert there.get_trials()[0].value == 0.75


def test_a_trial_that_another_process_ended_is_found_out_at_the_next_write(tmp_path: Path) -> None:
    here, _ = make(tmp_path)
    there, _ = make(tmp_path)
    trial = take(here)
    there.tell(trial.number, state=TrialState.FAIL)
    with pytest.raises(UpdateFinishedTrialError), here.together():
        trial.report(1.0, 0)
        trial.set_user_attr("late", 1)
    assert here.get_trials()[0].state == TrialState.FAIL and "late" not in here.get_trials()[0].user_attrs
    with pytest.raises(UpdateFinishedTrialError):
        trial.report(2.0, 1)


def test_a_trial_costs_as_many_queries_whatever_runs_beside_it(tmp_path: Path) -> None:
    study, _ = make(tmp_path, sampler="random")
    counts, statements = [], []
    event.listen(study._storage._backend.engine, "after_cursor_execute", lambda *rest: statements.append(rest[2]))
    for _ in range(15):
        statements.clear()
        take(study)
        counts.append(len(statements))
    assert isinstance(study._storage._backend.engine, sqlalchemy.Engine)
    assert counts[14] == counts[2] < 40


def test_what_is_reported_last_is_written_when_a_trial_ends(tmp_path: Path) -> None:
    database = RDBStorage(f"sqlite:///{tmp_path / 'study.db'}")
    study = optuna.create_study(storage=Mirror(database), pruner=optuna.pruners.NopPruner())
    trial = study.ask()
    trial.report(1.0, 0)
    trial.report(2.0, 1)
    study.tell(trial, 3.0)
    (read,) = RDBStorage(f"sqlite:///{tmp_path / 'study.db'}").get_all_trials(study._study_id)
    assert read.intermediate_values == {0: 1.0, 1: 2.0}


def test_an_attribute_that_isn_t_json_is_refused_and_forgotten(tmp_path: Path) -> None:
    study = optuna.create_study(storage=Mirror(RDBStorage(f"sqlite:///{tmp_path / 'study.db'}")))
    trial = study.ask()
    with pytest.raises(TypeError):
        trial.set_user_attr("what", object())
    trial.suggest_float("x", 0.0, 1.0)
    study.tell(trial, 1.0)
    assert study.trials[0].state == TrialState.COMPLETE and not study.trials[0].user_attrs
