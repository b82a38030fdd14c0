"""Writing of the HTML report, with videos embedded or beside it."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from sparsetune.errors import ReportError
from sparsetune.files import write_text
from sparsetune.report.clips import Videos, beside, embedded, find_clips
from sparsetune.report.page import render
from sparsetune.report.source import Source
from sparsetune.report.words import Language, words

NEEDED: Final = ("jinja2", "matplotlib", "plotly")
"""Packages of the extra `report`."""


def check_extra() -> None:
    """Raise ReportError where a package of the extra is missing."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ReportError(f"reports need {', '.join(missing)}; run: pip install 'sparsetune[report]'")


LIMIT: Final = 25_000_000
"""Maximum size of a report's file in bytes."""


@dataclass(frozen=True)
class Report:
    """A written report; `note` says where the videos are if not where requested, else it is empty."""

    path: Path
    num_bytes: int
    note: str = ""


def build_report(
    source: Source,
    path: Path,
    language: Language = "en",
    videos: Videos = "embed",
    links: Mapping[Path, str] | None = None,
) -> Report:
    """Write a report atomically.

    Args:
        source: evaluations and tuning to report.
        path: of the HTML file.
        language: of the report.
        videos: embedded, or beside the file. Where embedding would exceed `LIMIT`, the videos from before tuning are
            left out, and if that isn't enough all are put beside the file; the report and the note say so.
        links: URLs of videos beside the file, by path; others are copied beside it, unless they are under its folder.

    Raises:
        ReportError: the extra `report` is missing.
        SparsetuneError: the file can't be written.
    """
    check_extra()
    clips, texts = find_clips(source), words(language)
    chosen, note = clips, ""
    if videos == "embed":
        room = LIMIT - len(render(source, (), texts).encode()) - 100_000
        inside = embedded(clips, room)
        if inside is None:
            note = texts("videos.too_large", limit=LIMIT // 1_000_000)
        elif len(inside) < len(clips):
            note = texts("videos.left_out", limit=LIMIT // 1_000_000)
        chosen = beside(clips, path, links or {}) if inside is None else inside
    else:
        chosen = beside(clips, path, links or {})
    text = render(source, chosen, texts, note)
    write_text(path, text)
    return Report(path, len(text.encode()), note)
