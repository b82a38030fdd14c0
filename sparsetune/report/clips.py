"""The videos of a report: inside its file, or beside it."""

import base64
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from sparsetune.evaluation.result import EvaluationResult
from sparsetune.files import atomic_path
from sparsetune.report.source import Files, Source
from sparsetune.video import panes

Side = Literal["after", "before"]
Videos = Literal["embed", "beside"]


@dataclass(frozen=True)
class Clip:
    """A prompt's side-by-side video, which holds its dense and its sparse one frame by frame.

    Args:
        side: whose: the judged policy's, or the default thresholds' before it.
        index: the prompt's.
        path: the file.
        href: where the page finds it; None where it is inside.
    """

    side: Side
    index: int
    path: Path
    href: str | None = None

    @property
    def key(self) -> str:
        """Name it within the page, e.g. `after-3`."""
        return f"{self.side}-{self.index}"

    @property
    def size(self) -> int:
        """Bytes that it takes inside the page, as base64."""
        return -(-self.path.stat().st_size // 3) * 4

    def encoded(self) -> str:
        """Give it as base64."""
        return base64.b64encode(self.path.read_bytes()).decode("ascii")


def find_clips(source: Source) -> tuple[Clip, ...]:
    """List the videos that there are, the judged policy's first."""
    sides: tuple[tuple[Side, Files], ...] = (("after", source.files), ("before", source.files_before))
    return tuple(Clip(side, index, path) for side, files in sides for index, path in files.videos.items())


def embedded(clips: Sequence[Clip], room: int) -> tuple[Clip, ...] | None:
    """Choose the videos to put inside the page; None where not even the judged policy's fit.

    Args:
        clips: all of them.
        room: bytes that they may take.
    """
    for chosen in (tuple(clips), tuple(clip for clip in clips if clip.side == "after")):
        if sum(clip.size for clip in chosen) <= room:
            return chosen
    return None


def beside(clips: Sequence[Clip], page: Path, links: Mapping[Path, str]) -> tuple[Clip, ...]:
    """Link the videos from the page; those that don't lie under its folder are copied to one beside it.

    Args:
        clips: the videos.
        page: the page's file.
        links: of videos that will be elsewhere; neither looked for nor copied.

    Raises:
        SparsetuneError: the folder can't be written.
    """
    return tuple(replace(clip, href=links.get(clip.path) or _href(clip, page)) for clip in clips)


def pane_boxes(result: EvaluationResult) -> list[list[int]]:
    """Say where the dense and the sparse video lie in the side-by-side one: left, top, width, height of each."""
    places = panes(result.config.height, result.config.width, 2)
    return [[place.left, place.top, place.width, place.height] for place in places]


def _href(clip: Clip, page: Path) -> str:
    file, folder = clip.path.resolve(), page.resolve().parent
    if not file.is_relative_to(folder):
        copied = folder / f"{page.stem}_videos" / f"{clip.side}_{clip.path.name}"
        with atomic_path(copied) as temporary:
            shutil.copyfile(file, temporary)
        file = copied
    return quote(Path(os.path.relpath(file, folder)).as_posix())
