"""A lock between processes that the operating system takes back from a dead one."""

import contextlib
import errno
import functools
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from sparsetune.errors import CacheError

_LOG = logging.getLogger(__name__)
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_POLL_SECONDS = 0.05


@contextlib.contextmanager
def exclusive(path: Path, *, what: str, setting: str = "cache.dir") -> Iterator[None]:
    """Hold the lock file `path`; wait while another process (or thread) holds it.

    The lock is the operating system's (flock, or a byte-range lock on Windows): it ends with its process,
    however that dies, so a leftover lock file blocks nobody. File systems without locks are used unlocked,
    with a warning.

    Args:
        path: the lock file; made, with its folder, where missing, and removed in the end.
        what: what is waited for, for the log.
        setting: the setting that says where the folder is, for the error.

    Raises:
        CacheError: the lock file can't be made.
    """
    handle = _try_acquire(path, setting)
    if handle is None:
        _LOG.info("another process holds %s; waiting for it", what)
    while handle is None:
        time.sleep(_POLL_SECONDS)
        handle = _try_acquire(path, setting)
    try:
        yield
    finally:
        _release(handle, path)


@contextlib.contextmanager
def exclusive_if_free(path: Path, *, setting: str = "cache.dir") -> Iterator[bool]:
    """Hold the lock file `path` where nobody else does, and give whether that was so; never waits.

    Args:
        path: the lock file, as for `exclusive`.
        setting: the setting that says where the folder is, for the error.

    Raises:
        CacheError: the lock file can't be made.
    """
    handle = _try_acquire(path, setting)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            _release(handle, path)


def _try_acquire(path: Path, setting: str) -> int | None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise CacheError(
            f"the folder must be writable, but {path.parent} is not: {error.strerror or error}; "
            f"choose another one with the setting {setting}"
        ) from error
    got = False
    try:
        got = _try_lock(handle) and _is_current(handle, path)
        return handle if got else None
    finally:
        if not got:
            os.close(handle)


def _is_current(handle: int, path: Path) -> bool:
    """Whether the locked file still is the one at `path`: its last holder may just have removed it."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _release(handle: int, path: Path) -> None:
    if sys.platform != "win32":  # Windows removes no open file; an empty one stays there
        path.unlink(missing_ok=True)
    os.close(handle)


if sys.platform == "win32":
    import msvcrt

    def _try_lock(handle: int) -> bool:
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            _warn_unlocked(error.strerror)
        return True


@functools.cache
def _warn_unlocked(reason: str) -> None:
    _LOG.warning("this file system has no locks (%s): two processes at once may do the same work twice", reason)
