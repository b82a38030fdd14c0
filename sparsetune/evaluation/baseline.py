"""The dense baselines' cache: what the unmodified pipeline rendered, under a hash of all that decides it."""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sparsetune.errors import CacheError, SparsetuneError
from sparsetune.evaluation.baseline_entry import (
    BaselineKey,
    DamagedEntryError,
    EntryInfo,
    read_entry,
    read_info,
    write_entry,
)
from sparsetune.locks import exclusive, exclusive_if_free

_LOG = logging.getLogger(__name__)
_STALE_SECONDS = 3600.0
"""A temporary file older than this was left by a process that died."""


@dataclass(frozen=True)
class Baseline:
    """A dense video.

    Args:
        frames: (frames, height, width, 3), RGB uint8, read-only.
        seconds: what its rendering took, perhaps on an earlier day.
        cached: whether it came from the cache.
    """

    frames: NDArray[np.uint8]
    seconds: float
    cached: bool


@dataclass(frozen=True)
class CacheEntry:
    """One line of `BaselineCache.ls`.

    Args:
        digest: its address.
        info: what it was rendered from; None where the entry is damaged.
        size_bytes: on disk.
        last_used: seconds since the epoch.
        path: its file.
    """

    digest: str
    info: EntryInfo | None
    size_bytes: int
    last_used: float
    path: Path


@dataclass(frozen=True)
class Cleared:
    """What `BaselineCache.clear` removed; entries in use by another process stay (`num_in_use`)."""

    num_entries: int
    size_bytes: int
    num_in_use: int


class BaselineCache:
    """Dense videos on disk, one file an entry, safe for several processes at once.

    Args:
        folder: where they lie; made when first needed.
        max_gb: the bound in 10^9 bytes; beyond it the least recently used go first, but never one in use.
            0 stores nothing.

    Raises:
        CacheError: the bound is negative.
    """

    def __init__(self, folder: Path, max_gb: float) -> None:
        if not max_gb >= 0:
            raise CacheError(f"the cache's bound must be at least 0 GB, but is {max_gb}; mend cache.max_gb")
        self.folder = folder
        self.max_bytes = int(max_gb * 1e9)
        self._used: set[str] = set()

    def get(self, key: BaselineKey) -> Baseline | None:
        """Read the entry of `key`, checked by its checksum, and mark it as just used.

        Returns:
            The video, or None where there is none or a damaged one (removed, with a warning).
        """
        path = self._path(key.digest)
        try:
            frames, info = read_entry(path, key)
        except FileNotFoundError:
            return None
        except DamagedEntryError as error:
            _LOG.warning("the cached dense video %s is damaged (%s); it is rendered again", path, error)
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(FileNotFoundError):  # evicted by another process since
            os.utime(path)
        self._used.add(key.digest)
        return Baseline(frames, info.seconds, cached=True)

    def put(self, key: BaselineKey, frames: NDArray[np.uint8], seconds: float) -> None:
        """Store a video under `key`, then drop the least recently used entries beyond the bound.

        Args:
            key: what decided the video's pixels.
            frames: (frames, height, width, 3), RGB uint8.
            seconds: what its rendering took.

        Raises:
            SparsetuneError: it can't be written.
        """
        if self.max_bytes == 0:
            return
        write_entry(self._path(key.digest), key, frames, seconds)
        self._used.add(key.digest)
        self._evict(keep=key.digest)

    def get_or_render(self, key: BaselineKey, render: Callable[[], tuple[NDArray[np.uint8], float]]) -> Baseline:
        """Read the video of `key`, or render and store it; two processes that want the same one render it once.

        A video that can't be stored (a full disk) is used all the same, with a warning: it was dear.

        Args:
            key: what decides the video's pixels.
            render: gives frames (frames, height, width, 3), RGB uint8, and the seconds they took.

        Raises:
            CacheError: the folder can't be used (said before anything is rendered).
        """
        with exclusive(self._lock(key.digest), what=f"the dense video of {key.prompt!r}"):
            found = self.get(key)
            if found is not None:
                return found
            frames, seconds = render()
            try:
                self.put(key, frames, seconds)
            except SparsetuneError as error:
                _LOG.warning("the dense video of %r is not kept for later: %s", key.prompt, error)
            frames.setflags(write=False)
            return Baseline(frames, seconds, cached=False)

    def ls(self) -> tuple[CacheEntry, ...]:
        """List the entries, the most recently used first; damaged ones have no `info`."""
        entries = []
        for path, status in self._files():
            try:
                info = read_info(path)
            except FileNotFoundError:
                continue
            except DamagedEntryError:
                info = None
            entries.append(CacheEntry(path.stem, info, status.st_size, status.st_mtime, path))
        return tuple(sorted(entries, key=lambda entry: entry.last_used, reverse=True))

    def clear(self) -> Cleared:
        """Remove every entry that no other process is using, and what dead processes left."""
        removed = removed_bytes = in_use = 0
        for path, status in self._files():
            if self._remove(path):
                removed += 1
                removed_bytes += status.st_size
            else:
                in_use += 1
        self._sweep()
        return Cleared(removed, removed_bytes, in_use)

    def _evict(self, keep: str) -> None:
        files = sorted(self._files(), key=lambda item: item[1].st_mtime)
        total = sum(status.st_size for _, status in files)
        for path, status in files:
            if total <= self.max_bytes:
                break
            if path.stem == keep or not self._remove(path):
                continue
            total -= status.st_size
            if path.stem in self._used:
                _LOG.warning(
                    "the cache's bound of %.3g GB is too small for this run's dense videos, so they will be "
                    "rendered again; raise cache.max_gb",
                    self.max_bytes / 1e9,
                )
                self._used.clear()
        self._sweep()

    def _remove(self, path: Path) -> bool:
        with exclusive_if_free(self._lock(path.stem)) as free:
            if free:
                path.unlink(missing_ok=True)
            return free

    def _sweep(self) -> None:
        for path in self.folder.glob(".*.npz"):
            try:
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink(missing_ok=True)
            except FileNotFoundError:
                continue

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.folder.glob("[0-9a-f]*.npz"):
            try:
                yield path, path.stat()
            except FileNotFoundError:  # another process removed it meanwhile
                continue

    def _path(self, digest: str) -> Path:
        return self.folder / f"{digest}.npz"

    def _lock(self, digest: str) -> Path:
        return self.folder / "locks" / f"{digest}.lock"
