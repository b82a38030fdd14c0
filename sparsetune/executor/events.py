"""Events that workers emit."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, get_args


@dataclass(frozen=True)
class Worker:
    """A process that runs tasks."""

    index: int  # from 0 over all workers that an executor ever had; a replacement has an index of its own
    host: str
    device: str  # e.g. `NVIDIA H100 80GB HBM3`
    pid: int
    gpus: tuple[str, ...] = ()  # ids on its host
    num_threads: int = 1  # of PyTorch

    @property
    def label(self) -> str:
        """Its name in messages, e.g. `worker 3 (node7, GPU 1)`."""
        gpus = f", GPU {'+'.join(self.gpus)}" if self.gpus else ""
        return f"worker {self.index} ({self.host}{gpus})"


Emit = Callable[[object], None]
"""What a task emits events with; they reach the `on_event` of its submitter in order."""

Side = Literal["dense", "sparse", "dense_again", "kernel", "yardstick"]
"""What a rendering is for; `dense_again` and `kernel` are rungs of the attribution ladder."""

Phase = Literal["preparation", "calibration", "refinement", "sensitivity", "trials", "validation", "evaluation"]

PHASES: Final[tuple[Phase, ...]] = get_args(Phase)
"""Phases of a tuning in order: events, displays, costs, records and reports use these names."""

Change = Literal["lost", "joined", "refused", "out of memory"]


@dataclass(frozen=True)
class Started:
    """A worker started a task; emitted again where another worker was lost with it."""


@dataclass(frozen=True)
class StepDone:
    """One denoising step of one rendering is done.

    A task emits it without `index`, `num_renderings`, `trial` and `worker`; who submitted the task adds these.
    """

    phase: Phase
    side: Side
    step: int  # steps done, from 1
    num_steps: int
    index: int = 0  # of the rendering or prompt within its phase or trial
    num_renderings: int = 1  # of the phase or trial
    cached: bool = False  # the video came from the baseline cache instead, in one event with `step == num_steps`
    trial: int | None = None
    worker: Worker | None = None  # None for this process


@dataclass(frozen=True)
class Incident:
    """A change in the set of workers, or a task that ran out of memory on one."""

    change: Change
    worker: str  # its label
    text: str  # what happened and its consequence, in one sentence
    time: str  # UTC, ISO 8601


@dataclass(frozen=True)
class Event:
    """What a worker emitted: `Started`, `StepDone`, `Incident`, or another value of its task."""

    worker: Worker
    what: object
