"""Work whose results are files, shared out among the processes that want them."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from sparsetune.executor import Event, Executor, Task, run_all
from sparsetune.locks import exclusive_if_free

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
