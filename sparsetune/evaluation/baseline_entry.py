"""One entry of the dense baselines' cache: its key, and its file."""

import contextlib
import hashlib
import json
import time
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from sparsetune.files import atomic_path

_FRAMES = "frames.npy"
_INFO = "entry.json"
_FORMAT = 1
"""Raised when what is stored, or how the renderer makes pixels, changes: older entries are then not found."""


@dataclass(frozen=True)
class BaselineKey:
    """Exactly what decides the pixels of a dense video.

    Where weights rest (offload), how many videos the VAE decodes at once (slicing), the frame rate and the
    threads in use are left out: the video is the same.

    Args:
        source: the model: `demo`, a folder or a hub id.
        revision: the hub's revision; None for a folder.
        fingerprint: hash of the model's weights.
        pipeline_class: the pipeline's class name.
        prompt: the text.
        negative_prompt: the text that guidance steers away from.
        seed: of the initial noise.
        num_frames: frames of the video.
        height: in pixels.
        width: in pixels.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance.
        max_sequence_length: text tokens; None for the model's own.
        scheduler: the scheduler's class and a hash of its configuration.
        dtype: of the weights.
        device: the kind of device, by name for an accelerator.
        vae_tiling: whether the VAE decodes in tiles, whose seams are blended.
        versions: (package, version) of all that computes: torch, diffusers, transformers.
        image: hash of the image that the video starts from; None where there is none.
        guidance_scale_2: guidance of a second transformer; None where it is the first's.
    """

    source: str
    revision: str | None
    fingerprint: str
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
    scheduler: str
    dtype: str
    device: str
    vae_tiling: bool
    versions: tuple[tuple[str, str], ...]
    image: str | None = None
    guidance_scale_2: float | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of the key as canonical JSON, in hexadecimal: the entry's address."""
        fields = asdict(self)
        for later in ("image", "guidance_scale_2"):  # entries from before there were such keep their address
            if fields[later] is None:
                del fields[later]
        return canonical_hash({"format": _FORMAT, **fields})


class EntryInfo(BaseModel):
    """What is kept beside the frames of an entry.

    Args:
        key: the fields of its `BaselineKey`, readable.
        digest: its address.
        shape: (frames, height, width, 3).
        sha256: of the frames' bytes.
        seconds: what the rendering took.
        created: seconds since the epoch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: dict[str, Any]
    digest: str
    shape: tuple[int, ...]
    sha256: str
    seconds: float
    created: float


class DamagedEntryError(Exception):
    """An entry's file is not what was written; internal to the cache, which renders it again."""


def canonical_hash(value: Any) -> str:
    """SHA-256, in hexadecimal, of `value` as JSON with sorted keys and no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_entry(path: Path, key: BaselineKey, frames: NDArray[np.uint8], seconds: float) -> None:
    """Write an entry: a zip that `numpy.load` reads, whole or not at all.

    Level 1 packs rendered video to about two thirds at over 50 MB a second; higher levels gain little.
    """
    frames = np.ascontiguousarray(frames, dtype=np.uint8)
    info = EntryInfo(
        key=asdict(key),
        digest=key.digest,
        shape=frames.shape,
        sha256=_sha256(frames),
        seconds=seconds,
        created=time.time(),
    )
    with (
        atomic_path(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
    ):
        archive.writestr(_INFO, info.model_dump_json())
        with archive.open(_FRAMES, "w", force_zip64=True) as member:
            np.lib.format.write_array(member, frames, allow_pickle=False)


def read_info(path: Path) -> EntryInfo:
    """Read what an entry says of itself, without its frames.

    Raises:
        FileNotFoundError: there is no such entry.
        DamagedEntryError: it can't be read.
    """
    with _opened(path) as archive:
        return EntryInfo.model_validate_json(archive.read(_INFO))


def read_entry(path: Path, key: BaselineKey) -> tuple[NDArray[np.uint8], EntryInfo]:
    """Read an entry and check it: its frames by their checksum, its key against `key`.

    Returns:
        Frames (frames, height, width, 3), RGB uint8, read-only; and what the entry says of itself.

    Raises:
        FileNotFoundError: there is no such entry.
        DamagedEntryError: it can't be read, or isn't what was written.
    """
    with _opened(path) as archive:
        info = EntryInfo.model_validate_json(archive.read(_INFO))
        with archive.open(_FRAMES) as member:
            frames: NDArray[np.uint8] = np.lib.format.read_array(member, allow_pickle=False)
    if info.digest != key.digest:
        raise DamagedEntryError("it belongs to another key")
    if frames.dtype != np.uint8 or frames.shape != info.shape or _sha256(frames) != info.sha256:
        raise DamagedEntryError("its checksum does not match")
    frames.setflags(write=False)
    return frames, info


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError, NotImplementedError) as error:
        # ValidationError is a ValueError; KeyError is a missing member; NotImplementedError an odd zip version
        raise DamagedEntryError(" ".join(str(error).split())[:200]) from error


def _sha256(frames: NDArray[np.uint8]) -> str:
    return hashlib.sha256(np.ascontiguousarray(frames).data).hexdigest()
