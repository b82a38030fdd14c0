"""Progress on stderr: a bar with time left on a terminal, plain lines elsewhere."""

import time

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sparsetune.cli.terminal import stderr_console


class ProgressBar:
    """A bar that counts steps of work, and lines above it.

    Args:
        console: where to draw; stderr where None.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or stderr_console()
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._started = time.monotonic()
        self._done = 0
        self._total: int | None = None

    def start(self, text: str, total: int | None) -> None:
        """Begin with `total` steps; None where nobody knows."""
        self._started, self._done, self._total = time.monotonic(), 0, total
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._task = self._progress.add_task(escape(text), total=total)
            self._progress.start()

    def advance(self, steps: int = 1, text: str | None = None) -> None:
        """Count steps that were worked on, and say what is being done."""
        self._done += steps
        if self._progress is not None:
            self._progress.update(self._task, advance=steps, description=escape(text) if text else None)

    def skip(self, steps: int) -> None:
        """Take steps out that cost no time (a cached video), so that the time left stays honest."""
        if self._total is not None:
            self._total -= steps
            if self._progress is not None:
                self._progress.update(self._task, total=self._total)

    def line(self, text: str) -> None:
        """Print a line that stays, above the bar."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """End the bar; nothing of it stays on the screen."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    @property
    def time_left(self) -> str:
        """The time left at the pace so far, e.g. `2:05`; empty where it can't be told."""
        if not self._done or self._total is None or self._total <= self._done:
            return ""
        seconds = (time.monotonic() - self._started) / self._done * (self._total - self._done)
        return clock(seconds)


def clock(seconds: float) -> str:
    """Write seconds as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
