"""The parts that views are made of: bars, labelled lines, figures with their units."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.text import Text

from sparsetune.cli.clock import clock
from sparsetune.cli.live.memory import Memory
from sparsetune.cli.live.time_left import TimeLeft

LABEL_WIDTH = 8
NARROW = 60
"""Columns under which bars go, since words say the same."""


@dataclass(frozen=True)
class Labelled:
    """A row behind its label, which is never cut for it."""

    label: str
    content: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw it."""
        room = options.update(width=max(1, options.max_width - LABEL_WIDTH))
        for number, content in enumerate(console.render_lines(self.content, room, pad=False)):
            label = self.label if number == 0 else ""
            yield Segment(label.ljust(LABEL_WIDTH), console.get_style("dim"))
            yield from content
            yield Segment.line()


@dataclass(frozen=True)
class BarLine:
    """A bar with words before and behind it, which are cut where they don't fit.

    Args:
        fraction: how much of the bar is full; None is nothing.
        width: of the bar.
        before: words before it.
        after: words behind it.
    """

    fraction: float | None
    width: int
    before: Text
    after: Text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw it in one line."""
        bar = ProgressBar(
            total=1.0,
            completed=self.fraction or 0.0,
            width=self.width,
            style="bright_black",
            complete_style="cyan",
            finished_style="green",
        )
        room = options.max_width - self.width - self.before.cell_len
        yield from console.render_lines(self.before, pad=False)[0]
        # Without colours the empty part of a bar is nothing at all.
        drawn = next(iter(console.render_lines(bar, options.update(width=self.width), pad=False)), [])
        yield from Segment.adjust_line_length(drawn, self.width)
        if room > 2:
            yield Segment("  ")
            yield from console.render_lines(self.after, options.update(width=room - 2), pad=False)[0]


def line(*parts: str | tuple[str, str]) -> Text:
    """Join texts, or texts with their styles, in a line that is cut where it doesn't fit."""
    return Text.assemble(*parts, no_wrap=True, overflow="ellipsis")


def figures(sparsity: float | None, psnr: float | None, worst: float | None) -> str:
    """Write sparsity and PSNR with their unit."""
    if sparsity is None or psnr is None:
        return "nothing measured"
    return f"sparsity {sparsity:.3f}, psnr {psnr:.2f} dB" + ("" if worst is None else f" (worst {worst:.2f})")


def percent(fraction: float | None) -> str:
    """Write how much is done; empty where that isn't known."""
    return "" if fraction is None else f"{100 * fraction:.0f} %"


def left_text(left: TimeLeft, phase: str | None = None) -> str:
    """Say how long it will take, and how that is known."""
    if left.phase is None:
        return "not known before something is measured"
    if phase is None or left.total == left.phase:
        return f"{clock(left.phase)} ({left.basis})"
    if left.total is None:
        return f"{clock(left.phase)} for {phase} ({left.basis}), more follows"
    at_most = " at most" if left.at_most else ""
    return f"{clock(left.phase)} for {phase}, {clock(left.total)} in all{at_most} ({left.basis})"


def memory_rows(memory: Memory) -> list[Labelled]:
    """Say what memory is held, where that is known."""
    return [Labelled("memory", line(memory.text))] if memory.text else []


def listed(label: str, contents: Sequence[RenderableType]) -> list[Labelled]:
    """Put rows below each other, of which the first has the label."""
    return [Labelled(label if place == 0 else "", content) for place, content in enumerate(contents)]
