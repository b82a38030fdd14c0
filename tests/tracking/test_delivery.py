from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run

from sparsetune.tracking.delivery import Delivery
from sparsetune.tracking.operations import Begin, Operation, Status, Write, new_stand_in
from sparsetune.tracking.sending import find_runs, perform
from sparsetune.tracking.spool import Session, new_session
from sparsetune.tracking.store import Store, experiment_id
from tests.tracking.conftest import runs_of


class _Late(MlflowClient):
    """A client whose first request for a run times out, and is answered by its server all the same, later."""

    def __init__(self, store: Store) -> None:
        super().__init__(store.uri, store.registry_uri)
        self.missed: list[tuple[Any, ...]] = []

    def create_run(self, *request: Any) -> Run:
        if not self.missed:
            self.missed.append(request)
            raise ConnectionError("timed out")
        return super().create_run(*request)

    def catch_up(self) -> str:
        return str(super().create_run(*self.missed[0]).info.run_id)


def begin(experiment: str) -> Begin:
    return Begin(run=new_stand_in(), experiment_id=experiment, name="a run", start_ms=1, tags={})


def kept(session: Session, *operations: Operation) -> list[Path]:
    return [session.add(number, operation) for number, operation in enumerate(operations, 1)]


def test_a_run_that_a_slow_server_made_twice_is_there_once_in_the_end(
    client: MlflowClient, store: Store, experiment: str, tmp_path: Path
) -> None:
    late = _Late(store)
    session = new_session(tmp_path, "http://server", experiment_id(client, store, experiment))
    first = begin(session.experiment_id)
    end = Status(run=first.run, status="FINISHED", end_ms=2)
    paths = kept(session, first, Write(run=first.run, params={"seed": "1"}), end)
    delivery = Delivery(session, late, repeated=False)
    left, reason = delivery.send(paths)
    assert (left, reason) == (paths, "timed out")
    assert delivery.send(paths[:2]) == ([], None)
    twin = late.catch_up()
    assert delivery.send(paths[2:]) == ([], None)
    (run,) = runs_of(client, experiment)
    assert run.info.run_id != twin and run.data.params == {"seed": "1"} and run.info.status == "FINISHED"


def test_of_twins_the_one_that_was_written_to_is_found(client: MlflowClient, store: Store, experiment: str) -> None:
    asked = begin(experiment_id(client, store, experiment))
    made = [perform(client, asked, Path(), repeated=False)]
    twins = [client.create_run(asked.experiment_id, tags={"sparsetune.key": asked.run[4:]}).info.run_id for _ in "123"]
    written = max(made + twins)  # the last by id
    client.log_param(written, "seed", "1")
    client.set_terminated(written)
    assert find_runs(client, asked.experiment_id, asked.run)[0] == written
