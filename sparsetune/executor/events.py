"""What workers tell while they work."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal


@dataclass(frozen=True)
class Worker:
    """Who does a piece of work.

    Args:
        index: counts from 0 over all workers that an engine ever had; one that takes a lost one's place has its own.
        host: its machine's name.
        device: what computes, as a person would name it, e.g. `NVIDIA H100 80GB HBM3`.
        pid: its process.
        gpus: ids of the GPUs that it was given, as its host counts them; empty on a CPU.
        num_threads: PyTorch's on the CPU.
    """

    index: int
    host: str
    device: str
    pid: int
    gpus: tuple[str, ...] = ()
    num_threads: int = 1

    @property
    def label(self) -> str:
        """Name it for people, e.g. `worker 3 (node7, GPU 1)`."""
        gpus = f", GPU {'+'.join(self.gpus)}" if self.gpus else ""
        return f"worker {self.index} ({self.host}{gpus})"


Emit = Callable[[object], None]
"""What a task tells of its work by; the values reach the engine's caller in order, in its own thread."""

Side = Literal["dense", "sparse", "dense_again", "kernel"]
"""What is being rendered; the last two are rungs of the attribution ladder."""

Phase = Literal["preparation", "calibration", "refinement", "sensitivity", "trials", "evaluation"]

PHASES: Final[tuple[Phase, ...]] = (
    "preparation",
    "calibration",
    "refinement",
    "sensitivity",
    "trials",
    "evaluation",
)
"""Phases of a tuning in order: events, displays, costs, records and reports use these names."""

Change = Literal["lost", "joined", "refused", "out of memory"]


@dataclass(frozen=True)
class Started:
    """A worker began a task: the first time, or once more after another was lost with it."""


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
    """Something that happened to a worker, and what came of it.

    Args:
        change: a worker was lost or joined, or was refused; or a task ran out of memory on it.
        worker: its label.
        text: the whole in one sentence, for people.
        time: UTC, ISO 8601.
    """

    change: Change
    worker: str
    text: str
    time: str


@dataclass(frozen=True)
class Event:
    """Something that a worker told.

    Args:
        ticket: of the task that it works on; None where it is about no task.
        worker: who.
        what: `Started`, `StepDone`, `Incident`, or a task's own value.
    """

    ticket: int | None
    worker: Worker
    what: object
