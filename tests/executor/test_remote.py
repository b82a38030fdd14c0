"""The worker's side, in this process: Ray adds only the connection."""

import logging
import pickle
import threading
import time
from dataclasses import dataclass

import pytest
import torch

from sparsetune.errors import GenerationError, ModelError
from sparsetune.executor import Emit, ModelSession, Started, StepDone
from sparsetune.executor.remote_worker import Ended, LogRecord, RemoteWorker, absolute, deciding_versions
from sparsetune.models.pipelines import demo_config


@dataclass(frozen=True)
class Steps:
    number: int
    problem: Exception | None = None

    def run(self, session: ModelSession, emit: Emit) -> int:
        for step in range(self.number):
            emit(StepDone("trials", "sparse", step + 1, self.number))
        logging.getLogger("sparsetune.test").warning("said")
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
def worker() -> RemoteWorker:
    worker = RemoteWorker(3, demo_config({"model.device": "cpu"}), torch.get_num_threads())
    assert worker.load() is None
    return worker


def test_it_says_who_it_is(worker: RemoteWorker) -> None:
    hello = worker.hello()
    assert (hello.worker.index, hello.worker.gpus) == (3, ())
    assert hello.versions == deciding_versions() and "torch" in hello.versions
    assert hello.kind.startswith("cpu")


def test_what_a_task_tells_comes_in_order_and_its_end_last(worker: RemoteWorker) -> None:
    told = list(worker.run(1, Steps(2)))
    assert told[:3] == [Started(), StepDone("trials", "sparse", 1, 2), StepDone("trials", "sparse", 2, 2)]
    assert told[3:] == [LogRecord("sparsetune.test", logging.WARNING, "said"), Ended(2)]
    assert pickle.loads(pickle.dumps(told)) == told


def test_a_users_error_and_a_fault_of_the_program_are_told_apart(worker: RemoteWorker) -> None:
    ended = list(worker.run(2, Steps(0, GenerationError("all are black"))))[-1]
    assert isinstance(ended.error, GenerationError) and str(ended.error) == "all are black"
    ended = list(worker.run(3, Steps(0, ZeroDivisionError("division by zero"))))[-1]
    assert (ended.error, ended.crash) == (None, "ZeroDivisionError: division by zero")


def test_a_task_that_nobody_wants_stops_at_its_next_step(worker: RemoteWorker) -> None:
    stream = worker.run(4, Endless())
    assert next(stream) == Started()
    threading.Timer(0.1, worker.stop, (4,)).start()
    assert list(stream)[-1] == Ended()
    assert list(worker.run(5, Steps(1)))[-1] == Ended(1)


def test_a_model_that_cant_be_loaded_is_said() -> None:
    problem = RemoteWorker(0, demo_config({"model.source": "./nowhere"}), 1).load()
    assert isinstance(problem, ModelError)


def test_paths_mean_the_same_in_another_folder(working_folder) -> None:
    (working_folder / "model").mkdir()
    (working_folder / "demo").mkdir()
    config = absolute(demo_config({"model.source": "model"}))
    assert config.model.source == str(working_folder / "model")
    assert absolute(demo_config({})).model.source == "demo"
    assert absolute(demo_config({"model.source": "owner/name"})).model.source == "owner/name"
