"""Video and picture files as they are stored: their properties, and their frames decoded some at a time."""

import contextlib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsetune import ffmpeg
from sparsetune.errors import VideoError

_LOG = logging.getLogger(__name__)

Frames = npt.NDArray[np.uint8]
DeepFrames = npt.NDArray[np.unsignedinteger[Any]]
"""uint8, or uint16 of files with more than 8 bits: 65535 is white."""

FLAGS = "accurate_rnd+full_chroma_int+full_chroma_inp+bicubic"
"""How swscale converts to RGB: to the nearest value, with chroma at full resolution, the same on every CPU."""

CHECKERBOARD = 8
"""Side in pixels of the black and white squares behind transparent pixels."""

_SLAB_BYTES = 1 << 24
_MAX_BYTES = 4 * 10**9
"""Of a video's frames in memory: a file of some kilobytes may ask for far more."""

_MP4_BOXES = b"ftyp moov mdat moof mfra free skip wide udta meta uuid styp sidx ssix emsg prft pdin".split()
_FIRST_FRAME = re.compile(
    r"frame_rate: (?P<rate>\d+)/(?P<per>\d+)[\s\S]*?"
    r"fmt:(?P<pixel_format>\S+) (?:cl:(?P<chroma_location>\S+) )?sar:\S+ s:(?P<width>\d+)x(?P<height>\d+)[\s\S]*?"
    r"color_range:(?P<range>\S+) color_space:(?P<matrix>\S+) color_primaries:(?P<primaries>\S+) color_trc:(?P<trc>\S+)"
)
_ROTATION = re.compile(r"display ?matrix: rotation of (-?[\d.]+)", re.IGNORECASE)
_TRUE_SIZE = re.compile(r"sparsetune-size=(\d+)x(\d+)")
_TIME = re.compile(r"\] n: *\d+ pts: *(-?\d+) ")
_ERROR = re.compile(r"^(?:\[[^\]]+ @ 0x\w+\] )?\[(?:error|fatal)\] ", re.MULTILINE)


@dataclass(frozen=True)
class Video:
    """A decoded video: uint8 RGB (frames, height, width, 3), read-only, and its frame rate in frames a second."""

    frames: Frames
    fps: float


@dataclass(frozen=True)
class VideoFile:
    """Properties of a file's first video stream; `unknown` are colour tags that it doesn't have.

    Sizes are those of upright frames in pixels: `height` and `width` without the line that `write_video` adds to odd
    sides, `stored_height` and `stored_width` with it. `rotation` is the display matrix's, in degrees. `is_variable` is
    whether its frame rate varies, once a `Decoder` has read it to the end.
    """

    path: Path
    height: int
    width: int
    stored_height: int
    stored_width: int
    fps: float
    pixel_format: str
    bit_depth: int
    has_alpha: bool
    chroma_location: str
    range: str
    matrix: str
    primaries: str
    transfer: str
    rotation: float
    is_variable: bool = False

    @property
    def is_padded(self) -> bool:
        """Whether `write_video` added a line to an odd side."""
        return (self.height, self.width) != (self.stored_height, self.stored_width)


def open_video(path: Path | str) -> VideoFile:
    """Read the properties of a video or picture file from its first frame; VideoError where it is none."""
    path = Path(path)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "doesn't exist"
        raise VideoError(f"{path} {found}; use the path of a video file")
    _check_whole(path)
    with _opened(path) as file:
        inspection = ("-map", "0:V:0", "-vf", "showinfo=checksum=0", "-frames:v", "1", "-f", "null", "-")
        done = ffmpeg.run(binary(), (*ffmpeg.source(file), *inspection), files=(file,))
    if "matches no streams" in done.log:
        raise VideoError(f"{path} has no video stream, of which a cover picture is none; use a video or picture file")
    found_frame = _FIRST_FRAME.search(done.log)
    if done.status != 0 or found_frame is None:
        raise _undecodable(path, done)
    first = found_frame.groupdict()
    size = int(first["height"]), int(first["width"])
    padded = _TRUE_SIZE.search(done.log)
    num_components, bit_depth = ffmpeg.pixel_formats(binary()).get(first["pixel_format"], (3, 8))
    rotation = _ROTATION.search(done.log)
    return VideoFile(
        path,
        *((int(padded[2]), int(padded[1])) if padded else size),
        *size,
        fps=int(first["rate"]) / int(first["per"]) if int(first["per"]) and int(first["rate"]) else 25.0,
        pixel_format=first["pixel_format"],
        bit_depth=bit_depth,
        has_alpha=num_components in (2, 4) or first["pixel_format"] == "pal8",
        chroma_location=first["chroma_location"] or "unknown",
        range=first["range"],
        matrix=first["matrix"],
        primaries=first["primaries"],
        transfer=first["trc"],
        rotation=float(rotation[1]) if rotation else 0.0,
    )


def read_video(path: Path | str) -> Video:
    """Decode a whole video file to 8 bits, every stored frame once.

    VideoError where it is damaged or truncated, or its frames take over 4 GB.
    """
    file = open_video(path)
    with Decoder(file) as decoder:
        slabs, size = [], 0
        while (slab := decoder.read(decoder.slab)).size:
            slabs.append(slab)
            size += slab.nbytes
            if size > _MAX_BYTES:
                raise VideoError(
                    f"{path} has frames of {file.width} x {file.height} that take over {_MAX_BYTES / 1e9:g} GB; cut it"
                )
        decoder.finish()
    whole = np.concatenate(slabs)
    whole.setflags(write=False)
    return Video(whole, file.fps)


class Decoder(contextlib.AbstractContextManager["Decoder"]):
    """Decodes a file from its first frame to its last, each stored frame once.

    Args:
        file: of `open_video`.
        bit_depth: above 8 gives uint16, whatever the file has; 8 gives uint8.
        slab: number of frames that `read` is best called with, about 16 MiB.
        num_frames: decoded so far.
    """

    def __init__(self, file: VideoFile, bit_depth: int = 8) -> None:
        self.file, self.bit_depth, self.num_frames = file, bit_depth, 0
        self._dtype = np.dtype("u1" if bit_depth <= 8 else "<u2")
        self._channels = 4 if file.has_alpha else 3
        self.slab = max(1, _SLAB_BYTES // (file.stored_height * file.stored_width * self._channels))
        form = {(3, 1): "rgb24", (4, 1): "rgba", (3, 2): "rgb48le", (4, 2): "rgba64le"}
        pixel_format = form[self._channels, self._dtype.itemsize]
        self._rest = contextlib.ExitStack()
        opened = self._rest.enter_context(_opened(file.path))
        # -xerror: a truncated file must fail instead of decoding partly. showinfo logs the time of each frame; the new
        # times after it never coincide, which the output would refuse.
        arguments = (
            *("-xerror", "-err_detect", "explode", *ffmpeg.source(opened), "-map", "0:V:0"),
            *("-vf", "showinfo=checksum=0,setpts=1000*N/TB", "-fps_mode", "passthrough", "-sws_flags", FLAGS),
            *("-pix_fmt", pixel_format, "-f", "rawvideo", "-"),
        )
        self._process = self._rest.enter_context(ffmpeg.Process(binary(), arguments, files=(opened,)))

    def __exit__(self, *_: object) -> None:
        self._rest.close()

    def read(self, count: int) -> DeepFrames:
        """Decode up to `count` frames as RGB (frames, height, width, 3); none after the last.

        Transparent pixels are shown over a checkerboard of black and white, as picture viewers do.
        """
        file = self.file
        frames = np.empty((count, file.stored_height, file.stored_width, self._channels), self._dtype)
        filled = self._process.read_into(frames.data.cast("B"))
        num_frames, rest = divmod(filled, frames[0].nbytes)
        if rest:
            raise _undecodable(file.path, self._process.wait())
        self.num_frames += num_frames
        cropped = frames[:num_frames, : file.height, : file.width]
        return over_checkerboard(cropped) if file.has_alpha else cropped

    def finish(self) -> VideoFile:
        """Check that the file was decoded to its end without an error, and return its completed properties."""
        while self.read(self.slab).size:
            pass
        done = self._process.wait()
        if done.status != 0 or self.num_frames == 0 or _ERROR.search(done.log):
            raise _undecodable(self.file.path, done)
        _check_gif(self.file.path, self.num_frames)
        gaps = np.diff(np.fromiter((int(found[1]) for found in _TIME.finditer(done.log)), np.int64))
        # A time base that is no multiple of the frame time rounds it up and down, by one tick each.
        return replace(self.file, is_variable=bool(gaps.size and gaps.max() - gaps.min() > 2))


def over_checkerboard(frames: DeepFrames) -> DeepFrames:
    """Composite RGBA (frames, height, width, 4) over squares of black and white, rounded to the nearest value."""
    peak = np.iinfo(frames.dtype).max
    colours, alpha = frames[..., :3], frames[..., 3:]
    if (alpha == peak).all():
        return np.ascontiguousarray(colours)
    y, x = np.ogrid[: frames.shape[1], : frames.shape[2]]
    board = ((y // CHECKERBOARD + x // CHECKERBOARD) % 2 * peak).astype(np.uint64)[..., None]
    shown: DeepFrames = np.empty(colours.shape, frames.dtype)
    for t, (colour, opacity) in enumerate(zip(colours, alpha, strict=True)):
        wide = opacity.astype(np.uint64)
        shown[t] = (colour * wide + board * (peak - wide) + peak // 2) // peak
    return shown


def binary() -> str:
    """Path of the ffmpeg binary, or VideoError."""
    found = ffmpeg.executable()
    if found is None:
        raise VideoError("no ffmpeg found; run: pip install imageio-ffmpeg, or point IMAGEIO_FFMPEG_EXE to a binary")
    return found


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise VideoError(f"cannot read {path}: {error.strerror}") from error
    with file:
        yield file


def _check_whole(path: Path) -> None:
    """Raise VideoError for an mp4 with a box that reaches past its end: cut between frames, it decodes without error.

    What follows the last box is no reason: players ignore it.
    """
    with _opened(path) as file:
        end, position = path.stat().st_size, 0
        is_mp4 = file.read(8)[4:] == b"ftyp"
        while is_mp4 and position < end:
            file.seek(position)
            header = file.read(16)
            size, kind = int.from_bytes(header[:4], "big"), header[4:8]
            is_known = bool(kind) and any(box.startswith(kind) for box in _MP4_BOXES)
            if size == 1:
                size = int.from_bytes(header[8:16], "big")
            elif size == 0 and is_known:  # a last box that lasts to the end, wherever that is
                size = end - position
            if not is_known and not 8 <= size <= end - position:
                _LOG.warning("%s has %d bytes after its last box, which are ignored", path, end - position)
                return
            position += max(size, 8)
    if position > end:
        raise VideoError(f"{path} is truncated: it has {end} of at least {position} bytes; copy or write it again")


def _check_gif(path: Path, num_frames: int) -> None:
    """Raise VideoError where ffmpeg took frames of a GIF without a delay of their own for one."""
    with _opened(path) as file:
        if file.read(4) != b"GIF8":
            return
    from PIL import Image

    with Image.open(path) as image:
        stored = getattr(image, "n_frames", 1)
    if stored != num_frames:
        raise VideoError(f"ffmpeg decodes {num_frames} of the {stored} frames of {path}; convert it to an mp4")


def _undecodable(path: Path, done: ffmpeg.CompletedRun) -> VideoError:
    return VideoError(f"ffmpeg can't decode {path}: {done.reason}; check that it is a complete video file")
