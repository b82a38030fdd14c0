"""Where a command's progress goes: to a live view on a terminal, to its log elsewhere."""

import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from rich.console import Console

from sparsetune.cli.live.memory import read_memory
from sparsetune.cli.live.parts import left_text, percent
from sparsetune.cli.live.phase import Phase
from sparsetune.cli.live.time_left import TimeLeft
from sparsetune.cli.live.view import Draw, LiveView
from sparsetune.cli.log import Log, LogFormat
from sparsetune.cli.terminal import stderr_console

Clock = Callable[[], float]

PULSE_SECONDS: Final[Mapping[LogFormat, float]] = {"text": 60.0, "json": 10.0}
"""How often a log is told how far the work has come, at most."""


class Outlet:
    """Shows progress.

    Args:
        log: of the command.
        draw: gives the rows of the live view.
        console: of stderr; None makes one.
        clock: gives seconds.
    """

    def __init__(self, log: Log, draw: Draw, console: Console | None = None, clock: Clock = time.monotonic) -> None:
        self.clock = clock
        self._log = log
        console = console or stderr_console()
        self._view = LiveView(console, draw) if can_be_live(log, console) else None
        self._pulsed = clock()

    @property
    def is_live(self) -> bool:
        """Whether progress is drawn."""
        return self._view is not None

    def start(self) -> None:
        """Begin to draw, where that can be."""
        if self._view is not None:
            self._view.start()

    def stop(self, *, keep: bool = False) -> None:
        """End the view; `keep` leaves on the screen what was drawn last."""
        if self._view is not None:
            self._view.stop(keep=keep)

    def say(self, event: str, message: str, **fields: Any) -> None:
        """Say an event that the view, where there is one, shows by itself."""
        if self._view is None:
            self._log.say(event, message, **fields)

    def pulse(self, phase: Phase | None, left: Callable[[float], TimeLeft]) -> None:
        """Say how far the work has come, where that is due and nothing is drawn.

        Args:
            phase: the one in hand.
            left: estimates what is left at a time.
        """
        now = self.clock()
        if phase is None or phase.pace(now) is None or self._view is not None:
            return
        if now - self._pulsed < PULSE_SECONDS[self._log.format]:
            return
        self._pulsed = now
        estimate, memory = left(now), read_memory()
        name, fraction = phase.name, phase.fraction
        self._log.say(
            "progress",
            f"{name} {percent(fraction)}, left: {left_text(estimate, name)}",
            phase=name,
            fraction=fraction,
            seconds_left_phase=estimate.phase,
            seconds_left=estimate.total,
            estimated_by=estimate.basis,
            process_memory_gib=memory.process,
            gpu_memory_gib=memory.gpu,
        )


def can_be_live(log: Log, console: Console) -> bool:
    """Whether a view can be drawn: on a terminal that takes cursor movements, where text for people is wanted.

    `FORCE_COLOR` makes no terminal of a file, whatever it does to colours.
    """
    terminal = console.file.isatty() and not console.is_dumb_terminal and not console.is_jupyter
    return terminal and log.format == "text" and not log.quiet
