"""Video files and images for viewing: write, read, side by side.

Metrics are computed on frames before encoding; an mp4 is lossy (`sparsetune metrics` on files says so).
"""

import logging
import math
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from sparsetune import ffmpeg
from sparsetune.errors import VideoError
from sparsetune.files import atomic_path

_LOG = logging.getLogger(__name__)

Frames = npt.NDArray[np.uint8]

# x264's constant rate factor, which keeps small differences between dense and sparse; lower is finer and larger
QUALITY = 16
DIFFERENCE_GAIN = 4  # on |sparse - dense| in the difference pane
MIN_PANE_WIDTH = 256

_TRUE_SIZE = re.compile(r"sparsetune-size=(\d+)x(\d+)")
_MAX_BYTES = 4 * 10**9
"""Of a video's frames in memory: a file of some kilobytes may ask for far more."""

_Y4M_HEADER = re.compile(rb"YUV4MPEG2 W(\d+) H(\d+) F(\d+):(\d+) ")
_MP4_BOXES = b"ftyp moov mdat moof mfra free skip wide udta meta uuid styp sidx ssix emsg prft pdin".split()
_TO_RGB = ("-sws_flags", "accurate_rnd+full_chroma_int+full_chroma_inp+bicubic", "-pix_fmt", "rgb24")
_ENCODE = (
    "-vf scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int,format=yuv420p "
    f"-c:v libx264 -preset medium -crf {QUALITY} -movflags +faststart "
    "-colorspace bt709 -color_primaries bt709 -color_trc bt709 -color_range tv"
).split()
_ABOUT_OUTPUT = re.compile(r"^\[(?:rawvideo|out#|vost#)[^\]]*\] \[error\]", re.MULTILINE)
_GAP = 4
_STRIP = 24
_FONT_SIZE = 15


@dataclass(frozen=True)
class Video:
    """A decoded video: uint8 RGB (frames, height, width, 3), read-only, and its frame rate in frames a second."""

    frames: Frames
    fps: float


def write_video(path: Path | str, frames: Frames, fps: float) -> None:
    """Write uint8 RGB frames (frames, height, width, 3) atomically as an mp4: H.264, yuv420p, BT.709, faststart.

    yuv420p stores colour for 2 x 2 pixels, so it has no odd sizes. An odd side's last row or column is repeated, and
    the true size is stored in the file's comment, to which `read_video` crops; nothing is scaled. Other players show
    the repeated line.
    """
    path = Path(path)
    _check_writable(path, frames, fps)
    height, width = frames.shape[1:3]
    odd = (height % 2, width % 2)
    rate = Fraction(fps).limit_denominator(1001)  # 23.976 and its like are 24000/1001: keeps the time base exact
    source = f"-f rawvideo -pix_fmt rgb24 -s {width + odd[1]}x{height + odd[0]} -r {rate} -i pipe:0".split()
    note = ("-metadata", f"comment=sparsetune-size={width}x{height}") if any(odd) else ()
    padding = ((0, odd[0]), (0, odd[1]), (0, 0))
    with atomic_path(path) as temporary:
        done = ffmpeg.run(
            _binary(),
            ("-y", *source, *_ENCODE, *note, "-f", "mp4", str(temporary.absolute())),
            feed=(np.ascontiguousarray(np.pad(frame, padding, mode="edge")).data for frame in frames),
        )
        if done.status != 0:
            raise VideoError(
                f"cannot encode {path}: {done.reason}; "
                "free some space, or use an ffmpeg with libx264 (pip install --upgrade imageio-ffmpeg)"
            )


def read_video(path: Path | str) -> Video:
    """Decode a whole video file into memory, every stored frame once; VideoError where it is damaged or truncated."""
    path = Path(path)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "doesn't exist"
        raise VideoError(f"{path} {found}; use the path of an mp4")
    _check_whole(path)
    binary = _binary()
    source = ("-i", str(path.absolute()), "-map", "0:v:0")
    head = ffmpeg.run(binary, (*source, "-frames:v", "1", "-pix_fmt", "yuv444p", "-f", "yuv4mpegpipe", "-"))
    header = _Y4M_HEADER.match(head.output)
    if head.status != 0 or header is None:
        _raise_undecodable(path, head)
    width, height, rate, per = (int(number) for number in header.groups())
    # -xerror: a truncated file must fail instead of decoding partly.
    size = height * width * 3
    most = max(1, _MAX_BYTES // size)
    strictly = ("-xerror", "-err_detect", "explode", *source, "-fps_mode", "passthrough", "-frames:v", str(most + 1))
    body = ffmpeg.run(binary, (*strictly, *_TO_RGB, "-f", "rawvideo", "-"))
    if len(body.output) > most * size:
        raise VideoError(
            f"{path} has more than {most} frames of {width} x {height}, over {_MAX_BYTES / 1e9:g} GB; cut it"
        )
    if body.status != 0 or not body.output or len(body.output) % size:
        _raise_undecodable(path, body)
    _check_count(path, len(body.output) // size, body)
    frames = np.frombuffer(body.output, dtype=np.uint8).reshape(-1, height, width, 3)
    if true_size := _TRUE_SIZE.search(head.log):
        frames = frames[:, : int(true_size[2]), : int(true_size[1])]
    return Video(frames, rate / per)


def _check_writable(path: Path, frames: Frames, fps: float) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or frames.size == 0:
        raise VideoError(
            "frames must be uint8 (frames, height, width, 3) with at least one frame, "
            f"got {frames.dtype} of shape {frames.shape}"
        )
    if not (math.isfinite(fps) and fps > 0):
        raise VideoError(f"fps must be above 0 and finite, got {fps}")
    if path.suffix.lower() != ".mp4":
        raise VideoError(f"a video's path must end in .mp4, got {path}")


def _check_whole(path: Path) -> None:
    """Raise VideoError for an mp4 with a box that reaches past its end: cut between frames, it decodes without error.

    What follows the last box is no reason: players ignore it.
    """
    try:
        end, position = path.stat().st_size, 0
        with path.open("rb") as file:
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
    except OSError as error:
        raise VideoError(f"cannot read {path}: {error.strerror}") from error
    if position > end:
        raise VideoError(f"{path} is truncated: it has {end} of at least {position} bytes; copy or write it again")


def _check_count(path: Path, num_frames: int, done: ffmpeg.CompletedRun) -> None:
    """Raise VideoError where frames are missing or damaged; a complaint about their times alone is only logged."""
    stored, complains = num_frames, "[error]" in done.log
    if complains and len(_ABOUT_OUTPUT.findall(done.log)) != done.log.count("[error]"):
        _raise_undecodable(path, done)
    with path.open("rb") as file:
        is_gif = file.read(4) == b"GIF8"
    if is_gif:  # ffmpeg takes frames without a delay of their own for one
        from PIL import Image

        with Image.open(path) as image:
            stored = getattr(image, "n_frames", 1)
    elif complains:
        copy = ("-i", str(path.absolute()), "-map", "0:v:0", "-c", "copy", "-f", "framecrc", "-")
        stored = sum(not line.startswith(b"#") for line in ffmpeg.run(_binary(), copy).output.splitlines())
    if stored != num_frames:
        raise VideoError(f"ffmpeg decodes {num_frames} of the {stored} frames of {path}; convert it to an mp4")
    if complains:
        _LOG.warning("%s: ffmpeg reports %r; all %d frames were read", path, done.reason, num_frames)


def _raise_undecodable(path: Path, done: ffmpeg.CompletedRun) -> NoReturn:
    raise VideoError(f"ffmpeg can't decode {path}: {done.reason}; check that it is a complete video file")


def _binary() -> str:
    binary = ffmpeg.executable()
    if binary is None:
        raise VideoError("no ffmpeg found; run: pip install imageio-ffmpeg, or point IMAGEIO_FFMPEG_EXE to a binary")
    return binary


@dataclass(frozen=True)
class Pane:
    """Position and size of a video in a side-by-side video, in pixels from the top left corner."""

    left: int
    top: int
    width: int
    height: int


def panes(height: int, width: int, count: int) -> tuple[Pane, ...]:
    """Return the panes of `count` videos of one size in `side_by_side`, from left to right."""
    factor = max(1, math.ceil(MIN_PANE_WIDTH / width))
    step = width * factor + _GAP
    return tuple(Pane(index * step, _STRIP, width * factor, height * factor) for index in range(count))


def side_by_side(
    dense: Frames, sparse: Frames, labels: tuple[str, str] = ("dense", "sparse"), difference: bool = False
) -> Frames:
    """Place two videos of one shape, (frames, height, width, 3), side by side, dense left, each under its label.

    `difference` adds a third pane, |sparse - dense| amplified four times (clipped at white). Videos under 256 pixels
    wide are enlarged by the smallest integer factor that reaches it, without blending.
    """
    if dense.shape != sparse.shape or dense.ndim != 4 or dense.shape[-1] != 3 or dense.size == 0:
        raise VideoError(
            "videos side by side must have the same shape (frames, height, width, 3), got "
            f"{dense.shape} (dense) and {sparse.shape} (sparse)"
        )
    num_frames, height, width = dense.shape[:3]
    texts = [*labels, f"difference x{DIFFERENCE_GAIN}"] if difference else [*labels]
    places = panes(height, width, len(texts))
    factor, end = places[0].width // width, places[-1]
    canvas = np.zeros((num_frames, end.top + end.height, end.left + end.width, 3), dtype=np.uint8)
    for index, (text, place) in enumerate(zip(texts, places, strict=True)):
        columns = slice(place.left, place.left + place.width)
        canvas[:, : place.top, columns] = _label(text, place.width)
        for t in range(num_frames):
            shown = (dense[t], sparse[t])[index] if index < 2 else _amplified(dense[t], sparse[t])
            canvas[t, place.top :, columns] = shown.repeat(factor, axis=0).repeat(factor, axis=1)
    return canvas


def save_png(path: Path, image: Frames) -> None:
    """Write a uint8 RGB image (height, width, 3) atomically as PNG; the path ends in .png."""
    from PIL import Image

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or image.size == 0:
        raise VideoError(f"an image must be uint8 (height, width, 3), got {image.dtype} of shape {image.shape}")
    if path.suffix.lower() != ".png":
        raise VideoError(f"an image's path must end in .png, got {path}")
    with atomic_path(path) as temporary:
        Image.fromarray(np.ascontiguousarray(image)).save(temporary, format="PNG", optimize=True)


def _amplified(dense: Frames, sparse: Frames) -> Frames:
    distance = np.abs(np.subtract(sparse, dense, dtype=np.int16)) * DIFFERENCE_GAIN
    amplified: Frames = np.minimum(distance, 255).astype(np.uint8)
    return amplified


def _label(text: str, width: int) -> Frames:
    from PIL import Image, ImageDraw, ImageFont

    strip = Image.new("RGB", (width, _STRIP), (24, 24, 24))
    ImageDraw.Draw(strip).text((6, 3), text, fill=(255, 255, 255), font=ImageFont.load_default(_FONT_SIZE))
    return np.asarray(strip)
