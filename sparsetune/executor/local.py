"""The engine that does all work at once, in this process."""

import os
import socket
from collections import deque
from typing import Any

import torch

from sparsetune.attention.device import device_name
from sparsetune.errors import SparsetuneError
from sparsetune.executor.base import Executor, OnEvent, Task, TaskResult
from sparsetune.executor.events import Event, Incident, Started, Worker
from sparsetune.executor.session import ModelSession


class LocalExecutor(Executor):
    """Runs each task in `wait`, on the thread that calls it: Ctrl-C ends it where it is.

    Args:
        place: the model.
    """

    def __init__(self, place: ModelSession) -> None:
        self.place = place
        device = place.renderer.loaded.device
        gpus = (str(device.index or 0),) if device.type == "cuda" else ()
        self._worker = Worker(
            0, socket.gethostname(), device_name(device), os.getpid(), gpus, num_threads=torch.get_num_threads()
        )
        self._tasks: deque[tuple[int, Task[Any]]] = deque()
        self._tickets = 0

    @property
    def workers(self) -> tuple[Worker, ...]:
        """This process."""
        return (self._worker,)

    @property
    def incidents(self) -> tuple[Incident, ...]:
        """None: what befalls this process ends it."""
        return ()

    def submit(self, task: Task[Any]) -> int:
        """Put a task behind those that wait."""
        self._tickets += 1
        self._tasks.append((self._tickets, task))
        return self._tickets

    def wait(self, on_event: OnEvent) -> TaskResult:
        """Do the first task that waits."""
        ticket, task = self._tasks.popleft()

        def emit(what: object) -> None:
            on_event(Event(ticket, self._worker, what))

        emit(Started())
        try:
            return TaskResult(ticket, self._worker, task.run(self.place, emit))
        except SparsetuneError as error:
            return TaskResult(ticket, self._worker, error=error)

    def abandon(self) -> None:
        """Forget the tasks that wait."""
        self._tasks.clear()

    def close(self) -> None:
        """Take what tasks installed off the pipeline."""
        self.place.plain()
