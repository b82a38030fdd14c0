"""Training loop: one captured step, repeated until the time limit."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Budget:
    """Time limit of a run, and the part of the complete training (0 to 1) that it covers."""

    seconds: float
    start: float = 0.0
    end: float = 1.0

    def progress(self, elapsed: float) -> float:
        """Return the progress of the complete training, `elapsed` seconds into this run."""
        return self.start + (self.end - self.start) * min(1.0, elapsed / self.seconds)


def lr_scale(progress: float, step: int, warmup: int = 100, decay_from: float = 0.4) -> float:
    """Return the factor on the learning rate: warm-up by step, constant, then linear decay to 0.01."""
    decay = (1 - progress) / (1 - decay_from)
    return min(1.0, step / warmup, max(decay, 0.01))


def num_processes() -> int:
    """Return the number of training processes, one a GPU."""
    return dist.get_world_size() if dist.is_initialized() else 1


def process_index() -> int:
    """Return the index of this training process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first_process() -> bool:
    """Return whether this process logs and saves."""
    return process_index() == 0


def _first_process_value(value: float) -> float:
    if num_processes() == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    shared = torch.tensor(value, dtype=torch.float64, device=device)
    dist.broadcast(shared, 0)
    return float(shared)


class Ema:
    """Exponential moving average of parameters, stored in a second set of modules."""

    def __init__(self, source: Iterable[nn.Module], target: Iterable[nn.Module], decay: float = 0.999) -> None:
        """Average the parameters of `source` into those of `target`, pairwise."""
        self._source: list[Tensor] = [p for m in source for p in m.parameters()]
        self._target: list[Tensor] = [p for m in target for p in m.parameters()]
        self._weight = 1 - decay

    @torch.no_grad()
    def update(self) -> None:
        """Update the average after an optimizer step."""
        torch._foreach_lerp_(self._target, self._source, self._weight)


def captured(step: Callable[[], Tensor], device: torch.device, warmup: int = 4) -> Callable[[], Tensor]:
    """Capture the step as one CUDA graph, which avoids kernel launch overhead; on a CPU return the step itself."""
    if device.type != "cuda":
        return step
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay(kept: Callable[[], Tensor] = step) -> Tensor:  # the graph reads tensors that only the step refers to
        graph.replay()
        return out

    return replay


def timed_steps(budget: Budget, began: float, log_every_s: float = 15.0) -> Iterator[tuple[int, float, bool]]:
    """Yield (step number from 1, progress, whether to log) until the time limit, counted from `began`.

    Several processes take the same steps: the time is the first one's.
    """
    step, logged = 1, time.monotonic()
    while (elapsed := _first_process_value(time.monotonic() - began)) < budget.seconds:
        log = time.monotonic() - logged > log_every_s and is_first_process()
        if log:
            logged = time.monotonic()
        yield step, budget.progress(elapsed), log
        step += 1
