"""The progress of one rendering."""

import time
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console, RenderableType
from rich.text import Text

from sparsetune.cli.clock import clock as clock_text
from sparsetune.cli.live.memory import read_memory
from sparsetune.cli.live.outlet import Clock, Outlet
from sparsetune.cli.live.parts import BarLine, Labelled, left_text, line, memory_rows, percent
from sparsetune.cli.live.phase import Phase
from sparsetune.cli.live.time_left import TimeLeft, pace_text
from sparsetune.cli.log import Log


class RenderingProgress:
    """Shows the denoising steps of a rendering, with the time left.

    Args:
        log: of the command.
        num_steps: that it will have.
        console: of stderr; None makes one.
        clock: gives seconds.
    """

    def __init__(self, log: Log, num_steps: int, console: Console | None = None, clock: Clock = time.monotonic) -> None:
        self.outlet = Outlet(log, self._draw, console, clock)
        self.phase = Phase("render", float(num_steps))

    def start(self) -> None:
        """Begin."""
        self.phase = self.phase.begin(self.outlet.clock(), self.phase.total)
        self.outlet.start()

    def step(self, step: int, _num_steps: int) -> None:
        """Count a step, from 1."""
        self.phase = replace(self.phase, done=float(step))
        self.outlet.pulse(self.phase, self._left)

    def close(self) -> None:
        """End the view."""
        self.outlet.stop()

    def _left(self, now: float) -> TimeLeft:
        left = self.phase.seconds_left(now)
        return TimeLeft(left, left, pace_text(self.phase, now, "step"))

    def _draw(self, width: int, height: int) -> Sequence[RenderableType]:
        now, phase = self.outlet.clock(), self.phase
        text = line(f"{percent(phase.fraction)}, step {phase.done:.0f}/{phase.total or 0:.0f}")
        return [
            Labelled("render", BarLine(phase.fraction, max(4, min(40, width - 30)), Text(), text)),
            Labelled("left", line(left_text(self._left(now)), f", {clock_text(phase.seconds(now))} so far")),
            *memory_rows(read_memory()),
        ]
