"""Cache of dense baseline videos, addressed by a hash of everything that decides their pixels."""

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import stat
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from sparsetune.errors import CacheError, SparsetuneError
from sparsetune.files import atomic_path, remove_if_left
from sparsetune.locks import exclusive, exclusive_if_free

_LOG = logging.getLogger(__name__)
_ENTRY = re.compile(r"[0-9a-f]{64}\.npz")
_TEMPORARY = re.compile(r"\.[0-9a-f]{64}-[0-9a-f]{8}\.npz")  # as `atomic_path` names them
_ZIP_HEADER_BYTES = 30
_MAX_INFO_BYTES = 1 << 20
_FRAMES = "frames.npy"
_INFO = "entry.json"
_FORMAT = 1
"""Increment when the stored content, or the renderer's pixels, change: older entries are then not found."""


@dataclass(frozen=True)
class BaselineKey:
    """Everything that decides the pixels of a dense video.

    Offload, VAE slicing, the frame rate and the number of threads are left out: they don't change the video.
    """

    source: str
    revision: str | None
    fingerprint: str  # hash of the weights
    pipeline_class: str
    prompt: str
    negative_prompt: str
    seed: int
    num_frames: int
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    max_sequence_length: int | None
    scheduler: str  # class and hash of its configuration
    dtype: str
    device: str  # the kind; an accelerator's name
    vae_tiling: bool  # seams of tiles are blended
    versions: tuple[tuple[str, str], ...]  # (package, version) of torch, diffusers and transformers
    image: str | None = None  # hash of the first frame's image
    guidance_scale_2: float | None = None  # of a second transformer
    sigmas: tuple[float, ...] = ()  # of the steps, where they aren't the pipeline's own
    compiled: bool = False  # compiled kernels round otherwise

    @property
    def digest(self) -> str:
        fields = asdict(self)
        for name in ("compiled", "sigmas"):  # so that videos cached before there were these fields are found
            if not fields[name]:
                del fields[name]
        return canonical_hash({"format": _FORMAT, **fields})


class EntryInfo(BaseModel):
    """Metadata stored beside the frames: the key's fields, their shape and SHA-256, and the rendering's seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: dict[str, Any]
    digest: str
    shape: tuple[int, ...]
    sha256: str
    seconds: float
    created: float


@dataclass(frozen=True)
class Baseline:
    """A dense video: frames (frames, height, width, 3), RGB uint8, read-only."""

    frames: NDArray[np.uint8]
    seconds: float  # of its rendering, perhaps by an earlier run
    cached: bool


@dataclass(frozen=True)
class CacheEntry:
    """An entry as `BaselineCache.ls` lists it; `last_used` is a Unix time."""

    digest: str
    info: EntryInfo
    size_bytes: int
    last_used: float
    path: Path


@dataclass(frozen=True)
class Cleared:
    """Result of `BaselineCache.clear`; entries in use by another process stay (`num_in_use`)."""

    num_entries: int
    size_bytes: int
    num_in_use: int


class DamagedEntryError(Exception):
    """An entry's file isn't what was written; the cache renders it again."""


class BaselineCache:
    """Dense videos on disk, one file per entry, safe for several processes at once.

    Beyond `max_gb` (10^9 bytes; 0 stores nothing) the least recently used entries that aren't in use are removed. The
    folder may hold other files: only an entry whose header names its own digest is listed, counted or removed.
    """

    def __init__(self, folder: Path, max_gb: float) -> None:
        if not max_gb >= 0:
            raise CacheError(f"cache.max_gb must be at least 0 GB, got {max_gb}")
        self.folder = folder
        self.max_bytes = int(max_gb * 1e9)
        self._used: set[str] = set()

    def get(self, key: BaselineKey) -> Baseline | None:
        """Read the video of `key` and mark it as just used; None where there is none or a damaged one (removed)."""
        path = self._path(key.digest)
        if path.exists() and not path.is_file():  # a FIFO would never answer
            raise CacheError(f"{path} is not a file; remove it, or choose another folder with --cache-dir")
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
        """Store frames (frames, height, width, 3), RGB uint8, then evict entries beyond the limit."""
        if self.max_bytes == 0:
            return
        write_entry(self._path(key.digest), key, frames, seconds)
        self._used.add(key.digest)
        self._evict(keep=key.digest)

    def get_or_render(self, key: BaselineKey, render: Callable[[], tuple[NDArray[np.uint8], float]]) -> Baseline:
        """Read the video of `key`, or render and store it; concurrent processes render it once.

        `render` returns frames as `put` takes them, and the seconds they took. A video that can't be stored (a full
        disk) is still used, with a warning, because rendering is expensive.

        Raises:
            CacheError: the folder can't be used (raised before anything is rendered).
        """
        with exclusive(self._lock(key.digest), what=f"the dense video of {key.prompt!r}"):
            found = self.get(key)
            if found is not None:
                return found
            frames, seconds = render()
            try:
                self.put(key, frames, seconds)
            except SparsetuneError as error:
                _LOG.warning("the dense video of %r is not cached: %s", key.prompt, error)
            frames.setflags(write=False)
            return Baseline(frames, seconds, cached=False)

    def ls(self) -> tuple[CacheEntry, ...]:
        return tuple(sorted(self._entries(), key=lambda entry: entry.last_used, reverse=True))

    def clear(self) -> Cleared:
        """Remove every entry that no other process is using, and temporary files of dead processes."""
        removed = removed_bytes = in_use = 0
        for entry in self._entries():
            if self._remove(entry.path):
                removed += 1
                removed_bytes += entry.size_bytes
            else:
                in_use += 1
        self._remove_temporaries()
        return Cleared(removed, removed_bytes, in_use)

    def _evict(self, keep: str) -> None:
        entries = sorted(self._entries(), key=lambda entry: entry.last_used)
        total = sum(entry.size_bytes for entry in entries)
        for entry in entries:
            if total <= self.max_bytes:
                break
            if entry.digest == keep or not self._remove(entry.path):
                continue
            total -= entry.size_bytes
            if entry.digest in self._used:
                _LOG.warning(
                    "cache.max_gb of %.3g GB is too small for this run's dense videos, so they will be rendered "
                    "again; raise it",
                    self.max_bytes / 1e9,
                )
                self._used.clear()
        self._remove_temporaries()

    def _remove(self, path: Path) -> bool:
        with exclusive_if_free(self._lock(path.stem)) as free:
            if free:
                path.unlink(missing_ok=True)
            return free

    def _remove_temporaries(self) -> None:
        for path, _ in _regular_files(self.folder, _TEMPORARY):
            remove_if_left(path)

    def _entries(self) -> Iterator[CacheEntry]:
        for path, status in _regular_files(self.folder, _ENTRY):
            with contextlib.suppress(FileNotFoundError):  # removed by another process meanwhile
                info = read_info(path)
                if info is not None and info.digest == path.stem:
                    yield CacheEntry(info.digest, info, status.st_size, status.st_mtime, path)

    def _path(self, digest: str) -> Path:
        return self.folder / f"{digest}.npz"

    def _lock(self, digest: str) -> Path:
        return self.folder / "locks" / f"{digest}.lock"


def _regular_files(folder: Path, name: re.Pattern[str]) -> Iterator[tuple[Path, os.stat_result]]:
    """Find the files of exactly this name in a folder; neither folders nor links, even to files."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if name.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):  # removed by another process meanwhile
                status = path.lstat()
                if stat.S_ISREG(status.st_mode):
                    yield path, status


def canonical_hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_entry(path: Path, key: BaselineKey, frames: NDArray[np.uint8], seconds: float) -> None:
    """Write an entry atomically, as a zip that `numpy.load` reads.

    Level 1 packs rendered video to about two thirds at over 50 MB/s; higher levels gain little.
    """
    frames = np.ascontiguousarray(frames, dtype=np.uint8)
    digest, sha256, created = key.digest, _sha256(frames), time.time()
    info = EntryInfo(
        key=asdict(key), digest=digest, shape=frames.shape, sha256=sha256, seconds=seconds, created=created
    )
    with (
        atomic_path(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
    ):
        archive.writestr(_INFO, info.model_dump_json())
        with archive.open(_FRAMES, "w", force_zip64=True) as member:
            np.lib.format.write_array(member, frames, allow_pickle=False)


def read_info(path: Path) -> EntryInfo | None:
    """Read an entry's metadata from the head of its file, also of one that was cut off; None for any other file."""
    try:
        with path.open("rb") as file:
            head = file.read(_MAX_INFO_BYTES)
        signature, method, packed, name_bytes, extra_bytes = struct.unpack_from("<4s4xH8xI4xHH", head)
        start = _ZIP_HEADER_BYTES + name_bytes + extra_bytes
        is_ours = signature == b"PK\x03\x04" and method == zipfile.ZIP_DEFLATED
        if not is_ours or head[_ZIP_HEADER_BYTES:][:name_bytes] != _INFO.encode():
            return None
        text = zlib.decompressobj(-zlib.MAX_WBITS).decompress(head[start : start + packed], _MAX_INFO_BYTES)
        return EntryInfo.model_validate_json(text)
    except (struct.error, zlib.error, ValueError, PermissionError):
        return None


def read_entry(path: Path, key: BaselineKey) -> tuple[NDArray[np.uint8], EntryInfo]:
    """Read an entry's frames, read-only, and metadata; its checksum and key are verified."""
    info = read_info(path)
    if info is None:
        raise DamagedEntryError("its header is not an entry's")
    if info.digest != key.digest:
        raise DamagedEntryError("it belongs to another key")
    with _opened(path) as archive, archive.open(_FRAMES) as member:
        np.lib.format.read_magic(member)
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
        if dtype != np.uint8 or shape != info.shape:
            raise DamagedEntryError("its frames have another shape")
        content = member.read(math.prod(shape))
    frames = np.frombuffer(content, np.uint8)
    if frames.size != math.prod(info.shape) or _sha256(frames) != info.sha256:
        raise DamagedEntryError("its checksum does not match")
    return frames.reshape(info.shape), info


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError, NotImplementedError) as error:
        # ValidationError is a ValueError; KeyError is a missing member; NotImplementedError an odd zip version
        raise DamagedEntryError(" ".join(str(error).split())[:200]) from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # of a seek to before the file, where a damaged directory points
            raise
        raise DamagedEntryError("its zip directory points outside of it") from error


def _sha256(frames: NDArray[np.uint8]) -> str:
    return hashlib.sha256(np.ascontiguousarray(frames).data).hexdigest()
