"""A worker of the cluster as its leader sees it: what it was last asked, and what it answered."""

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from sparsetune.config import Config
from sparsetune.executor.base import Task
from sparsetune.executor.events import Worker
from sparsetune.executor.remote_worker import RemoteWorker
from sparsetune.executor.worker_plan import WorkerInfo, WorkerPlan

_KEPT_VARIABLES = ("HF_HUB_OFFLINE", "HF_HOME", "HF_HUB_CACHE")


@dataclass(eq=False)
class WorkerHandle:
    """A worker: first it says hello, then it loads the model, then it is idle or does a task.

    Args:
        index: its number.
        actor: Ray's handle of its process.
        awaited: what it answers next: a reference, or the stream of a task's events; None while it is idle.
        hello: what it said of itself; None until it did.
        loaded: whether it has the model.
        ticket: of the task in its hands; None where nobody waits for one.
        loads_since: `time.monotonic()` when it was told to load the model.
    """

    index: int
    actor: Any
    awaited: Any
    hello: WorkerInfo | None = None
    loaded: bool = False
    ticket: int | None = None
    loads_since: float = math.inf

    @classmethod
    def hire(cls, index: int, config: Config, staffing: WorkerPlan, mark: Path) -> "WorkerHandle":
        """Ask Ray for a process; it starts when there is room."""
        variables = {name: value for name in _KEPT_VARIABLES if (value := os.environ.get(name)) is not None}
        threads = str(staffing.threads)
        remote: Any = ray.remote(RemoteWorker)
        actor = remote.options(
            num_cpus=1 if staffing.gpus else staffing.threads,
            num_gpus=staffing.gpus,
            max_restarts=0,  # another one takes its place, and the work is handed out anew
            max_concurrency=4,  # it must hear `stop` while it works
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": variables | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}},
        ).remote(index, config, staffing.threads, mark)
        return cls(index, actor, actor.hello.remote())

    @property
    def worker(self) -> Worker:
        """Who it is; before it said so, only its number is known."""
        return self.hello.worker if self.hello else Worker(self.index, "unknown host", "unknown", 0)

    @property
    def is_idle(self) -> bool:
        """Whether it can be given a task."""
        return self.loaded and self.awaited is None

    def load(self) -> None:
        """Have it load the model."""
        self.awaited, self.loads_since = self.actor.load.remote(), time.monotonic()

    def begin(self, ticket: int, task: Task[Any]) -> None:
        """Give it a task."""
        self.ticket = ticket
        self.awaited = self.actor.run.options(num_returns="streaming").remote(ticket, task)

    def hear(self) -> Any:
        """Give what it answered, where it has; of a task that is the next thing told.

        Raises:
            RayError: it is no more.
        """
        if isinstance(self.awaited, ray.ObjectRefGenerator):
            return ray.get(next(self.awaited))
        answer = ray.get(self.awaited)
        self.awaited = None
        return answer

    def leave(self) -> None:
        """Have it stop what it does, at the next step."""
        if self.ticket is not None:
            self.actor.stop.remote(self.ticket)
            self.ticket = self.awaited = None

    def dismiss(self) -> None:
        """End its process."""
        ray.kill(self.actor, no_restart=True)
