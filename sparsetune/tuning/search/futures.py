"""Bridge from an executor of tickets to one of futures; goes with the former."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from sparsetune.executor import Event, Executor, Task

_SETTLED_SECONDS = 0.05


class Futures:
    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._pending: dict[int, tuple[Future[Any], Callable[[Event], None]]] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def submit(self, task: Task[Any], on_event: Callable[[Event], None]) -> Future[Any]:
        future: Future[Any] = Future()
        if self._executor.num_workers == 1 and not self._pending:
            self._executor.submit(task)
            try:
                outcome = self._executor.wait(on_event)
                future.set_result(outcome.value) if outcome.error is None else future.set_exception(outcome.error)
            except Exception as error:
                future.set_exception(error)
            return future
        with self._changed:
            self._pending[self._executor.submit(task)] = future, on_event
            if self._thread is None:
                self._thread = threading.Thread(target=self._drive, daemon=True)
                self._thread.start()
            self._changed.notify()
        return future

    def cancel_all(self) -> None:
        with self._changed:
            self._executor.abandon()
            for future, _ in self._pending.values():
                future.cancel()
            self._pending.clear()

    def _drive(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending, 1.0)
                while len(self._pending) < self._executor.num_workers and self._changed.wait(_SETTLED_SECONDS):
                    pass
                if not self._pending:
                    self._thread = None
                    return
            try:
                outcome = self._executor.wait(self._hear)
            except Exception as error:
                with self._changed:
                    for future, _ in self._pending.values():
                        future.set_exception(error)
                    self._pending.clear()
                continue
            with self._changed:
                if outcome.ticket not in self._pending:
                    continue
                future, _ = self._pending.pop(outcome.ticket)
            future.set_result(outcome.value) if outcome.error is None else future.set_exception(outcome.error)

    def _hear(self, event: Event) -> None:
        with self._changed:
            known = self._pending.get(event.ticket) if event.ticket else next(iter(self._pending.values()), None)
        if known is not None:
            known[1](event)
