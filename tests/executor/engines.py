"""An executor without a model."""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparsetune.executor import Event, Executor, Started, Task, TaskFuture, Worker
from sparsetune.executor.base import OnEvent, ignore

SETTLE_SECONDS = 0.5
"""Workers without a task stay idle once none was submitted for so long."""


@dataclass
class Job:
    task: Task[Any]
    on_event: OnEvent
    future: TaskFuture[Any]


class FakeExecutor(Executor):
    """Runs tasks in this process, one at a time: with one worker inside `submit`, with several in a separate thread.

    Of the tasks that several workers would run at a time `choose` returns the index of the one that ends next.
    """

    def __init__(self, num_workers: int = 1, choose: Callable[[int], int] = lambda in_flight: 0) -> None:
        self._workers = tuple(Worker(index, "here", "cpu", 1000 + index) for index in range(num_workers))
        self._choose = choose
        self._waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self.most_in_flight = 0

    @property
    def workers(self) -> tuple[Worker, ...]:
        return self._workers

    def submit(self, task: Task[Any], on_event: OnEvent = ignore) -> TaskFuture[Any]:
        job = Job(task, on_event, TaskFuture())
        if len(self._workers) == 1:
            self.start(job, self._workers[0])
            self.end(job)
        else:
            self._waiting.put(job)
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, daemon=True)
                    self._thread.start()
        return job.future

    def start(self, job: Job, worker: Worker) -> None:
        job.future.worker = worker
        job.future.set_running_or_notify_cancel()
        job.on_event(Event(worker, Started()))

    def end(self, job: Job) -> None:
        worker = job.future.worker
        try:
            job.future.set_result(job.task.run(None, lambda what: job.on_event(Event(worker, what))))
        except Exception as error:
            job.future.set_exception(error)

    def _run(self) -> None:
        idle, in_flight = list(self._workers), []
        while True:
            while idle:
                try:
                    job = self._waiting.get(timeout=SETTLE_SECONDS if in_flight else None)
                except queue.Empty:
                    break
                in_flight.append(job)
                self.start(job, idle.pop(0))
            self.most_in_flight = max(self.most_in_flight, len(in_flight))
            job = in_flight.pop(self._choose(len(in_flight)))
            idle.append(job.future.worker)
            self.end(job)

    def cancel_all(self) -> None:
        while not self._waiting.empty():
            self._waiting.get().future.cancel()

    def close(self) -> None:
        pass
