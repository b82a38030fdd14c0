"""The executor interface by which evaluation, calibration and studies have tasks run."""

import functools
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, Protocol, Self, TypeVar

from sparsetune.executor.events import Emit, Event, Incident, Worker
from sparsetune.executor.session import ModelSession

Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)
OnEvent = Callable[[Event], None]


class Task(Protocol[Result_co]):
    """A unit of work: a frozen, picklable value whose result doesn't depend on where or how often it runs."""

    def run(self, session: ModelSession, emit: Emit) -> Result_co: ...


class TaskFuture(Future[Result]):
    """The future of a submitted task.

    `result` raises what the task raised (`SparsetuneError`, or any other exception for a bug), what `on_event` raised,
    `ExecutorError` where no worker is left, or `CancelledError`. `cancel` works until a worker starts the task.
    """

    worker: Worker | None = None  # runs it, or ran it last


def ignore(event: Event) -> None:
    pass


class Executor(ABC):
    """Runs tasks, each on one of its workers; a task whose worker dies is run again by another one.

    `submit` may be called by several threads. `on_event` callbacks of one executor never run at the same time, and all
    of a task's are done when its future is; they may run in other threads than the one that called `submit`.
    """

    @property
    @abstractmethod
    def workers(self) -> tuple[Worker, ...]: ...

    @property
    def incidents(self) -> tuple[Incident, ...]:
        """Empty where tasks run in this process: if that fails, the run ends."""
        return ()

    @abstractmethod
    def submit(self, task: Task[Result], on_event: OnEvent = ignore) -> TaskFuture[Result]:
        """Queue a task; tasks start in the order of the calls.

        `on_event` receives the task's events, and incidents, each of which goes to one unfinished task's callback. If
        it raises, the task stops and the future raises that.
        """

    def cancel_all(self) -> None:  # noqa: B027 - nothing to cancel where `submit` runs the task
        """Cancel all unfinished tasks, running ones too: workers stop at their next denoising step."""

    @abstractmethod
    def close(self) -> None:
        """Release workers and models; a model of this process is left without a policy."""

    @property
    def num_workers(self) -> int:
        return max(1, len(self.workers))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run_all(
    executor: Executor,
    tasks: Iterable[Task[Result]],
    on_event: Callable[[int, Event], None] = lambda index, event: None,
    more: Callable[[], bool] = lambda: True,
) -> Iterator[tuple[int, TaskFuture[Result]]]:
    """Run tasks, as many at a time as there are workers; yields each one's index and finished future.

    A task is taken from `tasks` when a worker is free for it and `more` returns True. `on_event` is called with the
    index of the task, in the thread that iterates.
    """
    inbox: queue.SimpleQueue[tuple[int, Event | TaskFuture[Result]]] = queue.SimpleQueue()
    caller, running, waiting = threading.get_ident(), 0, iter(enumerate(tasks))

    def receive(index: int, what: Any) -> None:
        if isinstance(what, Event) and threading.get_ident() == caller:
            on_event(index, what)
        else:
            inbox.put((index, what))

    def fill() -> None:
        nonlocal running
        while running < executor.num_workers and more() and (following := next(waiting, None)) is not None:
            index, task = following
            on_message = functools.partial(receive, index)
            executor.submit(task, on_message).add_done_callback(on_message)
            running += 1

    fill()
    while running:
        index, what = inbox.get()
        if isinstance(what, Event):
            on_event(index, what)
        else:
            running -= 1
            yield index, what
            fill()


def run_one(executor: Executor, task: Task[Result], on_event: OnEvent = ignore) -> Result:
    return executor.submit(task, on_event).result()
