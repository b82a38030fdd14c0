"""Folders that are written whole or not at all."""

import contextlib
import ctypes
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from sparsetune.errors import SparsetuneError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Give a new folder beside `folder` that takes its place when the block ends well.

    On Linux the two are exchanged in one step, so a reader finds the old folder or the new one at any moment.
    Where the system or file system has no such call, the old one is moved aside first and moved back should
    the second move fail. What was written is removed when the block raises, Ctrl-C included.

    Raises:
        SparsetuneError: the folder can't be made, or the disk is full.
    """
    folder = folder.absolute()
    temporary = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _sync(temporary)
        if folder.is_dir():
            _swap(temporary, folder)
        else:
            temporary.rename(folder)
        _sync(folder.parent)
    except OSError as error:
        raise SparsetuneError(
            f"the folder of {folder} must be writable and have space, but writing there failed: "
            f"{error.strerror or error}; choose another folder or free some space"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, old: Path) -> None:
    """Put `new` in the place of `old`, and `old` in that of `new`."""
    if exchange(new, old):
        return
    aside = new.with_name(f"{new.name}-old")
    old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        aside.rename(old)
        raise
    aside.rename(new)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two paths of one file system in one step; False where that isn't to be had."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if renameat2 is None:
        return False
    done = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return bool(done == 0)


def _sync(folder: Path) -> None:
    if os.name != "posix":
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
