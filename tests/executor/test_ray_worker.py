"""A worker of the Ray executor, run in this process without Ray."""

import logging
import pickle
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from sparsetune.errors import GenerationError, ModelError
from sparsetune.executor import Emit, ModelSession, Started, StepDone
from sparsetune.executor.ray_worker import RayWorker, TaskResult, worker_config
from sparsetune.executor.worker_plan import package_versions
from sparsetune.models.pipelines import demo_config


@dataclass(frozen=True)
class Steps:
    number: int
    problem: Exception | None = None

    def run(self, session: ModelSession, emit: Emit) -> int:
        for step in range(self.number):
            emit(StepDone("trials", "sparse", step + 1, self.number))
        logging.getLogger("sparsetune.test").warning("a warning")
        if self.problem is not None:
            raise self.problem
        return self.number


@dataclass(frozen=True)
class Endless:
    def run(self, session: ModelSession, emit: Emit) -> None:
        while True:
            emit(StepDone("trials", "sparse", 1, 2))
            time.sleep(0.01)


@pytest.fixture(scope="module")
def worker() -> RayWorker:
    worker = RayWorker(3, demo_config({"model.device": "cpu"}), torch.get_num_threads(), Path("nowhere"))
    assert worker.load() is None
    return worker


def test_info_describes_the_worker(worker: RayWorker) -> None:
    info = worker.info()
    assert (info.worker.index, info.worker.gpus) == (3, ())
    assert info.versions == package_versions() and "torch" in info.versions
    assert info.device_kind.startswith("cpu") and not info.shares_cache


def test_events_come_in_order_and_the_result_last(worker: RayWorker) -> None:
    messages = list(worker.run(1, Steps(2)))
    assert messages[:3] == [Started(), StepDone("trials", "sparse", 1, 2), StepDone("trials", "sparse", 2, 2)]
    record = messages[3]
    assert isinstance(record, logging.LogRecord)
    assert (record.name, record.levelno, record.getMessage()) == ("sparsetune.test", logging.WARNING, "a warning")
    assert messages[4:] == [TaskResult(2)]
    assert pickle.loads(pickle.dumps(messages))[4:] == messages[4:]


def test_a_bug_becomes_a_runtime_error(worker: RayWorker) -> None:
    ended = list(worker.run(2, Steps(0, GenerationError("all are black"))))[-1]
    assert isinstance(ended.error, GenerationError) and str(ended.error) == "all are black"
    ended = list(worker.run(3, Steps(0, ZeroDivisionError("division by zero"))))[-1]
    assert isinstance(ended.error, RuntimeError)
    assert str(ended.error) == "worker 3 failed: ZeroDivisionError: division by zero"


def test_a_stopped_task_ends_at_its_next_step(worker: RayWorker) -> None:
    stream = worker.run(4, Endless())
    assert next(stream) == Started()
    threading.Timer(0.1, worker.stop, (4,)).start()
    assert list(stream)[-1] == TaskResult()
    assert list(worker.run(5, Steps(1)))[-1] == TaskResult(1)


def test_load_returns_the_error_of_a_missing_model() -> None:
    problem = RayWorker(0, demo_config({"model.source": "./nowhere"}), 1, Path("nowhere")).load()
    assert isinstance(problem, ModelError)


def test_paths_become_absolute(working_folder) -> None:
    (working_folder / "model").mkdir()
    (working_folder / "demo").mkdir()
    config = worker_config(demo_config({"model.source": "model"}), "cuda")
    assert (config.model.source, config.model.device) == (str(working_folder / "model"), "cuda")
    assert worker_config(demo_config({}), "cpu").model.source == "demo"
    assert worker_config(demo_config({"model.source": "owner/name"}), "cpu").model.source == "owner/name"
