"""Work shared out by lock files: each piece by one process, and again where that one died."""

import json
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest

from sparsetune.errors import GenerationError
from sparsetune.locks import exclusive, exclusive_if_free
from sparsetune.tuning import shared_files as sharing
from sparsetune.tuning.shared_files import share_out
from tests.executor.engines import FakeExecutor

KEYS = [f"piece {index}" for index in range(12)]


@dataclass(frozen=True)
class Piece:
    key: str
    fails: bool = False

    def run(self, session: object, emit: object) -> str:
        time.sleep(0.05)
        if self.fails:
            raise GenerationError("it must render, but didn't")
        return f"{self.key} by {os.getpid()}"


@dataclass(frozen=True)
class Folder:
    """A file a piece."""

    path: Path

    def has(self, key: str) -> bool:
        return (self.path / key).is_file()

    def put(self, key: str, value: str) -> None:
        with (self.path / key).open("x") as file:  # fails where another process did it too
            file.write(value)


def share(path: Path, num_workers: int = 1, more=lambda: True, waits=None, **pieces: Piece) -> bool:
    work = {key: pieces.get(key.replace(" ", "_"), Piece(key)) for key in KEYS}
    return share_out(
        FakeExecutor(num_workers),
        work,
        Folder(path),
        lambda key: path / "locks" / f"{key}.lock",
        on_event=lambda key, event: None,
        on_wait=([] if waits is None else waits).append,
        more=more,
    )


def forked(work) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other tests left threads
        child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return child


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "POLL_SECONDS", 0.02)


def test_four_processes_do_each_piece_once_and_all_wait_for_the_last(tmp_path: Path) -> None:
    gate, opened = os.pipe()

    def work() -> None:
        os.close(opened)
        os.read(gate, 1)  # until all of them are there
        assert share(tmp_path, num_workers=2)
        assert all((tmp_path / key).is_file() for key in KEYS)

    children = [forked(work) for _ in range(4)]
    os.close(opened)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    done = {key: (tmp_path / key).read_text() for key in KEYS}
    assert all(text.startswith(f"{key} by ") for key, text in done.items())
    assert len({text.rpartition(" ")[2] for text in done.values()}) > 1
    assert list((tmp_path / "locks").iterdir()) == []


def test_what_another_has_in_hand_is_waited_for_and_done_where_it_dies(tmp_path: Path) -> None:
    ready, said = os.pipe()

    def hold() -> None:
        with exclusive(tmp_path / "locks" / "piece 3.lock", what="a piece"):
            os.write(said, b"x")
            time.sleep(60)

    holder, waits = forked(hold), []
    os.read(ready, 1)

    class KillsAtFirstWait(list[int]):
        def append(self, number: int) -> None:
            super().append(number)
            assert [key for key in KEYS if not Folder(tmp_path).has(key)] == ["piece 3"]
            os.kill(holder, 9)
            os.waitpid(holder, 0)

    waits = KillsAtFirstWait()
    assert share(tmp_path, waits=waits)
    assert waits == [1]
    assert (tmp_path / "piece 3").read_text() == f"piece 3 by {os.getpid()}"


def test_pieces_that_are_done_are_not_done_again(tmp_path: Path) -> None:
    for key in KEYS[:-1]:
        Folder(tmp_path).put(key, "earlier")
    assert share(tmp_path)
    assert json.dumps([(tmp_path / key).read_text() for key in KEYS[:-1]]) == json.dumps(["earlier"] * 11)


def test_no_time_left_ends_it_with_what_is_done(tmp_path: Path) -> None:
    answers = iter([True, True, True] + [False] * 99)
    assert not share(tmp_path, more=lambda: next(answers))
    assert sum(Folder(tmp_path).has(key) for key in KEYS) == 3


def test_a_piece_that_fails_leaves_no_lock_to_the_others(tmp_path: Path) -> None:
    with pytest.raises(GenerationError, match="must render"):
        share(tmp_path, piece_1=Piece("piece 1", fails=True))
    with exclusive_if_free(tmp_path / "locks" / "piece 1.lock") as free:
        assert free
