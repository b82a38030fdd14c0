"""A worker: one process with a model, on one device."""

from dataclasses import dataclass


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
