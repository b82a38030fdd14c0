"""A view that is drawn over and over at the bottom of a terminal, below whatever else is written to it."""

from collections.abc import Callable, Sequence

from rich.console import Console, RenderableType
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType

from sparsetune.cli.live.frame import WIDEST, Frame

Draw = Callable[[int, int], Sequence[RenderableType]]
"""Gives the rows of a view for a terminal of so many columns and lines."""

_PER_SECOND = 4


class LiveView:
    """Draws on a terminal until it is stopped, several times a second.

    Args:
        console: of the terminal; one that leaves the cursor visible leaves nothing to be put right where the process is
            killed or suspended.
        draw: gives what to draw.
    """

    def __init__(self, console: Console, draw: Draw) -> None:
        self._console = console
        self._draw = draw
        self._frame = Frame(())
        self._width = console.width
        self._live: Live | None = None

    def start(self) -> None:
        """Begin to draw."""
        if self._live is None:
            self._live = Live(
                console=self._console,
                get_renderable=self._next,
                refresh_per_second=_PER_SECOND,
                redirect_stdout=False,  # that is the result's, and may be a file
            )
            self._live.start(refresh=True)

    def refresh(self) -> None:
        """Draw now."""
        if self._live is not None:
            self._live.refresh()

    def stop(self, *, keep: bool = False) -> None:
        """End it; what was drawn last stays on the screen if it is to be kept."""
        live, self._live = self._live, None
        if live is not None:
            live.transient = not keep
            live.stop()

    def _next(self) -> RenderableType:
        """Give the next frame, after what a terminal made narrower has broken of the last one was wiped away."""
        size = self._console.size
        if size.width < self._width:
            broken = sum(-(-width // size.width) - 1 for width in self._frame.widths if width)
            up = ((ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)) * broken
            self._console.control(Control(*up))
        self._width = size.width
        self._frame = Frame(self._draw(min(WIDEST, size.width - 1), size.height))
        return self._frame
