"""A frame of a live view: lines that fit the terminal, whatever its size."""

from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment

WIDEST = 110
"""Columns that are used at most: longer lines are hard to follow."""


class Frame:
    """Draws renderables below each other, in fewer lines than the terminal has and without blanks at their ends.

    Lines that are as short as can be are not broken when the terminal is made narrower.

    Args:
        rows: what to draw, from the top; those at the end are left out where there is no room.
    """

    def __init__(self, rows: Sequence[RenderableType]) -> None:
        self._rows = rows
        self.widths: tuple[int, ...] = ()
        """Of the lines as they were drawn last."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw it."""
        narrow = options.update(width=max(1, min(WIDEST, options.max_width - 1)), height=None)
        lines = [_shortened(line) for row in self._rows for line in console.render_lines(row, narrow, pad=False)]
        lines = lines[: max(1, options.size.height - 1)]
        if options.ascii_only:
            lines = [[Segment(_ascii(text), style, control) for text, style, control in line] for line in lines]
        self.widths = tuple(Segment.get_line_length(line) for line in lines)
        for number, line in enumerate(lines):
            if number:
                yield Segment.line()
            yield from line


def _ascii(text: str) -> str:
    return text.replace("…", ".").encode("ascii", "replace").decode()


def _shortened(line: list[Segment]) -> list[Segment]:
    kept = list(line)
    while kept and not kept[-1].text.strip() and not kept[-1].control:
        kept.pop()
    if kept:
        kept[-1] = Segment(kept[-1].text.rstrip(), kept[-1].style, kept[-1].control)
    return kept
