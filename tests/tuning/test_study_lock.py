"""The lock of a study: between processes, on a journal file, SQLite and a real PostgreSQL."""

import os
import select
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparsetune.errors import CacheError, TuningError
from sparsetune.tuning.search.study import study_lock
from tests.tracking.servers import postgres, postgres_binaries


def hold(url: str, name: str, seconds: float, write_end: int) -> None:
    with study_lock(url, name):
        os.write(write_end, b"held")
        time.sleep(seconds)


def forked(*work: object) -> int:
    """Run `hold` in a forked process, which needs no imports; return its id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other tests left threads
        child = os.fork()
    if child == 0:
        try:
            hold(*work)  # type: ignore[arg-type]
        finally:
            os._exit(0)
    return child


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    binaries = postgres_binaries()
    if binaries is None:
        pytest.skip("PostgreSQL isn't installed")
    with postgres(binaries) as url:
        yield url


@pytest.fixture(params=["journal", "sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgresql":
        return str(request.getfixturevalue("database"))
    return f"journal:{tmp_path / 'study.log'}" if request.param == "journal" else f"sqlite:///{tmp_path / 'optuna.db'}"


def test_a_lock_is_waited_for_and_ends_with_a_killed_process(url: str) -> None:
    read_end, write_end = os.pipe()
    holder = forked(url, "one", 60.0, write_end)
    assert os.read(read_end, 4) == b"held"
    with study_lock(url, "another study"):
        pass
    waiter = forked(url, "one", 0.0, write_end)
    assert select.select([read_end], [], [], 0.5)[0] == []
    os.kill(holder, signal.SIGKILL)
    assert select.select([read_end], [], [], 60.0)[0] == [read_end]
    for child in (holder, waiter):
        os.waitpid(child, 0)
    with study_lock(url, "one"):
        pass


def test_a_lock_leaves_no_file_behind(tmp_path: Path) -> None:
    with study_lock(f"journal:{tmp_path / 'study.log'}", "one"):
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_study_in_memory_needs_no_lock() -> None:
    with study_lock("sqlite://", "one"):
        pass


def test_a_storage_that_is_away_and_a_folder_that_isnt_one_are_said(tmp_path: Path) -> None:
    away = "postgresql+psycopg2://ada:secret@127.0.0.1:1/optuna"
    with pytest.raises(TuningError, match=r"cannot open study storage postgresql\+psycopg2://127.0.0.1:1/optuna: "):
        study_lock(away, "one").__enter__()
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"cannot lock .*file.*: .*tune\.storage"):
        study_lock(f"journal:{tmp_path / 'file' / 'study.log'}", "one").__enter__()
