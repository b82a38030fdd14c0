"""How evaluation and search speed up with workers, and how many workers one driver can keep busy.

    python benchmarks/scaling.py --workers 1 2 4 [--model demo|cogvideox] [--prompts 16] [--trials 32]
    python benchmarks/scaling.py --driver [--trials 2000] [--trial-prompts 1] [--storage postgresql+psycopg2://...]

The first measures on Ray: 16 prompts judged, and a study of 32 trials, calibration and judging of the winner counted
in; `cogvideox` is CogVideoX-2b at full width with random weights and 4 of its 30 layers, tiny where there is no GPU.

The second has no model: 64 simulated workers take 30 s for each trial, of one prompt or several (a hopeless one
is given up after the first). What the driver does (asking,
telling, reading policies off the curves of a model of 30 layers x 30 heads, the database) is real and is charged second
for second, only the waiting for workers is skipped; so what is left idle is what a real cluster would leave idle. On a
machine that does other things too, `--charge cpu` charges the CPU time of driver and database instead.
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
SHALLOW = """
from dataclasses import replace
from sparsetune.models import loading, random_weights
def shallow(name, whole=random_weights.blueprint):
    plan = whole(name)
    part = plan.components["transformer"]
    part = part | {"config": part["config"] | {"num_layers": 4}}
    return replace(plan, components=plan.components | {"transformer": part})
loading.blueprint = shallow
"""
"""A module that every worker imports before it loads the model."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--driver", action="store_true", help="the driver alone, with simulated workers")
    parser.add_argument("--storage", help="of the simulated study; a PostgreSQL of its own where left out")
    parser.add_argument("--charge", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--trial-prompts", type=int, default=1, help="of the simulated study")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--model", choices=["demo", "cogvideox"], default="demo")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--trials", type=int)
    parser.add_argument("--frames", type=int, help="of a video; the model's own where left out")
    parser.add_argument("--steps", type=int, help="denoising steps; the model's own where left out")
    options = parser.parse_args()
    print(driver(options) if options.driver else scaling(options))


# The driver alone


@dataclass(frozen=True)
class SimulatedPrompt:
    """A prompt that is never rendered: the sparser the policy, the worse, and never twice quite the same."""

    policy: Policy
    noise: float

    def run(self, session: object, emit: object) -> PromptResult:
        kept = [head.cdfthreshd or 1.0 for layer in self.policy.layers for head in layer.heads]
        sparsity = 1.0 - statistics.fmean(kept)
        psnr = 60.0 - 80.0 * sparsity + self.noise
        metrics = {"psnr": psnr, "frame_cosine": 0.99, "frame_l1": 0.01, "frame_diff": 0.01, "psnr_frame_min": psnr - 2}
        return PromptResult("a prompt", 0, metrics=metrics, sparsity=sparsity, seconds_sparse=1.0)


class SimulatedFuture(TaskFuture[Any]):
    """At the end of a study, where threads submit no more tasks, whoever waits has its executor end the next one."""

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
    """Workers that take their time on a clock of their own, to which what the driver took is added.

    The next task ends when all workers are busy: the thread whose task ended before has submitted its next one.

    Args:
        num_workers: simulated workers.
        seconds: of a task.
        spent: seconds that the driver took so far.
        is_last: whether fewer trials are left than there are workers, so that some stay idle.
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
        self._now, self._left_at = 0.0, spent()
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
        return self._now + self._spent() - self._left_at

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
        """End the task that ends first; the driver isn't charged for the seconds that it did nothing."""
        with self._lock:
            if not self._busy:
                return
            first = min(self._busy, key=lambda busy: busy[0])
            self._busy.remove(first)
            ended, worker, task, on_event, future = first
            self._now, self._left_at = max(self.now - idle_seconds, ended), self._spent()
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
class Stretch:
    """Some trials of the simulated study, one after the other."""

    until: int
    prompts: float
    use: float
    milliseconds: float
    megabytes: float


@dataclass
class Watch:
    """Notes, at some numbers of trials, the use of the workers, the driver's time a trial, and its memory."""

    engine: SimulatedExecutor
    spent: Callable[[], float]
    marks: list[int]
    stretches: list[Stretch] = field(default_factory=list)
    ended: int = 0
    prompts: int = 0
    before: tuple[int, int, float, float, float] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def trial(self, num_prompts: int) -> None:
        self.ended += 1
        self.prompts += num_prompts
        if self.ended not in self.marks:
            return
        here = (self.ended, self.prompts, self.engine.now, self.engine.idle, self.spent())
        if self.before is not None:
            ended, prompts, now, idle, spent = (after - before for after, before in zip(here, self.before, strict=True))
            use = 1.0 - idle / (len(self.engine.workers) * now)
            stretch = Stretch(self.ended, prompts / ended, use, 1000 * spent / ended, megabytes())
            self.stretches.append(stretch)
            print(stretch, file=sys.stderr, flush=True)
        self.before = here


class SimulatedRunner(TrialRunner):
    watch: Watch

    def run(self, *trial: Any) -> TrialResult:
        outcome = super().run(*trial)
        with self.watch.lock:
            self.watch.trial(len(outcome.prompts))
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
        engine = SimulatedExecutor(
            NUM_WORKERS, TRIAL_SECONDS / options.trial_prompts, spent, lambda: watch.ended > trials - NUM_WORKERS
        )
        watch = Watch(engine, spent, marks)
        runner = SimulatedRunner(engine, prompts, score, Gate(), predict=space.predict)
        runner.watch = watch
        study = open_study(url, "scaling", {}, 0, trials)
        optimize(study, Objective(runner, space, aimed=True))
        kind = url.partition(":")[0]
    lines = [
        f"{NUM_WORKERS} simulated workers, {TRIAL_SECONDS:g} s a trial of {options.trial_prompts} prompts, {kind}",
        "",
    ]
    lines += [f"| trials | prompts each | workers' use | driver, {options.charge} ms a trial | memory, MB |"]
    lines.append("| --- " * 5 + "|")
    for one in watch.stretches:
        cells = [f"to {one.until}", f"{one.prompts:.2f}", f"{one.use:.1%}", f"{one.milliseconds:.0f}"]
        lines.append(f"| {' | '.join(cells)} | {one.megabytes:.0f} |")
    return "\n".join(lines)


def large_curves() -> Curves:
    """Curves of CogVideoX-2b's shape: error falls and sparsity with it, by head a little differently."""
    points = grid(("cdf",))
    layers = tuple((f"transformer.transformer_blocks.{index}.attn1", 30) for index in range(30))
    arrangements = (Arrangement("raster", True), Arrangement("tiles", True))
    left_out = np.array([1.0 - (point.cdfthreshd or 1.0) for point in points])
    scale = np.random.default_rng(0).uniform(0.5, 2.0, (2, 30, 6, 30, 1))
    error = (left_out * scale).astype(np.float32)
    sparsity = np.broadcast_to(np.sqrt(left_out), error.shape).astype(np.float32)
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
        sys.exit("PostgreSQL must be installed as Debian does, but isn't; install it, or give --storage")
    with postgres(binaries) as started:
        yield started


def processes_of(url: str) -> list[Path]:
    """Find the PostgreSQL that listens on a URL's port: its first process, whose children are found as they come."""
    port = url.rpartition(":")[2].partition("/")[0].encode()
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # another may end just now
            words = (path / "cmdline").read_bytes().split(b"\0")
            found += [path] if b"-D" in words and port in words and b"postgres" in words[0] else []
    return found


def cpu_seconds(leaders: list[Path]) -> float:
    """Add up the CPU time of processes and their children, living and dead."""
    ticks = 0
    for leader in leaders:
        ticks += sum(times_of(leader))
        for child in (leader / "task" / leader.name / "children").read_text().split():
            with contextlib.suppress(OSError):  # it may end just now
                ticks += sum(times_of(leader.parent / child)[:2])
    return ticks / os.sysconf("SC_CLK_TCK")


def times_of(process: Path) -> list[int]:
    """Give a process's ticks as user and in the kernel, and those of its children that ended."""
    return [int(each) for each in (process / "stat").read_text().rpartition(")")[2].split()[11:15]]


def megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


# On Ray


def scaling(options: argparse.Namespace) -> str:
    trials = options.trials or 32
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    lines = [f"{options.model} on {device}: {options.prompts} prompts judged, a study of {trials} trials", ""]
    lines += ["| workers | evaluation, s | times | study, s | times |", "| --- | --- | --- | --- | --- |"]
    first: tuple[float, float] | None = None
    for number in options.workers:
        with tempfile.TemporaryDirectory() as folder:
            config = configured(options, number, trials, Path(folder))
            evaluated = timed(evaluate_config, config, Path(folder) / "evaluation")
            tuned = timed(tune, config, Path(folder) / "tuning")
        first = first or (evaluated, tuned)
        times = [f"{first[0] / evaluated:.2f}", f"{first[1] / tuned:.2f}"]
        lines.append(f"| {number} | {evaluated:.1f} | {times[0]} | {tuned:.1f} | {times[1]} |")
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
        module = folder / "shallow.py"
        module.write_text(SHALLOW)
        gpu = torch.cuda.is_available()
        settings |= {"model.source": "cogvideox-2b", "model.random_weights": "full" if gpu else "tiny"}
        settings |= {"eval.prompt_file": configs_folder() / "prompts" / "demo-eval.txt"}  # its own file has 14
        settings |= {"eval.metric_modules": (str(module),)} if gpu else {}
    if options.frames:
        settings["generation.num_frames"] = options.frames
    if options.steps:
        settings["generation.num_inference_steps"] = options.steps
    return resolve(None, (), {}, settings)


def timed(work: Any, config: Config, folder: Path) -> float:
    """Time an evaluation or search from first event to last: Ray's start and the loading of models are left out."""
    began = time.perf_counter()
    result = work(config, output_dir=folder)
    seconds = getattr(result, "seconds", None) or result.environment.seconds_total
    print(f"{time.perf_counter() - began:.1f} s with the start of Ray", file=sys.stderr)
    return float(seconds)


if __name__ == "__main__":
    main()
