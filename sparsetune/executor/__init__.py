"""Where work is done: in this process, or by workers that each keep a model."""

from sparsetune.executor.base import Executor, Task, TaskResult, run_all, run_one
from sparsetune.executor.events import Emit, Event, Incident, Side, Started, Stepped, Worker
from sparsetune.executor.local import LocalExecutor
from sparsetune.executor.opening import open_executor
from sparsetune.executor.session import ModelSession

__all__ = [
    "Emit",
    "Event",
    "Executor",
    "Incident",
    "LocalExecutor",
    "ModelSession",
    "Side",
    "Started",
    "Stepped",
    "Task",
    "TaskResult",
    "Worker",
    "open_executor",
    "run_all",
    "run_one",
]
