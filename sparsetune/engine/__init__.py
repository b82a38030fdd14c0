"""Where work is done: in this process, or by workers that each keep a model."""

from sparsetune.engine.engine import Engine, Outcome, Task, hand_out, run_one
from sparsetune.engine.events import Emit, Event, Incident, Side, Started, Stepped
from sparsetune.engine.local import LocalEngine
from sparsetune.engine.opening import open_engine
from sparsetune.engine.worker import Worker
from sparsetune.engine.workplace import Workplace

__all__ = [
    "Emit", "Engine", "Event", "Incident", "LocalEngine", "Outcome", "Side", "Started", "Stepped", "Task", "Worker",
    "Workplace", "hand_out", "open_engine", "run_one",
]  # fmt: skip
