"""Markdown's small parts: tables, cells, numbers, links."""

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table; cells must be escaped already, see `cell`."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(text: str) -> str:
    """Put any text on one line of a table."""
    escaped = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    return escaped.replace("<", "&lt;").replace("*", "\\*").replace("`", "\\`")


def number(value: float | None, scale: float | None = None) -> str:
    """Print a figure: two decimals from 10 on, four below; as many as `scale` would have where it is given."""
    return "" if value is None else f"{value:.{_decimals(value if scale is None else scale)}f}"


def difference(value: float, scale: float) -> str:
    """Print a difference of figures that are about as large as `scale`, with its sign and as many decimals as they."""
    return f"{value:+.{_decimals(scale)}f}"


def _decimals(value: float) -> int:
    return 2 if abs(value) >= 10 else 4


def relative(path: Path, folder: Path) -> str:
    """Give the link from a file in `folder` to `path`."""
    return quote(Path(os.path.relpath(path, folder)).as_posix())
