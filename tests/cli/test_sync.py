import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from sparsetune.cli.main import main
from sparsetune.tracking.operations import Begin, Files, Write, new_stand_in
from sparsetune.tracking.spool import Session, new_session
from tests.tracking.servers import free_port


@pytest.fixture
def spool(working_folder: Path) -> Path:
    return working_folder / "mlruns" / "spool"


@pytest.fixture
def session(spool: Path) -> Session:
    """Two writes for a server that is away."""
    session = new_session(spool, f"http://127.0.0.1:{free_port()}", "1")
    run = new_stand_in()
    session.add(1, Begin(run=run, experiment_id="1", name="a run", start_ms=1, tags={}))
    session.add(2, Write(run=run, metrics=(("psnr", float("nan"), 1, 0),)))
    return session


def test_an_empty_spool_is_said(spool: Path) -> None:
    result = CliRunner().invoke(main, ["sync"])
    assert (result.exit_code, result.stdout) == (0, f"nothing to upload in {spool}\n")
    assert CliRunner().invoke(main, ["sync", "--json"]).stdout == "[]\n"


def test_a_server_that_is_away_leaves_everything_where_it_is(session: Session) -> None:
    result = CliRunner().invoke(main, ["sync", "--json"])
    assert result.exit_code == 1
    assert len(session.pending()) == 2
    (row,) = json.loads(result.stdout)
    assert row["reason"].startswith(f"the tracking server {session.uri} must answer")
    expected = {"folder": str(session.folder), "server": session.uri, "sent": 0, "left": 2, "reason": row["reason"]} | {
        "damaged": []
    }
    assert row == expected
    assert "2 writes were not uploaded: the tracking server" in result.stderr
    assert f"delete {session.folder} to discard them" in result.stderr


def test_a_session_that_another_process_holds_is_left_to_it(session: Session) -> None:
    with session.held() as ours:
        assert ours
        result = CliRunner().invoke(main, ["sync"])
    assert result.exit_code == 1
    assert "0 writes uploaded" in result.stdout and "another process is recording or sending it" in result.stdout


def test_what_a_killed_process_left_half_written_is_cleared_away(spool: Path) -> None:
    session = new_session(spool, "http://127.0.0.1:9", "1")
    (session.folder / "000001").mkdir()
    (session.folder / "000001" / "video.mp4").write_bytes(b"without its operation")
    result = CliRunner().invoke(main, ["sync"])
    assert result.exit_code == 0
    assert not session.folder.exists()


@pytest.mark.parametrize("description", ["{}", "", "[1]", '{"uri": "http'])
def test_a_session_without_its_server_is_set_aside_and_holds_no_other_up(
    spool: Path, session: Session, description: str
) -> None:
    (session.folder / "store.json").write_text(description)
    other = new_session(spool, "http://127.0.0.1:9", "1")
    result = CliRunner().invoke(main, ["sync", "--json"])
    assert result.exit_code == 1
    aside = spool / "damaged" / session.folder.name
    damaged, sent = json.loads(result.stdout)
    assert (damaged["damaged"], damaged["server"], sent["folder"]) == (
        [str(aside)], "an unknown server", str(other.folder),
    )  # fmt: skip
    assert "store.json doesn't say which server it is for" in result.stderr
    assert f"1 writes are damaged and were moved, the first to {aside}" in result.stderr
    assert len(list(aside.glob("0*.json"))) == 2
    assert not other.folder.exists()
    assert CliRunner().invoke(main, ["sync"]).stdout == f"nothing to upload in {spool}\n"


def test_a_damaged_session_that_a_process_holds_is_left_to_it(session: Session) -> None:
    (session.folder / "store.json").write_text("{}")
    with session.held() as ours:
        assert ours
        assert CliRunner().invoke(main, ["sync"]).exit_code == 0
    assert len(session.pending()) == 2


def test_files_are_copied_into_the_session(spool: Path, working_folder: Path) -> None:
    (working_folder / "checkpoint" / "deep").mkdir(parents=True)
    (working_folder / "checkpoint" / "deep" / "a.bin").write_bytes(b"a")
    (working_folder / "b.mp4").write_bytes(b"b")
    session = new_session(spool, "http://127.0.0.1:9", "1")
    session.add(1, Files(run="1", folder=None), working_folder / "checkpoint")
    session.add(2, Files(run="1", folder="videos"), working_folder / "b.mp4")
    assert (session.folder / "000001" / "deep" / "a.bin").read_bytes() == b"a"
    assert (session.folder / "000002" / "b.mp4").read_bytes() == b"b"
