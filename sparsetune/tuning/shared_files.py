"""What is measured prompt by prompt, shared out among processes: a file each until all are merged into one."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

from sparsetune.executor import Event, Executor, StepDone, Task, run_all
from sparsetune.locks import exclusive, exclusive_if_free
from sparsetune.tuning.context import TimeIsUp, TuningContext, digest
from sparsetune.tuning.events import tell

POLL_SECONDS = 0.5
"""How often a process that has nothing to do looks whether the others are done, or left something behind."""


class Shelf(Protocol):
    """Where results are kept; all processes see the same."""

    def has(self, key: str) -> bool:
        """Whether a piece of work is done."""

    def put(self, key: str, value: Any) -> None:
        """Keep what a piece of work gave."""


def share_out(
    engine: Executor,
    work: Mapping[str, Task[Any]],
    shelf: Shelf,
    locks: Callable[[str], Path],
    *,
    on_event: Callable[[str | None, Event], None],
    on_wait: Callable[[int], None],
    more: Callable[[], bool],
) -> bool:
    """Have each piece of work done by one process, and wait until all are.

    A process takes a piece when it has a worker for it, and holds a lock file meanwhile; what one that died had begun
    is begun again by another.

    Args:
        engine: does the pieces of this process.
        work: the pieces, in order, by keys that are the same in all processes.
        shelf: keeps results.
        locks: gives the lock file of a piece; its folder is `tracking.root`'s.
        on_event: told what happens to a piece of this process; None for what is about no piece.
        on_wait: told how many pieces others do, when this process has none left and their number changes.
        more: asked before each piece; once it says no, those that run are the last.

    Returns:
        Whether all are done; else `more` said no.
    """
    waited_for = 0
    while left := [key for key in work if not shelf.has(key)]:
        claimed: list[str] = []
        with contextlib.ExitStack() as held:
            claims = _claims(left, work, shelf, locks, claimed, held)

            def tell(place: int, event: Event, claimed: list[str] = claimed) -> None:
                on_event(None if place < 0 else claimed[place], event)

            for place, outcome in run_all(engine, claims, tell, more):
                shelf.put(claimed[place], outcome.get())
        if not more():
            return all(shelf.has(key) for key in work)
        if not claimed:
            if len(left) != waited_for:
                on_wait(len(left))
            waited_for = len(left)
            time.sleep(POLL_SECONDS)
    return True


def _claims(
    keys: list[str],
    work: Mapping[str, Task[Any]],
    shelf: Shelf,
    locks: Callable[[str], Path],
    claimed: list[str],
    held: contextlib.ExitStack,
) -> Iterator[Task[Any]]:
    """Take, each time one is asked for, the next piece that nobody does or has done."""
    for key in keys:
        is_free = held.enter_context(exclusive_if_free(locks(key), setting="tracking.root"))
        if is_free and not shelf.has(key):  # it may have been done between the look at the shelf and the lock
            claimed.append(key)
            yield work[key]


class Table(Protocol):
    """What prompts' measurements are kept as."""

    def merged(self, other: Self) -> Self:
        """Put those of further prompts to it."""

    def save(self, path: Path) -> None:
        """Write it."""


T = TypeVar("T", bound=Table)


@dataclass(frozen=True)
class Parts(Generic[T]):
    """The tables of each prompt, a file each, until they are merged into one.

    Args:
        path: of the one.
        load: reads a table; raises TuningError where it is damaged.
    """

    path: Path
    load: Callable[[Path], T]

    def part(self, key: str) -> Path:
        """Say where a prompt's table is kept."""
        return self.path.with_suffix(f".{key}.npz")

    def has(self, key: str) -> bool:
        """Whether a prompt's table is there, or all are merged."""
        return self.part(key).is_file() or self.path.is_file()

    def put(self, key: str, value: T) -> None:
        """Keep a prompt's table."""
        value.save(self.part(key))

    def merged(self, num_prompts: int) -> T:
        """Merge all parts, unless another process has.

        Prompts may come back in any order; they are merged in their own, so that the outcome is the same to the last
        bit.
        """
        parts = [self.part(str(index)) for index in range(num_prompts)]
        with exclusive(lock_file(self.path, "merge"), what="the calibration", setting="tracking.root"):
            if self.path.is_file():
                return self.load(self.path)
            merged: T = functools.reduce(lambda one, other: one.merged(other), [self.load(part) for part in parts])
            merged.save(self.path)
            for part in parts:
                part.unlink(missing_ok=True)
            return merged


def measured(
    bench: TuningContext,
    path: Path,
    load: Callable[[Path], T],
    tasks: Mapping[str, Task[T]],
    name: str,
) -> T:
    """Give the table that all prompts come to, measured as far as no run with the same settings has.

    Args:
        bench: what the search works with.
        path: where the table is kept; its name says all that decides it.
        load: reads a table; raises TuningError where it is damaged.
        tasks: of each prompt, by its number.
        name: what a prompt's is called, e.g. `calibration`.

    Raises:
        TimeIsUp: `tune.max_minutes` ended first; what was measured is kept.
    """
    if path.is_file():
        return load(path)

    def tell_event(key: str | None, event: Event) -> None:
        what = event.what
        if key is not None and isinstance(what, StepDone):
            step = replace(what, index=int(key), num_renderings=len(tasks), worker=event.worker)
            tell(bench.listeners, lambda listener: listener.on_step(step))
        else:
            bench.tell_incident(what)

    parts = Parts(path, load)
    share(bench, tasks, parts, path, tell_event, name)
    return parts.merged(len(tasks))


def share(
    bench: TuningContext,
    work: Mapping[str, Task[Any]],
    shelf: Shelf,
    path: Path,
    on_event: Callable[[str | None, Event], None],
    name: str,
) -> None:
    """Have what isn't done yet done, by this process and others on the same study.

    Raises:
        TimeIsUp: `tune.max_minutes` ended first.
    """

    def tell_wait(num_left: int) -> None:
        tell(bench.listeners, lambda listener: listener.on_wait(f"{num_left} {name}{'' if num_left == 1 else 's'}"))

    if not share_out(
        bench.engine,
        work,
        shelf,
        lambda key: lock_file(path, key),
        on_event=on_event,
        on_wait=tell_wait,
        more=bench.has_time,
    ):
        raise TimeIsUp


def lock_file(path: Path, key: str) -> Path:
    """Name the lock of a piece of work whose results are kept at `path`."""
    return path.with_name(f"{path.stem}.{digest({'key': key})}.lock")
