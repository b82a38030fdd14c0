"""Inter-process file locks, by filelock: a lock ends with its process, and a leftover lock file blocks nobody."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from sparsetune.errors import CacheError

_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def exclusive(path: Path, *, what: str, setting: str = "cache.dir") -> Iterator[None]:
    """Hold the lock file `path`, created with its folder and removed at the end; wait while it is held elsewhere.

    `what` it protects is for the log, and `setting`, which chooses the folder, for CacheError where it can't be made.
    """
    lock = _lock(path)
    if not _acquire(lock, setting, blocking=False):
        _LOG.info("waiting for another process that holds %s", what)
        _acquire(lock, setting, blocking=True)
    try:
        yield
    finally:
        _release(lock, path)


@contextlib.contextmanager
def exclusive_if_free(path: Path, *, setting: str = "cache.dir") -> Iterator[bool]:
    """As `exclusive`, but yield False at once where another process or thread holds the lock."""
    lock = _lock(path)
    acquired = _acquire(lock, setting, blocking=False)
    try:
        yield acquired
    finally:
        if acquired:
            _release(lock, path)


def _lock(path: Path) -> FileLock:
    return FileLock(path, thread_local=False)  # it may be released by another thread than acquired it


def _acquire(lock: FileLock, setting: str, *, blocking: bool) -> bool:
    try:
        lock.acquire(blocking=blocking)
    except Timeout:
        return False
    except OSError as error:
        raise CacheError(
            f"cannot lock {lock.lock_file}: {error.strerror or error}; choose a writable folder with {setting}"
        ) from error
    return True


def _release(lock: FileLock, path: Path) -> None:
    path.unlink(missing_ok=True)  # while it is held: whoever waits on this file finds it gone and creates it anew
    lock.release()
