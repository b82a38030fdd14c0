"""Ray on this host, with real processes that are killed.

One Ray and as few workers as possible: both take seconds to start.
"""

import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsetune.config import Config
from sparsetune.errors import ExecutorError, GenerationError, OutOfMemoryError
from sparsetune.evaluation.evaluate import evaluate_config
from sparsetune.evaluation.result import EvaluationResult
from sparsetune.executor import Emit, Event, Executor, Incident, ModelSession, Started, StepDone, open_executor, run_all
from sparsetune.models.pipelines import demo_config
from sparsetune.tuning import TuningListener, TuningResult, tune
from sparsetune.tuning.calibration.curves import Curves
from sparsetune.tuning.events import TrialResult

pytestmark = pytest.mark.slow

SMALL = {
    "generation.num_frames": 9,
    "generation.num_inference_steps": 2,
    "model.device": "cpu",
    "tune.n_trials": 3,
    "tune.objective": "pareto",  # whose first trials don't depend on each other, and none is pruned for another
    "tune.num_prompts": 2,
    "tune.calibration_steps": 2,
    "tune.orders": ("raster",),
    "tune.caches": ("none",),
    "tune.granularity": "global",
    "tune.probe_prompts": 1,
    "tune.max_minutes": None,
    "eval.num_prompts": 3,
    "eval.metrics": ("psnr",),
    "gate.min_psnr": 5.0,
    "gate.min_frame_cosine": 0.1,
    "gate.min_psnr_worst": None,
}
RAY = {"engine.name": "ray", "engine.workers": 2, "engine.start_seconds": 300.0}


def config(folder: Path, **more: object) -> Config:
    places = {"tracking.root": folder / "mlruns", "cache.dir": folder / "cache"}
    return demo_config(SMALL | places | {key.replace("__", "."): value for key, value in more.items()})


@pytest.fixture(scope="module", autouse=True)
def ray_here() -> Iterator[None]:
    ray = pytest.importorskip("ray", reason="the extra ray isn't installed")
    from sparsetune.executor.ray_cluster import Cluster

    cluster = Cluster(None, 300.0)
    yield
    cluster.close()
    assert not ray.is_initialized()


@pytest.fixture(scope="class")
def executor() -> Iterator[Executor]:
    with open_executor(demo_config(SMALL | RAY)) as executor:
        yield executor


@dataclass(frozen=True)
class Answer:
    """Gives a number; the first time, where there is a mark to set, it fails instead."""

    number: int
    mark: Path | None = None
    how: str = ""

    def run(self, session: ModelSession, emit: Emit) -> tuple[int, int]:
        emit(StepDone("trials", "sparse", 1, 1))
        if self.mark is not None and (self.how == "always" or not self.mark.exists()):
            self.mark.touch()
            if self.how == "memory":
                raise OutOfMemoryError("the video must fit into memory, but it ran out")
            os.kill(os.getpid(), signal.SIGKILL)
        return self.number, os.getpid()


def answers(executor: Executor, tasks: list[Answer]) -> tuple[dict[int, object], list[Event]]:
    events: list[Event] = []
    finished = run_all(executor, tasks, lambda index, event: events.append(event))
    return {index: future.exception() or future.result() for index, future in finished}, events


class TestWorkers:
    """Four tests share two workers, which stop after them; the tests below start their own."""

    def test_workers_are_processes_of_their_own_with_threads_of_their_own(self, executor: Executor) -> None:
        found, events = answers(executor, [Answer(number) for number in range(6)])
        assert {index: answer[0] for index, answer in found.items()} == {number: number for number in range(6)}
        assert {answer[1] for answer in found.values()} <= {worker.pid for worker in executor.workers} - {os.getpid()}
        assert all(worker.num_threads == 1 for worker in executor.workers)
        assert [type(event.what) for event in events].count(Started) == 6

    def test_the_task_of_a_killed_worker_is_done_by_another(self, executor: Executor, tmp_path: Path) -> None:
        before = len(executor.incidents)
        found, events = answers(executor, [Answer(1, tmp_path / "mark", "kill"), Answer(2), Answer(3)])
        assert [found[index][0] for index in range(3)] == [1, 2, 3]
        (lost,) = [event.what for event in events if isinstance(event.what, Incident) and event.what.change == "lost"]
        assert "was lost (its process ended); its task is run again by another worker" in lost.text
        assert executor.incidents[before].text == lost.text

    def test_a_task_that_kills_its_workers_fails_and_the_next_is_done(self, executor: Executor, tmp_path: Path) -> None:
        found, _ = answers(executor, [Answer(1, tmp_path / "mark", "always"), Answer(2)])
        assert isinstance(found[0], GenerationError)
        assert "3 workers were lost while rendering" in str(found[0])
        assert found[1][0] == 2

    def test_what_ran_out_of_memory_on_one_worker_is_done_by_another(self, executor: Executor, tmp_path: Path) -> None:
        for _ in range(600):  # the replacements are still loading
            if len(executor.workers) == 2:
                break
            answers(executor, [Answer(0)])
            time.sleep(0.1)
        found, events = answers(executor, [Answer(1, tmp_path / "mark", "memory")])
        assert found[0][0] == 1
        (short,) = [
            event.what for event in events if isinstance(event.what, Incident) and event.what.change != "joined"
        ]
        assert short.change == "out of memory"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[EvaluationResult, TuningResult]:
    """The result of this process alone, with as many threads as a worker."""
    folder, threads = tmp_path_factory.mktemp("local"), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        evaluation = evaluate_config(config(folder), output_dir=folder / "eval")
        return evaluation, tune(config(folder), output_dir=folder / "tune")
    finally:
        torch.set_num_threads(threads)


def measured(result: EvaluationResult) -> dict[str, object]:
    """The fields of a result that don't depend on time, path or machine."""
    value = result.to_dict()
    del value["environment"], value["config"]["tuned_path"]
    timed = ("seconds_dense", "seconds_sparse", "measured_speedup")
    value["sparsity"] = {key: kept for key, kept in value["sparsity"].items() if key not in timed}
    value["statistics"] = {key: kept for key, kept in value["statistics"].items() if key not in timed}
    value["detailed_results"] = [
        {key: kept for key, kept in row.items() if key not in timed} for row in value["detailed_results"]
    ]
    return value


def test_an_evaluation_is_the_same_to_the_last_bit(local, tmp_path: Path) -> None:
    result = evaluate_config(config(tmp_path, **RAY), output_dir=tmp_path / "eval")
    assert measured(result) == measured(local[0])
    assert len(result.environment.workers) == 2
    assert len(list((tmp_path / "eval" / "videos").glob("prompt_*_*.mp4"))) == 9


class Killer(TuningListener):
    """Kills the worker of the second trial during the trial."""

    def __init__(self) -> None:
        self.killed: int | None = None
        self.incidents: list[Incident] = []
        self.trials: list[TrialResult] = []

    def on_step(self, event: StepDone) -> None:
        if self.killed is None and event.trial == 1 and event.worker is not None:
            self.killed = event.worker.pid
            os.kill(event.worker.pid, signal.SIGKILL)

    def on_incident(self, incident: Incident) -> None:
        self.incidents.append(incident)

    def on_trial(self, result: TrialResult) -> None:
        self.trials.append(result)


def test_a_search_whose_worker_is_killed_comes_to_the_same(local, tmp_path: Path) -> None:
    killer = Killer()
    result = tune(config(tmp_path, **RAY), output_dir=tmp_path / "tune", listeners=(killer,))
    assert killer.killed is not None
    assert any(incident.change == "lost" and "run again" in incident.text for incident in killer.incidents)
    assert set(killer.incidents) <= set(result.incidents)
    assert sorted(trial.number for trial in killer.trials) == [0, 1, 2]  # none twice, none lost

    alone = local[1]
    ours, theirs = Curves.load(result.calibration_path), Curves.load(alone.calibration_path)
    for name in ("error", "error_rms", "sparsity", "size"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    for trial, expected in zip(result.trials, alone.trials, strict=True):
        assert trial.params == expected.params
        assert [prompt.metrics for prompt in trial.prompts] == [prompt.metrics for prompt in expected.prompts]
        assert (trial.sparsity, trial.state) == (expected.sparsity, expected.state)
    assert result.best is not None and alone.best is not None
    assert result.best.policy == alone.best.policy
    assert measured(result.evaluation) == measured(alone.evaluation)


def test_thresholds_searched_on_two_workers_are_those_of_one(tmp_path: Path) -> None:
    found = [
        tune(config(tmp_path / name, tune__tuner="calibrate", **engine), output_dir=tmp_path / name / "tune")
        for name, engine in (("alone", {}), ("two", RAY))
    ]
    alone, two = (result.best for result in found)
    assert alone is not None and two is not None
    assert two.policy == alone.policy and two.sparsity == alone.sparsity


def test_a_worker_whose_model_never_comes_doesnt_hang_the_run(tmp_path: Path) -> None:
    (tmp_path / "stuck.py").write_text("import time\ntime.sleep(3600)\n")  # imported before the model is loaded
    hangs = {"engine.workers": 1, "engine.load_seconds": 2.0, "eval.metric_modules": (str(tmp_path / "stuck.py"),)}
    began = time.monotonic()
    with pytest.raises(ExecutorError, match=r"worker 0 .* did not load the model within 2 s; check that its host"):
        open_executor(demo_config(SMALL | RAY | hangs))
    assert time.monotonic() - began < 60.0


def test_nothing_at_an_address_is_said_soon() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    from sparsetune.executor import ray_cluster

    started = time.monotonic()
    with pytest.raises(ExecutorError, match=rf"cannot connect to Ray at {address}: Connection refused; start it with"):
        ray_cluster.check_address(address, 5.0)
    assert time.monotonic() - started < 5.0


def test_something_else_at_an_address_is_said_in_time() -> None:
    from sparsetune.executor import ray_cluster

    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ExecutorError, match=rf"{address}.*`ray start --head`, or correct --ray-address"):
            ray_cluster.check_address(address, 20.0)


@pytest.mark.parametrize("address", ["nonsense", "ray://host:1", "host:port"])
def test_an_address_that_is_none_is_said(address: str) -> None:
    from sparsetune.executor import ray_cluster

    with pytest.raises(ExecutorError, match=f"--ray-address must be .* HOST:PORT, or auto, got {address}"):
        ray_cluster.check_address(address, 5.0)
