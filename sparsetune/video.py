"""Video files and images for viewing: encoded, and side by side."""

import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from sparsetune import ffmpeg
from sparsetune.decoding import Frames, binary
from sparsetune.errors import VideoError
from sparsetune.files import atomic_path

DIFFERENCE_GAIN = 4  # on |sparse - dense| in the difference pane
MIN_PANE_WIDTH = 256

_FILTER = (
    "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int,format=yuv420p,"
    "setparams=color_primaries=bt709:color_trc=bt709"
)
_ENCODE = (
    "-vf", _FILTER, "-c:v", "libx264", "-movflags", "+faststart", "-colorspace", "bt709", "-color_range", "tv",
)  # fmt: skip
_GAP = 4
_STRIP = 24
_FONT_SIZE = 15


@dataclass(frozen=True)
class Encoding:
    """Options of x264: a lower `quality` (its constant rate factor) is finer and larger."""

    quality: int = 16  # keeps small differences between dense and sparse
    preset: str = "medium"


SMALL = Encoding(23, "veryfast")
"""A third of the time of the default, and two thirds of the bytes."""


def write_video(path: Path | str, frames: Frames, fps: float, encoding: Encoding | None = None) -> None:
    """Write uint8 RGB frames (frames, height, width, 3) atomically as an mp4: H.264, yuv420p, BT.709, faststart.

    yuv420p stores colour for 2 x 2 pixels, so it has no odd sizes. An odd side's last row or column is repeated, and
    the true size is stored in the file's comment, to which `sparsetune.decoding` crops; nothing is scaled. Other
    players show the repeated line.
    """
    path = Path(path)
    _check_writable(path, frames, fps)
    height, width = frames.shape[1:3]
    odd = (height % 2, width % 2)
    rate = Fraction(fps).limit_denominator(1001)  # 23.976 and its like are 24000/1001: keeps the time base exact
    source = f"-f rawvideo -pix_fmt rgb24 -s {width + odd[1]}x{height + odd[0]} -r {rate} -i pipe:0".split()
    x264 = encoding or Encoding()
    quality = ("-preset", x264.preset, "-crf", str(x264.quality))
    note = ("-metadata", f"comment=sparsetune-size={width}x{height}") if any(odd) else ()
    padding = ((0, odd[0]), (0, odd[1]), (0, 0))
    with atomic_path(path) as temporary:
        done = ffmpeg.run(
            binary(),
            ("-y", *source, *_ENCODE, *quality, *note, "-f", "mp4", str(temporary.absolute())),
            feed=(np.ascontiguousarray(np.pad(frame, padding, mode="edge")).data for frame in frames),
        )
        if done.status != 0:
            raise VideoError(
                f"cannot encode {path}: {done.reason}; "
                "free some space, or use an ffmpeg with libx264 (pip install --upgrade imageio-ffmpeg)"
            )


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
