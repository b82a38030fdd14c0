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
    with exclusive_if_free(path, setting=setting) as free:
        if free:
            yield
            return
    _LOG.info("waiting for another process that holds %s", what)
    with exclusive_if_free(path, setting=setting, blocking=True):
        yield


def is_held(path: Path) -> bool:
    """Return whether a process holds a lock file that exists; the file stays."""
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except (Timeout, OSError):
        return True
    lock.release()
    return False


@contextlib.contextmanager
def exclusive_if_free(path: Path, *, setting: str = "cache.dir", blocking: bool = False) -> Iterator[bool]:
    """As `exclusive`, but yield False at once where another process or thread holds the lock."""
    lock, acquired = FileLock(path, thread_local=False), True  # another thread may release it than acquired it
    try:
        lock.acquire(blocking=blocking)
    except Timeout:
        acquired = False
    except OSError as error:
        reason = error.strerror or error
        raise CacheError(f"cannot lock {path}: {reason}; choose a writable folder with {setting}") from error
    try:
        yield acquired
    finally:
        if acquired:  # unlink while it is held: whoever waits on this file finds it gone and creates it anew
            path.unlink(missing_ok=True)
            lock.release()
