"""An engine without a model: its workers are counted, not started."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from sparsetune.errors import SparsetuneError
from sparsetune.executor import Event, Executor, Incident, Started, Task, TaskResult, Worker


class FakeExecutor(Executor):
    """Does tasks in this process; of those that so many workers would have in hand, `choose` says which ends first."""

    def __init__(self, num_workers: int = 1, choose: Callable[[int], int] = lambda in_hand: 0) -> None:
        self._workers = tuple(Worker(index, "here", "cpu", 1000 + index) for index in range(num_workers))
        self._choose = choose
        self._waiting: deque[tuple[int, Task[Any]]] = deque()
        self._in_hand: list[tuple[int, Task[Any], Worker]] = []
        self._told: list[Incident] = []
        self.most_in_hand = 0
        self.tickets = 0

    @property
    def workers(self) -> tuple[Worker, ...]:
        return self._workers

    @property
    def incidents(self) -> Sequence[Incident]:
        return tuple(self._told)

    def submit(self, task: Task[Any]) -> int:
        self.tickets += 1
        self._waiting.append((self.tickets, task))
        return self.tickets

    def wait(self, on_event: Callable[[Event], None]) -> TaskResult:
        busy = {worker for _, _, worker in self._in_hand}
        for worker in self._workers:
            if worker not in busy and self._waiting:
                ticket, task = self._waiting.popleft()
                self._in_hand.append((ticket, task, worker))
                on_event(Event(ticket, worker, Started()))
        self.most_in_hand = max(self.most_in_hand, len(self._in_hand))
        ticket, task, worker = self._in_hand.pop(self._choose(len(self._in_hand)))
        try:
            return TaskResult(ticket, worker, task.run(None, lambda what: on_event(Event(ticket, worker, what))))
        except SparsetuneError as error:
            return TaskResult(ticket, worker, error=error)

    def abandon(self) -> None:
        self._waiting.clear()
        self._in_hand.clear()
