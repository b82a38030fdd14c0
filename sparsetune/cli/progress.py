"""Progress of a command: a live display by rich on a terminal, log events elsewhere."""

import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from sparsetune.cli.console import Log, LogFormat
from sparsetune.cli.log_schema import EVENTS
from sparsetune.cli.tables import clock_text
from sparsetune.signals import wait_for_answer

LOG_SECONDS: Final[Mapping[LogFormat, float]] = {"text": 60.0, "json": 10.0}
"""Minimum time between two `progress` events of a log."""

Rows = list[tuple[str, str | Text]]
"""Labels and contents of lines below the bars."""

_ATTRIBUTES: Final = {"trial": "number", "prompt_index": "index"}
"""Attributes of a `source` that are called otherwise than the event's field."""

Result = TypeVar("Result")

_GIB = 1024.0**3
_NUM_LATEST = 5
_LABEL_WIDTH = 11
_BAR_WIDTH = 16
_NARROW = 60
"""Columns below which bars and times are left out."""


class SteadyConsole(Console):
    """A console that never hides the cursor, since a killed process could not show it again."""

    def show_cursor(self, show: bool = True) -> bool:
        return False


def stderr_console() -> Console:
    return SteadyConsole(stderr=True, soft_wrap=True, highlight=False)


def is_live(log: Log, console: Console) -> bool:
    """Whether to draw on a console: it is a notebook or a terminal with cursor control, and text is wanted.

    `FORCE_COLOR` makes rich take a file for a terminal, hence `isatty`.
    """
    terminal = console.is_jupyter or (console.file.isatty() and not console.is_dumb_terminal)
    return terminal and log.format == "text" and not log.quiet


class _NotebookLive(Live):
    """Redraws one output of a notebook's cell; rich's own needs ipywidgets for it."""

    def __init__(self, get_renderable: Callable[[], RenderableType], width: int) -> None:
        canvas = Console(file=io.StringIO(), record=True, width=width, force_jupyter=False)
        super().__init__(
            console=canvas, refresh_per_second=2, redirect_stdout=False, redirect_stderr=False,
            get_renderable=get_renderable,
        )  # fmt: skip
        self._output: Any = None

    def refresh(self) -> None:
        from IPython.display import HTML, display  # type: ignore[import-not-found, unused-ignore]

        with self._lock:
            self.console.print(self.renderable)
            page = HTML(self.console.export_html(inline_styles=True, code_format="<pre>{code}</pre>"))
            if self._output is None:
                self._output = display(page, display_id=True)
            else:
                self._output.update(page)


@dataclass(frozen=True)
class Memory:
    """Resident memory of this process, and what PyTorch reserved on its GPU (None if unused), in GiB."""

    process: float | None = None
    gpu: float | None = None
    gpu_peak: float | None = None
    gpu_total: float | None = None

    @property
    def text(self) -> str:
        parts = []
        if self.gpu is not None:
            parts.append(f"GPU {self.gpu:.1f} of {self.gpu_total:.1f} GiB, peak {self.gpu_peak:.1f}")
        if self.process is not None:
            parts.append(f"process {self.process:.1f} GiB")
        return ", ".join(parts)


def read_memory() -> Memory:
    """Read the memory in use, without importing PyTorch or initialising CUDA."""
    statm = Path("/proc/self/statm")
    process = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / _GIB if statm.exists() else None
    cuda: Any = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is None or not cuda.is_initialized():
        return Memory(process)
    total = cuda.get_device_properties(cuda.current_device()).total_memory
    return Memory(process, cuda.memory_reserved() / _GIB, cuda.max_memory_reserved() / _GIB, total / _GIB)


@dataclass(frozen=True)
class TimeLeft:
    """Estimated seconds left, and what they are measured from."""

    phase: float | None = None  # None before its first unit is done
    total: float | None = None  # None while a later phase can't be estimated
    basis: str = ""
    at_most: bool = False  # less is likely, since no trial was pruned yet

    def text(self, phase: str) -> str:
        if self.phase is None:
            return "not known yet"
        if self.total == self.phase:
            return f"{clock_text(self.phase)} ({self.basis})"
        total = "plus later phases" if self.total is None else f"{clock_text(self.total)} in total"
        return (
            f"{clock_text(self.phase)} for {phase}, {total}{' at most' if self.at_most else ''}"
            f"{f' ({self.basis})' if self.basis else ''}"
        )


def latest_rows(results: Sequence[Result], row: Callable[[Result], Text]) -> Rows:
    """Return the last results, the newest first."""
    latest = results[: -_NUM_LATEST - 1 : -1]
    return [("latest" if place == 0 else "", row(result)) for place, result in enumerate(latest)]


def pace(task: Task) -> float | None:
    """Mean seconds per unit of what this run has done; None before the first."""
    done = task.completed - task.fields["reused"]
    return task.elapsed / done if task.elapsed is not None and done > 0 else None


def seconds_left(task: Task) -> float | None:
    seconds = pace(task)
    return None if task.total is None or seconds is None else seconds * max(0.0, task.total - task.completed)


def pace_text(task: Task, unit: str) -> str:
    seconds, done = pace(task), task.completed - task.fields["reused"]
    if seconds is None:
        return ""
    return f"{seconds:.3g} s a {unit} over {f'{done:.1f}'.removesuffix('.0')} {unit}{'' if done == 1 else 's'}"


class ProgressDisplay(Progress):
    """Progress of consecutive phases: bars, the time left at the measured pace, and details.

    Where stderr is no terminal, events and now and then the progress are logged instead. `phases` has the message to
    log when a phase starts, if any, by the phase's name.
    """

    def __init__(
        self,
        log: Log,
        title: str,
        phases: Mapping[str, str] | None = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        console = console or stderr_console()
        self.event_log, self.title, self.subtitle, self.hidden = log, title, "", True
        self.phases: dict[str, Task] = {}
        self.details: Callable[[], Rows] = list
        self.time_left: Callable[[], TimeLeft] = self.phase_time_left
        super().__init__(
            TextColumn("{task.description}", markup=False, table_column=Column(min_width=_LABEL_WIDTH, no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(max_width=_BAR_WIDTH)),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}", markup=False, table_column=Column(overflow="fold")),
            console=console,
            refresh_per_second=4,
            redirect_stdout=False,  # stdout is the result's, and may be a file
            get_time=clock,
            disable=not is_live(log, console),
        )
        if console.is_jupyter:
            self.live = _NotebookLive(self.get_renderable, console.width)
        if console.width < _NARROW:
            self.columns = tuple(one for one in self.columns if not isinstance(one, BarColumn | TimeElapsedColumn))
        if console.options.ascii_only:
            self.live.vertical_overflow = "crop"  # the ellipsis is no ASCII
        self.started = self.last_event = self.last_logged = clock()
        self.add_phases(phases or {})

    def add_phases(self, phases: Mapping[str, str]) -> None:
        for name, message in phases.items():
            self.add_task(name, start=False, total=None, visible=False, reused=0.0, detail="", message=message)
            self.phases[name] = self.tasks[-1]

    def start(self) -> None:
        self.hidden = False
        super().start()

    def close(self, *, keep: bool = False) -> None:
        self.hidden = not keep
        wait_for_answer()
        self.live.stop()

    @property
    def phase(self) -> Task | None:
        return next((task for task in self.phases.values() if task.started and task.stop_time is None), None)

    def start_phase(self, name: str, total: float, *, since: float | None = None, reused: float = 0.0) -> None:
        """Start a phase unless it has started; the phase before it ended with the last event.

        `reused` of its `total` units were done by an earlier run.
        """
        task = self.phases[name]
        if task.started:
            return
        if self.phase is not None:
            self.phase.stop_time = self.last_event
        task.start_time = self.get_time() if since is None else since
        self.update(task.id, total=total, completed=reused, reused=reused, visible=True)
        self.last_event = self.get_time()
        if task.fields["message"]:
            self.log_event("phase", task.fields["message"], phase=name)

    def on_progress(self, phase: str, done: float, total: float, detail: str | None = None) -> None:
        """Record that units are done; the first one of a phase took the time since the last event."""
        self.start_phase(phase, total, since=self.last_event, reused=max(0.0, done - 1))
        detail = f"step {done:.0f}/{total:.0f}" if detail is None else detail
        self.update(self.phases[phase].id, completed=done, total=total, detail=detail)
        self.last_event = self.get_time()
        self._log_progress()

    def phase_time_left(self) -> TimeLeft:
        if self.phase is None:
            return TimeLeft()
        left = seconds_left(self.phase)
        return TimeLeft(left, left, pace_text(self.phase, "step"))

    def log_event(self, event: str, message: str, source: object = None, **fields: Any) -> None:
        """Log an event, unless the display shows it; fields that aren't passed are attributes of `source`."""
        if self.disable:
            for name in EVENTS[event].keys() - fields.keys():
                fields[name] = getattr(source, _ATTRIBUTES.get(name, name))
            self.event_log.event(event, message, **fields)

    def _log_progress(self) -> None:
        phase, now = self.phase, self.get_time()
        if phase is None or pace(phase) is None or now - self.last_logged < LOG_SECONDS[self.event_log.format]:
            return
        self.last_logged = now
        left, memory, name = self.time_left(), read_memory(), phase.description
        self.log_event(
            "progress",
            f"{name} {phase.percentage:.0f}%, left: {left.text(name)}",
            phase=name,
            fraction=phase.percentage / 100 if phase.total else None,
            seconds_left_phase=left.phase,
            seconds_left=left.total,
            estimated_by=left.basis,
            process_memory_gib=memory.process,
            gpu_memory_gib=memory.gpu,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        if self.hidden:
            return
        subtitle = f"  {self.subtitle}" if self.subtitle else ""
        elapsed = clock_text(self.get_time() - self.started)
        yield Text.assemble((self.title, "bold"), subtitle, (f"  {elapsed}", "dim"), no_wrap=True, overflow="crop")
        phases = list(self.phases.values())
        yield self.make_tasks_table(phases)
        table = Table.grid(Column(style="dim", min_width=_LABEL_WIDTH, no_wrap=True), Column(overflow="fold"))
        table.padding = (0, 1, 0, 0)
        for label, content in (*self._common_rows(phases), *self.details()):
            table.add_row(label, self._printable(content) if isinstance(content, str) else content)
        yield table
        yield self.make_tasks_table(task for task in self.tasks if task.description not in self.phases)

    def _common_rows(self, phases: list[Task]) -> Rows:
        current = self.phase
        place = len(phases) if current is None else phases.index(current)
        reused = ", ".join(task.description for task in phases[:place] if not task.started)
        later = ", ".join(task.description for task in phases[place + 1 :])
        name = "" if current is None else current.description
        rows = (
            ("reused", reused), ("next", later), ("left", self.time_left().text(name)), ("memory", read_memory().text)
        )  # fmt: skip
        return [row for row in rows if row[1]]

    def _printable(self, text: str) -> str:
        return text.encode(self.console.encoding, "replace").decode(self.console.encoding)
