"""A phase of work: how much of it is done, and how long the rest will take at its own pace."""

from dataclasses import dataclass, replace
from typing import Self


@dataclass(frozen=True)
class Phase:
    """A part of the work, in units that take about the same time each.

    Args:
        name: what it is called.
        total: its units; None until they are known.
        done: units that are done, parts of one counted in.
        kept: units of those that an earlier run did, which took no time now.
        started: when it began, in seconds of a clock; None before.
        ended: when it ended; None before.
    """

    name: str
    total: float | None = None
    done: float = 0.0
    kept: float = 0.0
    started: float | None = None
    ended: float | None = None

    def begin(self, now: float, total: float | None = None, kept: float = 0.0) -> Self:
        """Begin it; one that has begun stays as it is."""
        return self if self.started is not None else replace(self, started=now, total=total, done=kept, kept=kept)

    def end(self, now: float) -> Self:
        """End it; one that has ended, or never began, stays as it is."""
        return self if self.started is None or self.ended is not None else replace(self, ended=now)

    @property
    def running(self) -> bool:
        """Whether it has begun and not ended."""
        return self.started is not None and self.ended is None

    @property
    def fraction(self) -> float | None:
        """How much is done, in [0, 1]; None where the whole isn't known."""
        return None if not self.total else min(1.0, self.done / self.total)

    def seconds(self, now: float) -> float:
        """Tell how long it has taken so far, or took."""
        return 0.0 if self.started is None else (now if self.ended is None else self.ended) - self.started

    def pace(self, now: float) -> float | None:
        """Seconds a unit, of what was done in this run; None before anything was."""
        worked = self.done - self.kept
        return self.seconds(now) / worked if worked > 0 else None

    def seconds_left(self, now: float) -> float | None:
        """Seconds that the rest takes at its pace so far; None where that can't be told."""
        pace = self.pace(now)
        if self.total is None or pace is None:
            return None
        return pace * max(0.0, self.total - self.done)
