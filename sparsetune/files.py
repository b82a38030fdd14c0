"""Files that are written whole or not at all."""

import contextlib
import ctypes
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsetune.errors import SparsetuneError


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` that takes its place when the block ends well.

    The temporary file keeps `path`'s suffix (encoders choose a container by it), is flushed to disk before
    the rename, and is removed when the block raises, Ctrl-C included.

    Raises:
        SparsetuneError: the folder can't be made or written to, or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise _cannot_write(path, error) from error
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all; NaN and infinity are refused (not JSON)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _cannot_write(path: Path, error: OSError) -> SparsetuneError:
    reason = error.strerror or str(error)
    return SparsetuneError(
        f"the folder of {path} must be writable and have space, but writing there failed: {reason}; "
        "choose another folder or free some space"
    )


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
