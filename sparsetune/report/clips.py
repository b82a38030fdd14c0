"""Videos of a report, embedded or beside its file."""

import base64
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from sparsetune.files import atomic_path
from sparsetune.report.source import Files, Source

Side = Literal["after", "before"]
Videos = Literal["embed", "beside"]


@dataclass(frozen=True)
class Clip:
    """Side-by-side video of a prompt, before or after tuning; `href` is None where it is embedded."""

    side: Side
    index: int
    path: Path
    href: str | None = None

    @property
    def key(self) -> str:
        return f"{self.side}-{self.index}"

    @property
    def size(self) -> int:
        """Embedded size in bytes, as base64."""
        return -(-self.path.stat().st_size // 3) * 4

    def encoded(self) -> str:
        return base64.b64encode(self.path.read_bytes()).decode("ascii")


def find_clips(source: Source) -> tuple[Clip, ...]:
    sides: tuple[tuple[Side, Files], ...] = (("after", source.files), ("before", source.files_before))
    return tuple(Clip(side, index, path) for side, files in sides for index, path in files.videos.items())


def embedded(clips: Sequence[Clip], max_bytes: int) -> tuple[Clip, ...] | None:
    """Choose the videos that fit into `max_bytes`: all, or those after tuning; None where not even these fit."""
    for chosen in (tuple(clips), tuple(clip for clip in clips if clip.side == "after")):
        if sum(clip.size for clip in chosen) <= max_bytes:
            return chosen
    return None


def beside(clips: Sequence[Clip], page: Path, links: Mapping[Path, str]) -> tuple[Clip, ...]:
    """Link the videos by `links`, or by their path under the page's folder, to which others are copied."""
    return tuple(replace(clip, href=links.get(clip.path) or _href(clip, page)) for clip in clips)


def _href(clip: Clip, page: Path) -> str:
    file, folder = clip.path.resolve(), page.resolve().parent
    if not file.is_relative_to(folder):
        copied = folder / f"{page.stem}_videos" / f"{clip.side}_{clip.path.name}"
        with atomic_path(copied) as temporary:
            shutil.copyfile(file, temporary)
        file = copied
    return quote(Path(os.path.relpath(file, folder)).as_posix())
