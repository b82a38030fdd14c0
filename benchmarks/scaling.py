"""Speed-up of evaluation and search with workers, and the number of workers that one driver can keep busy.

    python benchmarks/scaling.py --workers 1 2 4 [--model demo|cogvideox] [--prompts 16] [--trials 32]
    python benchmarks/scaling.py --driver [--trials 2000] [--trial-prompts 1] [--storage postgresql+psycopg2://...]

The first command measures on Ray: an evaluation of 16 prompts, and a study of 32 trials with calibration and evaluation
of the winner. `cogvideox` is CogVideoX-2b at full width with random weights and 4 of its 30 layers, or tiny without a
GPU.

The second command runs no model: 64 simulated workers take 30 s for each trial of one or several prompts (trials may be
pruned after the first). The driver's work is real: Optuna's ask and tell, building policies from the curves of a model
with 30 layers x 30 heads, and the database. Its time advances the simulated clock; only the waiting for workers is
skipped. So the workers' idle time is that of a real cluster. On a machine with other load, `--charge cpu` advances the
clock by the CPU time of driver and database instead.
"""

import argparse
import contextlib
import os
import random
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from sparsetune.attention.policy import Policy
from sparsetune.config import Config, resolve
from sparsetune.config.files import configs_folder
from sparsetune.evaluation.evaluate import evaluate_config
from sparsetune.evaluation.prompt import PromptResult
from sparsetune.executor import Executor, Started, Task, TaskFuture, Worker
from sparsetune.executor.base import OnEvent, ignore
from sparsetune.executor.events import Event, Incident
from sparsetune.metrics import Gate
from sparsetune.tuning import tune
from sparsetune.tuning.calibration.curves import Arrangement, Curves, grid
from sparsetune.tuning.events import TrialResult
from sparsetune.tuning.search.objective import Objective, TrialRunner
from sparsetune.tuning.search.run import optimize
from sparsetune.tuning.search.space import SearchSpace
from sparsetune.tuning.search.study import open_study, quiet
from tests.tracking.servers import postgres, postgres_binaries

TRIAL_SECONDS, NUM_WORKERS = 30.0, 64
FOUR_LAYERS = """
from dataclasses import replace
from sparsetune.models import loading, random_weights
def four_layers(name, full=random_weights.blueprint):
    plan = full(name)
    part = plan.components["transformer"]
    part = part | {"config": part["config"] | {"num_layers": 4}}
    return replace(plan, components=plan.components | {"transformer": part})
loading.blueprint = four_layers
"""
"""Module that each worker imports before it loads the model."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--driver", action="store_true", help="measure only the driver, with simulated workers")
    parser.add_argument("--storage", help="storage of the simulated study (default: a temporary PostgreSQL)")
    parser.add_argument(
        "--charge", choices=["wall", "cpu"], default="wall", help="driver time to count (default: wall)"
    )
    parser.add_argument("--trial-prompts", type=int, default=1, help="prompts per simulated trial (default: 1)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of workers (default: 1 2)")
    parser.add_argument("--model", choices=["demo", "cogvideox"], default="demo", help="model to run (default: demo)")
    parser.add_argument("--prompts", type=int, default=16, help="prompts of the evaluation (default: 16)")
    parser.add_argument("--trials", type=int, help="trials of the study (default: 32; 2000 with --driver)")
    parser.add_argument("--frames", type=int, help="frames per video (default: the model's)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    options = parser.parse_args()
    print(driver(options) if options.driver else scaling(options))


# Driver only


@dataclass(frozen=True)
class SimulatedPrompt:
    """Prompt that isn't rendered: its PSNR falls with the policy's sparsity, plus noise."""

    policy: Policy
    noise: float

    def run(self, session: object, emit: object) -> PromptResult:
        kept = [head.cdfthreshd or 1.0 for layer in self.policy.layers for head in layer.heads]
        sparsity = 1.0 - statistics.fmean(kept)
        psnr = 60.0 - 80.0 * sparsity + self.noise
        metrics = {"psnr": psnr, "frame_cosine": 0.99, "frame_l1": 0.01, "frame_diff": 0.01, "psnr_frame_min": psnr - 2}
        return PromptResult("a prompt", 0, metrics=metrics, sparsity=sparsity, seconds_sparse=1.0)


class SimulatedFuture(TaskFuture[Any]):
    """Future whose waiting thread advances the simulation at the end of a study, when no more tasks are submitted."""

    def __init__(self, executor: "SimulatedExecutor") -> None:
        super().__init__()
        self._executor = executor

    def result(self, timeout: float | None = None) -> Any:
        while True:
            try:
                return super().result(1.0)
            except TimeoutError:
                if self._executor.is_last():
                    self._executor.finish_first(idle_seconds=1.0)


class SimulatedExecutor(Executor):
    """Workers on a simulated clock, which the driver's time advances too.

    A task ends only when all workers are busy, so that the thread of the previous task has submitted its next one.

    Args:
        num_workers: number of simulated workers.
        seconds: mean duration of a task.
        spent: returns the seconds that the driver has used so far.
        is_last: returns whether fewer trials are left than there are workers, so that some stay idle.
    """

    def __init__(
        self, num_workers: int, seconds: float, spent: Callable[[], float], is_last: Callable[[], bool]
    ) -> None:
        self._spent = spent
        self.is_last = is_last
        self._workers = tuple(Worker(index, f"host{index // 8}", "simulated", index) for index in range(num_workers))
        self._seconds = seconds
        self._random = random.Random(0)
        self._lock = threading.RLock()
        self._now, self._spent_before = 0.0, spent()
        self._idle = list(self._workers)
        self._busy: list[tuple[float, Worker, Task[Any], OnEvent, SimulatedFuture]] = []
        self._free_since = dict.fromkeys(self._workers, 0.0)
        self.idle = 0.0

    @property
    def workers(self) -> tuple[Worker, ...]:
        return self._workers

    @property
    def incidents(self) -> tuple[Incident, ...]:
        return ()

    @property
    def now(self) -> float:
        return self._now + self._spent() - self._spent_before

    def submit(self, task: Task[Any], on_event: OnEvent = ignore) -> TaskFuture[Any]:
        future = SimulatedFuture(self)
        future.set_running_or_notify_cancel()
        with self._lock:
            if not self._idle:
                self.finish_first()
            future.worker = worker = self._idle.pop()
            took = self._seconds * self._random.uniform(0.8, 1.2)
            self.idle += self.now - self._free_since[worker]
            self._busy.append((self.now + took, worker, task, on_event, future))
            if not self._idle:
                self.finish_first()
        return future

    def finish_first(self, idle_seconds: float = 0.0) -> None:
        """Finish the task that ends first; `idle_seconds`, in which the driver only waited, don't count."""
        with self._lock:
            if not self._busy:
                return
            first = min(self._busy, key=lambda busy: busy[0])
            self._busy.remove(first)
            ended, worker, task, on_event, future = first
            self._now, self._spent_before = max(self.now - idle_seconds, ended), self._spent()
            on_event(Event(worker, Started()))
            self._idle.append(worker)
            self._free_since[worker] = ended
            future.set_result(task.run(None, lambda what: None))  # type: ignore[arg-type]

    def cancel_all(self) -> None:
        with self._lock:
            for *_, future in self._busy:
                future.set_exception(CancelledError())
            self._busy.clear()

    def close(self) -> None:
        pass


@dataclass
class Interval:
    """Measurements over consecutive trials of the simulated study."""

    until: int
    prompts: float
    utilization: float
    milliseconds: float
    megabytes: float


@dataclass
class Measurement:
    """Records worker utilization, the driver's time per trial and its memory, at given numbers of trials."""

    executor: SimulatedExecutor
    spent: Callable[[], float]
    marks: list[int]
    intervals: list[Interval] = field(default_factory=list)
    ended: int = 0
    prompts: int = 0
    before: tuple[int, int, float, float, float] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def trial(self, num_prompts: int) -> None:
        self.ended += 1
        self.prompts += num_prompts
        if self.ended not in self.marks:
            return
        totals = (self.ended, self.prompts, self.executor.now, self.executor.idle, self.spent())
        if self.before is not None:
            changes = (after - before for after, before in zip(totals, self.before, strict=True))
            ended, prompts, now, idle, spent = changes
            utilization = 1.0 - idle / (len(self.executor.workers) * now)
            interval = Interval(self.ended, prompts / ended, utilization, 1000 * spent / ended, megabytes())
            self.intervals.append(interval)
            print(interval, file=sys.stderr, flush=True)
        self.before = totals


class SimulatedRunner(TrialRunner):
    measurement: Measurement

    def run(self, *trial: Any) -> TrialResult:
        outcome = super().run(*trial)
        with self.measurement.lock:
            self.measurement.trial(len(outcome.prompts))
        return outcome


def driver(options: argparse.Namespace) -> str:
    trials = options.trials or 2000
    marks = [mark for mark in (64, 100, 150, 200, 500, 1000, 1500, 2000, 5000) if mark <= trials]
    space = SearchSpace(large_curves(), orders=("raster", "tiles"))
    noise = random.Random(1)
    prompts = ("a prompt",) * options.trial_prompts

    def score(prompt: object, policy: Policy) -> SimulatedPrompt:
        return SimulatedPrompt(policy, noise.gauss(0.0, 1.0))

    with storage(options.storage) as url, quiet():
        database = [] if options.charge == "wall" else processes_of(url)
        spent = time.perf_counter if options.charge == "wall" else lambda: time.process_time() + cpu_seconds(database)
        seconds = TRIAL_SECONDS / options.trial_prompts
        executor = SimulatedExecutor(NUM_WORKERS, seconds, spent, lambda: measurement.ended > trials - NUM_WORKERS)
        measurement = Measurement(executor, spent, marks)
        runner = SimulatedRunner(executor, prompts, score, Gate(), predict=space.predict)
        runner.measurement = measurement
        study = open_study(url, "scaling", {}, 0, trials)
        optimize(study, Objective(runner, space, aimed=True))
        kind = url.partition(":")[0]
    size = f"{TRIAL_SECONDS:g} s and {options.trial_prompts} prompts per trial"
    lines = [f"{NUM_WORKERS} simulated workers, {size}, {kind}", ""]
    time_column = f"driver, {options.charge} ms per trial"
    lines += [f"| trials | prompts per trial | worker utilization | {time_column} | memory, MB |"]
    lines.append("| --- " * 5 + "|")
    for one in measurement.intervals:
        cells = [f"to {one.until}", f"{one.prompts:.2f}", f"{one.utilization:.1%}", f"{one.milliseconds:.0f}"]
        lines.append(f"| {' | '.join(cells)} | {one.megabytes:.0f} |")
    return "\n".join(lines)


def large_curves() -> Curves:
    """Return synthetic curves of CogVideoX-2b's shape: error rises with sparsity, at a random scale for each head."""
    points = grid(("cdf",))
    layers = tuple((f"transformer.transformer_blocks.{index}.attn1", 30) for index in range(30))
    arrangements = (Arrangement("raster", True), Arrangement("tiles", True))
    dropped = np.array([1.0 - (point.cdfthreshd or 1.0) for point in points])
    scale = np.random.default_rng(0).uniform(0.5, 2.0, (2, 30, 6, 30, 1))
    error = (dropped * scale).astype(np.float32)
    sparsity = np.broadcast_to(np.sqrt(dropped), error.shape).astype(np.float32)
    size = np.ones((30, 6, 30), np.float32)
    return Curves(
        layers, arrangements, (0, 10, 20, 29, 39, 49), 50, points, error, error, sparsity, size, num_inputs=4,
        select_partial=True,
    )  # fmt: skip


@contextlib.contextmanager
def storage(url: str | None) -> Iterator[str]:
    if url is not None:
        yield url
        return
    binaries = postgres_binaries()
    if binaries is None:
        sys.exit("PostgreSQL not found where Debian installs it; install it or pass --storage")
    with postgres(binaries) as started:
        yield started


def processes_of(url: str) -> list[Path]:
    """Return the main process of the PostgreSQL server on a URL's port; `cpu_seconds` adds its children."""
    port = url.rpartition(":")[2].partition("/")[0].encode()
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process ended meanwhile
            words = (path / "cmdline").read_bytes().split(b"\0")
            found += [path] if b"-D" in words and port in words and b"postgres" in words[0] else []
    return found


def cpu_seconds(parents: list[Path]) -> float:
    """Return the CPU time of processes and their children, including those that have ended."""
    ticks = 0
    for parent in parents:
        ticks += sum(times_of(parent))
        for child in (parent / "task" / parent.name / "children").read_text().split():
            with contextlib.suppress(OSError):  # the process ended meanwhile
                ticks += sum(times_of(parent.parent / child)[:2])
    return ticks / os.sysconf("SC_CLK_TCK")


def times_of(process: Path) -> list[int]:
    """Return a process's clock ticks in user and kernel mode, and those of its ended children."""
    return [int(each) for each in (process / "stat").read_text().rpartition(")")[2].split()[11:15]]


def megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


# On Ray


def scaling(options: argparse.Namespace) -> str:
    trials = options.trials or 32
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    lines = [f"{options.model} on {device}: evaluation of {options.prompts} prompts, study of {trials} trials", ""]
    lines += ["| workers | evaluation, s | speed-up | study, s | speed-up |", "| --- | --- | --- | --- | --- |"]
    first: tuple[float, float] | None = None
    for number in options.workers:
        with tempfile.TemporaryDirectory() as folder:
            config = configured(options, number, trials, Path(folder))
            evaluated = timed(evaluate_config, config, Path(folder) / "evaluation")
            tuned = timed(tune, config, Path(folder) / "tuning")
        first = first or (evaluated, tuned)
        speedups = [f"{first[0] / evaluated:.2f}", f"{first[1] / tuned:.2f}"]
        lines.append(f"| {number} | {evaluated:.1f} | {speedups[0]} | {tuned:.1f} | {speedups[1]} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def configured(options: argparse.Namespace, workers: int, trials: int, folder: Path) -> Config:
    settings: dict[str, Any] = {
        "engine.name": "ray",
        "engine.workers": str(workers),
        "engine.threads_per_worker": 1 if not torch.cuda.is_available() else None,
        "engine.start_seconds": 300.0,
        "eval.num_prompts": options.prompts,
        "eval.save_videos": False,
        "tune.n_trials": trials,
        "tune.max_minutes": None,
        "tracking.root": folder / "mlruns",
        "cache.dir": folder / "cache",
    }
    if options.model == "cogvideox":
        module = folder / "four_layers.py"
        module.write_text(FOUR_LAYERS)
        gpu = torch.cuda.is_available()
        settings |= {"model.source": "cogvideox-2b", "model.random_weights": "full" if gpu else "tiny"}
        settings |= {
            "eval.prompt_file": configs_folder() / "prompts" / "demo-eval.txt"
        }  # the model's own file has only 14
        settings |= {"eval.metric_modules": (str(module),)} if gpu else {}
    if options.frames:
        settings["generation.num_frames"] = options.frames
    if options.steps:
        settings["generation.num_inference_steps"] = options.steps
    return resolve(None, (), {}, settings)


def timed(work: Any, config: Config, folder: Path) -> float:
    """Return the seconds of an evaluation or search, without the start of Ray and the loading of models."""
    began = time.perf_counter()
    result = work(config, output_dir=folder)
    seconds = getattr(result, "seconds", None) or result.environment.seconds_total
    print(f"{time.perf_counter() - began:.1f} s including the start of Ray", file=sys.stderr)
    return float(seconds)


if __name__ == "__main__":
    main()
