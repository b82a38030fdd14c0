"""The interface by which evaluation, calibration and studies hand out work."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from sparsetune.errors import SparsetuneError
from sparsetune.executor.events import Emit, Event, Incident, Worker
from sparsetune.executor.session import ModelSession

Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)
OnEvent = Callable[[Event], None]


class Task(Protocol[Result_co]):
    """A piece of work: a frozen value that can be pickled, and that does the same wherever and whenever it runs."""

    def run(self, place: ModelSession, emit: Emit) -> Result_co:
        """Do it with the model of `place`, and tell of it by `emit`."""


@dataclass(frozen=True)
class TaskResult:
    """How a task ended.

    Args:
        ticket: what `submit` gave for it.
        worker: who ended it.
        value: what it gave.
        error: why it gave nothing.
    """

    ticket: int
    worker: Worker
    value: Any = None
    error: SparsetuneError | None = None

    def get(self) -> Any:
        """Give the value, or raise the error."""
        if self.error is not None:
            raise self.error
        return self.value


class Executor(ABC):
    """Does tasks. Everything that it tells is told in its caller's thread, within `wait`.

    A task that dies with its worker is done again by another one, so `submit` promises one outcome, not one start.
    """

    @property
    @abstractmethod
    def workers(self) -> tuple[Worker, ...]:
        """The workers that there are now."""

    @property
    @abstractmethod
    def incidents(self) -> tuple[Incident, ...]:
        """What happened to workers so far."""

    @abstractmethod
    def submit(self, task: Task[Any]) -> int:
        """Have a task done when a worker is free, in the order of the calls; gives its ticket."""

    @abstractmethod
    def wait(self, on_event: OnEvent) -> TaskResult:
        """Work, or let work, until some submitted task ends.

        Args:
            on_event: told of what happens meanwhile, of all tasks.

        Raises:
            ExecutorError: no worker is left that could do it.
            Exception: a task raised what isn't a user's to mend, or `on_event` did.
        """

    @abstractmethod
    def abandon(self) -> None:
        """Forget all tasks that have no outcome; workers stop at their next denoising step."""

    def leave_out(self, worker: Worker, why: str) -> None:  # noqa: B027 - an engine may have one worker alone
        """Give a worker no more work; what it has in hand is done by another.

        Args:
            worker: one of several.
            why: what is wrong with it, for people.
        """

    def close(self) -> None:  # noqa: B027 - an engine may have nothing to give back
        """Give back all that the engine holds; the model of this process is left as it was."""

    @property
    def num_workers(self) -> int:
        """How many tasks run at a time."""
        return max(1, len(self.workers))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def run_all(
    engine: Executor,
    tasks: Iterable[Task[Result]],
    on_event: Callable[[int, Event], None] = lambda place, event: None,
    more: Callable[[], bool] = lambda: True,
) -> Iterator[tuple[int, TaskResult]]:
    """Have tasks done, as many at a time as there are workers; give the place and outcome of each as it ends.

    Args:
        engine: does them.
        tasks: what is to be done; each is asked for when there is a worker for it.
        on_event: told of events with the place of the task that they are about.
        more: asked before each task is handed out; once it says no, those that run are the last.
    """
    places: dict[int, int] = {}
    waiting = iter(enumerate(tasks))

    def tell(event: Event) -> None:
        if event.ticket is None or event.ticket in places:
            on_event(-1 if event.ticket is None else places[event.ticket], event)

    def fill() -> None:
        while len(places) < engine.num_workers and more():
            if (following := next(waiting, None)) is None:
                return
            places[engine.submit(following[1])] = following[0]

    fill()
    while places:
        outcome = engine.wait(tell)
        yield places.pop(outcome.ticket), outcome
        fill()


def run_one(engine: Executor, task: Task[Result], on_event: OnEvent = lambda event: None) -> Result:
    """Have one task done and give its value.

    Raises:
        SparsetuneError: what the task raised.
    """
    engine.submit(task)
    value: Result = engine.wait(on_event).get()
    return value
