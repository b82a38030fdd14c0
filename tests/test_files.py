import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsetune.files import atomic_folder, atomic_path, left_scratch, remove_left_scratch, scratch_folder, write_text

HANGS = """
import time
from pathlib import Path
from sparsetune.files import {name}
with {call} as path:
    print(path, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def hanging(tmp_path: Path) -> "Callable[[str, str], tuple[subprocess.Popen[str], Path]]":
    """Start a process that hangs within a block; returns it and the temporary path that the block has."""

    def start(name: str, call: str) -> "tuple[subprocess.Popen[str], Path]":
        process = subprocess.Popen(
            [sys.executable, "-c", HANGS.format(name=name, call=call)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "TMPDIR": str(tmp_path)},
        )
        assert process.stdout is not None
        return process, tmp_path / process.stdout.readline().strip()

    return start


def kill(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_the_temporary_file_of_a_killed_process_is_removed_by_the_next_write(
    tmp_path: Path, hanging: Callable[..., tuple["subprocess.Popen[str]", Path]]
) -> None:
    process, temporary = hanging("atomic_path", "atomic_path(Path('a.mp4'))")
    (tmp_path / ".a-12345678.txt").write_text("of another path")
    write_text(tmp_path / "a.mp4", "while the other process lives")
    assert temporary.exists()
    kill(process)
    write_text(tmp_path / "b.mp4", "another path")
    assert temporary.exists()
    write_text(tmp_path / "a.mp4", "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a-12345678.txt", "a.mp4", "b.mp4"]


def test_the_temporary_folder_of_a_killed_process_is_removed_by_the_next_write(
    tmp_path: Path, hanging: Callable[..., tuple["subprocess.Popen[str]", Path]]
) -> None:
    process, temporary = hanging("atomic_folder", "atomic_folder(Path('out'))")
    (temporary / "half").write_text("")
    kill(process)
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["out", "out/whole"]


def test_scratch_folders_of_killed_processes_are_removed(
    tmp_path: Path, hanging: Callable[..., tuple["subprocess.Popen[str]", Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "sparsetune-scratch-mine").mkdir()
    process, left = hanging("scratch_folder", "scratch_folder()")
    with scratch_folder() as folder:
        (folder / "a").write_text("")
        assert left.is_dir() and left_scratch() == []
        kill(process)
        assert left_scratch() == [left]
        remove_left_scratch()
        assert folder.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["sparsetune-scratch-mine"]


def test_a_temporary_file_is_removed_when_the_block_raises(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "a.txt"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
