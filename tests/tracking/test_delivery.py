import logging
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from sparsetune.tracking.delivery import Delivery
from sparsetune.tracking.operations import Begin, Files, Model, Operation, Status, Write, new_stand_in
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


DAMAGES = {
    "cut off": lambda path: path.write_text(path.read_text()[:20]),
    "empty": lambda path: path.write_bytes(b""),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "of no kind": lambda path: path.write_text('{"kind": "dance", "run": "1"}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_operation_is_set_aside_and_the_rest_is_sent(
    client: MlflowClient,
    store: Store,
    experiment: str,
    tmp_path: Path,
    damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    session = new_session(tmp_path, "http://server", experiment_id(client, store, experiment))
    first = begin(session.experiment_id)
    end = Status(run=first.run, status="FINISHED", end_ms=2)
    paths = kept(session, first, Write(run=first.run, params={"seed": "1"}), end)
    DAMAGES[damage](paths[1])
    content = paths[1].read_bytes()
    delivery = Delivery(session, client, repeated=True)
    with caplog.at_level(logging.WARNING, "sparsetune"):
        assert delivery.send(paths) == ([], None)
    (aside,) = delivery.damaged
    assert aside == tmp_path / "damaged" / f"{session.folder.name}-000002.json"
    assert aside.read_bytes() == content
    assert f"it is set aside as {aside}, the rest is sent" in caplog.messages[0]
    assert session.remove_if_empty() and aside.is_file()
    (run,) = runs_of(client, experiment)
    assert (run.info.status, run.data.params) == ("FINISHED", {})


def test_files_that_are_gone_and_a_checkpoint_that_is_none_are_damages_too(
    client: MlflowClient, store: Store, experiment: str, tmp_path: Path
) -> None:
    session = new_session(tmp_path, "http://server", experiment_id(client, store, experiment))
    first = begin(session.experiment_id)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "policy.safetensors").write_bytes(b"nothing")
    paths = [session.add(1, first), session.add(2, Files(run=first.run, folder=None))]
    paths.append(session.add(3, Model(run=first.run), tmp_path / "checkpoint"))
    delivery = Delivery(session, client, repeated=True)
    assert delivery.send(paths) == ([], None)
    assert [path.name[-11:] for path in delivery.damaged] == ["000002.json", "000003.json"]
    assert (delivery.damaged[1].with_suffix("") / "policy.safetensors").is_file()
    assert session.pending() == []
