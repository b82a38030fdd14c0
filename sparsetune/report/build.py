"""The making of a report: its file, with the videos inside or beside it."""

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
"""What the extra `report` installs."""


def check_extra() -> None:
    """Check that reports can be made here.

    Raises:
        ReportError: a package is missing.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ReportError(
            f"a report must have {', '.join(NEEDED)}, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not installed; run: pip install 'sparsetune[report]'"
        )


LIMIT: Final = 25_000_000
"""Bytes that a report's file is kept under."""


@dataclass(frozen=True)
class Report:
    """A report that was written.

    Args:
        path: the file.
        num_bytes: its size.
        note: what became of the videos where that isn't what was asked for; empty otherwise.
    """

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
    """Write a report, whole or not at all.

    Args:
        source: what is told of.
        path: the HTML file.
        language: of the report.
        videos: inside the file, or beside it. Where the file would exceed `LIMIT` with them inside, those from before
            the tuning are left out, and where that isn't enough all lie beside it; the report and the note say so.
        links: where videos that lie beside the file will be found from it; others are copied beside it, unless they
            lie in its folder already.

    Raises:
        ReportError: the extra `report` is missing.
        SparsetuneError: the file can't be written.
    """
    check_extra()
    clips, said = find_clips(source), words(language)
    chosen, note = clips, ""
    if videos == "embed":
        room = LIMIT - len(render(source, (), said).encode()) - 100_000
        inside = embedded(clips, room)
        if inside is None:
            note = said("videos.too_large", limit=LIMIT // 1_000_000)
        elif len(inside) < len(clips):
            note = said("videos.left_out", limit=LIMIT // 1_000_000)
        chosen = beside(clips, path, links or {}) if inside is None else inside
    else:
        chosen = beside(clips, path, links or {})
    text = render(source, chosen, said, note)
    write_text(path, text)
    return Report(path, len(text.encode()), note)
