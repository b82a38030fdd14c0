"""Inter-process locks, with real processes."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparsetune.errors import CacheError
from sparsetune.locks import exclusive, exclusive_if_free

HOLD = """
import sys
from pathlib import Path
from sparsetune.locks import exclusive
with exclusive(Path(sys.argv[1]), what="a test"):
    print("held", flush=True)
    sys.stdin.readline()
"""


def holding(path: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lock_held_by_another_process_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    process = holding(path)
    with exclusive_if_free(path) as free:
        assert not free
    assert process.stdin is not None
    process.stdin.write("release\n")
    process.stdin.flush()
    with exclusive(path, what="a test"), exclusive_if_free(path) as free:
        assert not free
    process.communicate(timeout=30)
    assert process.returncode == 0


def test_a_dead_process_blocks_nobody(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    process = holding(path)
    process.kill()
    process.communicate(timeout=30)
    assert path.exists()  # its lock file is left over
    started = time.monotonic()
    with exclusive(path, what="a test"):
        assert time.monotonic() - started < 5


def test_no_lock_file_is_left(tmp_path: Path) -> None:
    with exclusive(tmp_path / "locks" / "a.lock", what="a test"):
        pass
    assert not list((tmp_path / "locks").iterdir())


def test_a_folder_that_cannot_be_used_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CacheError, match=r"cannot lock .*file/a\.lock: .*cache\.dir"),
        exclusive(tmp_path / "file" / "a.lock", what="a test"),
    ):
        pass
