"""Paths that a user gave, and atomic writes of files and folders."""

import contextlib
import ctypes
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsetune.errors import SparsetuneError, UsageError


def expand(path: str | Path) -> Path:
    """Return a path with `~` expanded; UsageError where that user is unknown, or no path can be called so."""
    try:
        os.fsencode(path)
        expanded = Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(f"no user has the home folder that {str(path)!r} begins with; write the whole path") from error
    except UnicodeEncodeError as error:
        raise UsageError(f"a path can't hold half a surrogate pair, got {str(path)!a}") from error
    if "\0" in str(path):
        raise UsageError(f"a path can't hold a NUL character, got {str(path)!r}")
    return expanded


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path` that replaces it when the block succeeds; SparsetuneError if it can't.

    It has `path`'s suffix (encoders choose a container by it), is flushed to disk before the rename, and is removed
    when the block raises, Ctrl-C included.
    """
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        yield temporary
        _sync(temporary)
        temporary.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_text(value: Any) -> str:
    """Format `value` as indented JSON; ValueError for NaN and infinity, which JSON lacks."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json_text(value) + "\n")


def _cannot_write(path: Path, error: OSError) -> SparsetuneError:
    reason = error.strerror or str(error)
    return SparsetuneError(f"cannot write {path}: {reason}; choose another folder or free some space")


_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder` that replaces it when the block succeeds; SparsetuneError if it can't.

    On Linux the two are exchanged in one step, so a reader finds the old folder or the new one at any moment.
    Where the system or file system has no such call, the old one is moved away first, and back if the second move
    fails. The temporary folder is removed when the block raises, Ctrl-C included.
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
        raise _cannot_write(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, old: Path) -> None:
    if exchange(new, old):
        return
    moved = new.with_name(f"{new.name}-old")
    old.rename(moved)
    try:
        new.rename(old)
    except BaseException:
        moved.rename(old)
        raise
    moved.rename(new)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two paths of one file system in one step; return False where that isn't supported."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
