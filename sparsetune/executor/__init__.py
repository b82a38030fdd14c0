"""Where work is done: in this process, or by workers that each keep a model."""

from sparsetune.executor.base import Executor, Task, TaskResult, run_all, run_one
from sparsetune.executor.events import PHASES, Emit, Event, Incident, Phase, Side, Started, StepDone, Worker
from sparsetune.executor.local import LocalExecutor
from sparsetune.executor.opening import open_executor
from sparsetune.executor.session import ModelSession

__all__ = [
    "PHASES",
    "Emit",
    "Event",
    "Executor",
    "Incident",
    "LocalExecutor",
    "ModelSession",
    "Phase",
    "Side",
    "Started",
    "StepDone",
    "Task",
    "TaskResult",
    "Worker",
    "open_executor",
    "run_all",
    "run_one",
]
