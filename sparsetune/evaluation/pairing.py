"""Pairs of video files, dense and sparse, from two files or folders."""

import os
from pathlib import Path

from sparsetune.errors import VideoError
from sparsetune.files import similar_path

SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".ts", ".m2ts", ".wmv", ".flv", ".ogv"}
    | {".y4m", ".3gp", ".mxf", ".nut", ".png", ".apng", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm"}
    | {".pgm", ".jp2", ".jxl", ".avif", ".exr", ".dpx"}
)
"""Names of videos and pictures in folders; a file that is named itself may have any."""


def pairs(dense: Path, sparse: Path) -> tuple[tuple[str, Path, Path], ...]:
    """Return name, dense and sparse file of every pair: two files, or two folders' files.

    Where one folder has files `NAME_dense` and the other `NAME_sparse`, as `eval` writes, these are paired; else files
    of the same name. Both may be one folder.
    """
    for path in (dense, sparse):
        if not path.exists():
            raise VideoError(f"no video file or folder at {path}{similar_path(path)}", is_usage=True)
    if dense.is_dir() != sparse.is_dir():
        kinds = ["a folder" if path.is_dir() else "a file" for path in (dense, sparse)]
        raise VideoError(f"pass two files or two folders; {dense} is {kinds[0]} and {sparse} {kinds[1]}")
    if not dense.is_dir():
        return ((shown(dense.name), dense, sparse),)
    left, right = _named(dense, "_dense"), _named(sparse, "_sparse")
    if not (left and right):
        left, right = _named(dense), _named(sparse)
    if not left and not right:
        raise VideoError(f"no videos or pictures in {dense} and {sparse}")
    if left.keys() != right.keys():
        raise VideoError(f"the folders must hold videos of the same names; {_lacking(dense, sparse, left, right)}")
    return tuple((shown(name), left[name], right[name]) for name in left)


def shown(path: Path | str) -> str:
    """A path as valid Unicode: bytes of a name that are not UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _named(folder: Path, ending: str = "") -> dict[str, Path]:
    """Videos by name without that ending of their stem; only those that have it."""
    return {
        path.stem.removesuffix(ending) + path.suffix: path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in SUFFIXES and path.stem.endswith(ending) and path.name[0] != "." and path.is_file()
    }


def _lacking(dense: Path, sparse: Path, left: dict[str, Path], right: dict[str, Path]) -> str:
    lacks = [
        f"{folder} lacks {', '.join(sorted(names)[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        for folder, names in ((sparse, left.keys() - right.keys()), (dense, right.keys() - left.keys()))
        if names
    ]
    return " and ".join(lacks)
