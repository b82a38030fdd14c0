"""Events that workers emit."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, get_args


@dataclass(frozen=True)
class Worker:
    """A process that runs tasks.

    Args:
        index: from 0 over all workers that an executor ever had; a replacement has an index of its own.
        host: name of its host.
        device: name of its device, e.g. `NVIDIA H100 80GB HBM3`.
        pid: process id.
        gpus: ids of its GPUs on its host; empty on a CPU.
        num_threads: CPU threads of PyTorch.
    """

    index: int
    host: str
    device: str
    pid: int
    gpus: tuple[str, ...] = ()
    num_threads: int = 1

    @property
    def label(self) -> str:
        """Its name in messages, e.g. `worker 3 (node7, GPU 1)`."""
        gpus = f", GPU {'+'.join(self.gpus)}" if self.gpus else ""
        return f"worker {self.index} ({self.host}{gpus})"


Emit = Callable[[object], None]
"""What a task emits events with; they reach the `on_event` of its submitter in order."""

Side = Literal["dense", "sparse", "dense_again", "kernel"]
"""What a rendering is for; the last two are rungs of the attribution ladder."""

Phase = Literal["preparation", "calibration", "refinement", "sensitivity", "trials", "evaluation"]

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

    Args:
        phase: what the rendering belongs to.
        side: what is rendered; calibration renders dense.
        step: steps done, from 1.
        num_steps: of the rendering.
        index: of the rendering or prompt within its phase or trial, from 0.
        num_renderings: of the phase or trial.
        cached: whether the video came from the baseline cache instead, in one event with `step == num_steps`.
        trial: number of the trial; None outside of one.
        worker: who rendered it; None for this process.
    """

    phase: Phase
    side: Side
    step: int
    num_steps: int
    index: int = 0
    num_renderings: int = 1
    cached: bool = False
    trial: int | None = None
    worker: Worker | None = None


@dataclass(frozen=True)
class Incident:
    """A change in the set of workers, or a task that ran out of memory on one.

    Args:
        change: what happened.
        worker: label of the worker.
        text: what happened and its consequence, in one sentence.
        time: UTC, ISO 8601.
    """

    change: Change
    worker: str
    text: str
    time: str


@dataclass(frozen=True)
class Event:
    """What a worker emitted.

    Args:
        worker: the worker.
        what: `Started`, `StepDone`, `Incident`, or a value that the task emitted.
    """

    worker: Worker
    what: object
