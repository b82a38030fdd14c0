"""Writing of the HTML report, with videos embedded or beside it."""

from collections.abc import Callable, Mapping
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


def check_extra() -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ReportError(f"reports need {', '.join(missing)}; run: pip install 'sparsetune[report]'")


def report_beside(make: Callable[[], Source], folder: Path) -> str:
    """Write a folder's report.html and return its path, or why it isn't there: no chart may fail a run."""
    try:
        return str(build_report(make(), folder / "report.html").path)
    except Exception as error:
        return f"not written: {' '.join(str(error).split()) or type(error).__name__}"


LIMIT: Final = 25_000_000  # bytes of a report's file


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

    Where embedding the videos would exceed `LIMIT`, those from before tuning are left out, and if that isn't enough all
    are put beside the file; the report and the note say so. Videos beside the file are linked by `links` (URLs by
    path), or else copied beside it, unless they are under its folder.
    """
    check_extra()
    clips, texts = find_clips(source), words(language)
    chosen, note = None, ""
    if videos == "embed":
        chosen = embedded(clips, LIMIT - len(render(source, (), texts).encode()) - 100_000)
        if chosen is None or len(chosen) < len(clips):
            note = texts("videos.too_large" if chosen is None else "videos.left_out", limit=LIMIT // 1_000_000)
    if chosen is None:
        chosen = beside(clips, path, links or {})
    text = render(source, chosen, texts, note)
    write_text(path, text)
    return Report(path, len(text.encode()), note)
