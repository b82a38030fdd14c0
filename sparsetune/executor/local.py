"""The executor that runs all tasks in this process."""

import os
import socket
import threading
from typing import Any

import torch

from sparsetune.attention.device import device_name
from sparsetune.executor.base import Executor, OnEvent, Result, Task, TaskFuture, ignore
from sparsetune.executor.events import Event, Started, Worker
from sparsetune.executor.session import ModelSession


class LocalExecutor(Executor):
    """Runs each task within `submit`, on the thread that calls it, so that Ctrl-C ends it at once."""

    def __init__(self, session: ModelSession) -> None:
        self.session = session
        device = session.renderer.loaded.device
        gpus = (str(device.index or 0),) if device.type == "cuda" else ()
        self._worker = Worker(0, socket.gethostname(), device_name(device), os.getpid(), gpus, torch.get_num_threads())
        self._lock = threading.Lock()

    @property
    def workers(self) -> tuple[Worker, ...]:
        return (self._worker,)

    def submit(self, task: Task[Result], on_event: OnEvent = ignore) -> TaskFuture[Result]:
        """Run a task; the future is finished. KeyboardInterrupt and SystemExit are raised here."""
        future: TaskFuture[Result] = TaskFuture()
        future.worker = self._worker
        future.set_running_or_notify_cancel()

        def emit(what: Any) -> None:
            on_event(Event(self._worker, what))

        with self._lock:
            try:
                emit(Started())
                future.set_result(task.run(self.session, emit))
            except Exception as error:
                future.set_exception(error)
        return future

    def close(self) -> None:
        self.session.restore()
