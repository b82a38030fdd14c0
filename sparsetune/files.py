"""Paths that a user gave, and atomic writes of files and folders."""

import contextlib
import ctypes
import difflib
import fcntl
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
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


def similar_path(path: Path) -> str:
    """Return "; did you mean PATH?" where the folder of a missing path has something of nearly its name, else ""."""
    names = os.listdir(path.parent) if path.parent.is_dir() else []
    found = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.with_name(found[0])}?" if found else ""


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path` that replaces it when the block succeeds; SparsetuneError if it can't.

    It has `path`'s suffix (encoders choose a container by it), is flushed to disk before the rename, and is removed
    when the block raises, Ctrl-C included. Those that killed processes left of the same path are removed first.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_temporaries(path)
        with _made(lambda: _temporary(path), Path.touch) as temporary:
            yield temporary
            _sync(temporary)
            temporary.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error


def is_replaceable(path: Path, mark: str) -> bool:
    """Return whether nothing of the user's own is at `path`: nothing, or a file with `mark` in its first 64 kB."""
    if not path.exists():
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return mark.encode() in file.read(1 << 16)


def check_replaceable(path: Path, mark: str) -> None:
    """Raise SparsetuneError unless `is_replaceable`."""
    if not is_replaceable(path, mark):
        raise SparsetuneError(f"{path} was not written by sparsetune, so it is not replaced; choose another folder")


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
    fails. The temporary folder is removed when the block raises, Ctrl-C included, and those that killed processes left
    of the same folder are removed first.
    """
    folder = folder.absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_temporaries(folder)
        with _made(lambda: _temporary(folder), Path.mkdir) as temporary:
            yield temporary
            _sync(temporary)
            if folder.is_dir():
                _swap(temporary, folder)
            else:
                temporary.rename(folder)
            _sync(folder.parent)
    except OSError as error:
        raise _cannot_write(folder, error) from error


_SCRATCH = re.compile(r"sparsetune-scratch-[0-9a-f]{32}")


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a folder in the system's temporary folder, removed at the end; so are those that killed processes left."""
    remove_left_scratch()
    place = Path(tempfile.gettempdir())
    with _made(lambda: place / f"sparsetune-scratch-{uuid.uuid4().hex}", lambda path: path.mkdir(0o700)) as folder:
        yield folder


def left_scratch() -> list[Path]:
    """Find the scratch folders of this user whose processes died."""
    return [path for path in _scratch_folders() if _is_left(path)]


def remove_left_scratch() -> None:
    for path in _scratch_folders():
        remove_if_left(path)


def _scratch_folders() -> list[Path]:
    found = []
    for path in _matching(Path(tempfile.gettempdir()), _SCRATCH):
        with contextlib.suppress(FileNotFoundError):  # its process has just removed it
            if path.lstat().st_uid == os.getuid():
                found.append(path)
    return found


def _matching(folder: Path, names: re.Pattern[str]) -> list[Path]:
    return [path for path in folder.iterdir() if names.fullmatch(path.name) and not path.is_symlink()]


def _remove_temporaries(path: Path) -> None:
    """Remove what killed processes left of the temporary files or folders of a path."""
    for left in _matching(path.parent, re.compile(rf"\.{re.escape(path.stem)}-[0-9a-f]{{8}}{re.escape(path.suffix)}")):
        remove_if_left(left)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.stem}-{uuid.uuid4().hex[:8]}{path.suffix}")


@contextlib.contextmanager
def _made(name: Callable[[], Path], make: Callable[[Path], None]) -> Iterator[Path]:
    """Make a file or folder, hold its lock, which tells others that this process lives, and remove what is left."""
    while True:
        path = name()
        make(path)
        held = os.open(path, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(held, fcntl.LOCK_EX)
            if not path.exists():  # removed before it was locked
                continue
            try:
                yield path
            finally:
                _remove(path)
            return
        finally:
            os.close(held)


@contextlib.contextmanager
def _unheld(path: Path) -> Iterator[bool]:
    """Hold the lock of a file or folder that no process holds; False where one does, or there are no locks."""
    try:
        opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        yield False
        return
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield True
            return
        yield False
    finally:
        os.close(opened)


def _is_left(path: Path) -> bool:
    with _unheld(path) as is_left:
        return is_left


def remove_if_left(path: Path) -> None:
    """Remove a temporary file or folder whose process died."""
    with _unheld(path) as is_left:
        if is_left:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


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
