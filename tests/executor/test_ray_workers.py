"""How the Ray executor replaces, refuses and adds workers; actors are simulated, Ray is not started."""

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from sparsetune.errors import ExecutorError, ModelError
from sparsetune.executor import Event, Started, Worker
from sparsetune.executor.ray_worker import TaskResult
from sparsetune.executor.worker_plan import Node, WorkerInfo, WorkerPlan, package_versions
from sparsetune.models.pipelines import demo_config

ray = pytest.importorskip("ray", reason="the extra ray isn't installed")

from sparsetune.executor import ray_executor  # noqa: E402 - Ray may be missing
from sparsetune.executor.ray_executor import RayExecutor  # noqa: E402

pytestmark = pytest.mark.slow  # Ray takes seconds to import

Answer = Callable[[], Any]


class Actor:
    """Actor whose `info`, `load` and `run` call given functions; they raise after it was killed."""

    def __init__(self, index: int, kind: str = "cpu", load: Answer = lambda: None, run: Any = None) -> None:
        self.index, self.killed, self.stopped = index, threading.Event(), []
        worker = Worker(index, "node7", "cpu", 100 + index)
        self.info = SimpleNamespace(remote=lambda: lambda: WorkerInfo(worker, kind, package_versions()))
        self.load = SimpleNamespace(remote=lambda: load)
        self.stop = SimpleNamespace(remote=self.stopped.append)
        stream = run or (lambda task: iter([lambda: Started(), lambda: TaskResult(task)]))
        self.run = SimpleNamespace(options=lambda num_returns: SimpleNamespace(remote=lambda _, task: stream(task)))


class Cluster:
    """Starts the given actors in order, and working ones after them."""

    def __init__(self, *actors: Callable[[int], Actor]) -> None:
        self.planned = list(actors)
        self.started: list[Actor] = []
        self.nodes = (Node(2),)

    def start_worker(self, index: int, *_: object) -> Actor:
        self.started.append((self.planned.pop(0) if self.planned else Actor)(index))
        return self.started[-1]

    def cause_of_loss(self, error: Exception, host: str | None) -> str:
        return "its process ended"

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(answer: Answer, timeout: float | None = None) -> Any:
        return answer()

    monkeypatch.setattr(ray_executor, "ray", SimpleNamespace(get=get, kill=lambda actor: actor.killed.set()))
    monkeypatch.setattr(ray_executor, "_NEW_HOSTS_SECONDS", 0.01)


@pytest.fixture
def opened(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RayExecutor]]:
    executors = []

    def open_executor(cluster: Cluster, num_workers: int = 1, grows: bool = False, **settings: Any) -> RayExecutor:
        monkeypatch.setattr(ray_executor, "Cluster", lambda address, seconds: cluster)
        plan = WorkerPlan(num_workers, 1, 0.0, grows)
        monkeypatch.setattr(ray_executor, "plan_workers", lambda engine, device, nodes: plan)
        executors.append(RayExecutor(demo_config({"cache.dir": tmp_path} | settings)))
        return executors[-1]

    yield open_executor
    for executor in executors:
        executor.close()


def raises(error: Exception) -> Answer:
    def answer() -> Any:
        raise error

    return answer


def dies_while_loading(index: int) -> Actor:
    return Actor(index, load=raises(ray.exceptions.RayActorError()))


def hangs_while_loading(index: int) -> Actor:
    return Actor(index, load=raises(ray.exceptions.GetTimeoutError()))


def dies_while_running(index: int) -> Actor:
    return Actor(index, run=lambda task: iter([lambda: Started()]))


def test_a_worker_that_dies_while_loading_is_replaced_at_most_twice_in_a_row(opened) -> None:
    cluster = Cluster(*[dies_while_loading] * 3)
    with pytest.raises(ExecutorError, match="3 workers in a row were lost before they had loaded the model: its proc"):
        opened(cluster)
    assert len(cluster.started) == 3 and all(actor.killed.is_set() for actor in cluster.started)


def test_a_worker_that_loads_at_the_third_try_is_used(opened) -> None:
    executor = opened(Cluster(dies_while_loading, dies_while_loading))
    assert [incident.change for incident in executor.incidents] == ["lost", "lost"]
    assert executor.submit("a task").result(10) == "a task"


def test_a_lost_worker_is_replaced_and_its_task_is_run_again(opened) -> None:
    cluster, events = Cluster(dies_while_running), queue.SimpleQueue[Event]()
    executor = opened(cluster)
    future = executor.submit("a task", events.put)
    assert future.result(10) == "a task"
    assert future.worker == Worker(1, "node7", "cpu", 101)
    kinds = [type(events.get(timeout=10).what).__name__ for _ in range(4)]
    assert kinds == ["Started", "Incident", "Incident", "Started"]
    texts = [incident.text for incident in executor.incidents]
    assert texts[0] == "worker 0 (node7) was lost (its process ended); its task is run again by another worker"
    assert texts[1] == "worker 1 (node7) joined"


def test_a_worker_that_never_loads_the_model_is_refused_and_the_last_one_fails_the_tasks(opened) -> None:
    cluster = Cluster(dies_while_running, hangs_while_loading)
    executor = opened(cluster, **{"engine.load_seconds": 7.0})
    with pytest.raises(ExecutorError, match=r"worker 1 \(node7\) did not load the model within 7 s; check that its"):
        executor.submit("a task").result(10)
    with pytest.raises(ExecutorError, match="did not load"):
        executor.submit("another").result(10)


def test_a_model_that_cannot_be_loaded_is_raised_at_the_start(opened) -> None:
    with pytest.raises(ModelError, match="no such model"):
        opened(Cluster(lambda index: Actor(index, load=lambda: ModelError("no such model"))))


def test_workers_are_added_for_hosts_that_join(opened) -> None:
    cluster = Cluster()
    executor = opened(cluster, 2, grows=True)
    cluster.nodes = (Node(2), Node(1))
    for _ in range(1000):
        if len(executor.workers) == 3:
            break
        threading.Event().wait(0.01)
    assert len(executor.workers) == 3 == len(cluster.started)


def test_an_error_of_the_callback_stops_the_task_and_is_its_result(opened) -> None:
    resumed = threading.Event()

    def run(task: object) -> Iterator[Answer]:
        yield lambda: "a step"
        resumed.wait(10)
        yield lambda: TaskResult()

    cluster = Cluster(lambda index: Actor(index, run=run))
    executor = opened(cluster)
    with pytest.raises(KeyboardInterrupt):
        executor.submit("a task", lambda event: raises(KeyboardInterrupt())()).result(10)
    assert len(cluster.started[0].stopped) == 1
    resumed.set()


def test_cancel_all_cancels_running_and_waiting_tasks(opened) -> None:
    started, resumed = threading.Event(), threading.Event()

    def run(task: object) -> Iterator[Answer]:
        started.set()
        resumed.wait(10)
        yield lambda: TaskResult(task)

    executor = opened(Cluster(lambda index: Actor(index, run=run)))
    futures = [executor.submit(number) for number in range(3)]
    started.wait(10)
    executor.cancel_all()
    assert all(isinstance(future.exception(10), ray_executor.CancelledError) for future in futures)
    resumed.set()
    assert executor.submit("a task").result(10) == "a task"


def test_a_warning_is_logged_once_for_all_workers(opened, caplog: pytest.LogCaptureFixture) -> None:
    kinds = ("cuda NVIDIA H100", "cuda NVIDIA A100", "cuda NVIDIA H100")
    cluster = Cluster(*[lambda index, kind=kind: Actor(index, kind) for kind in kinds])
    with caplog.at_level(logging.INFO):
        opened(cluster, 3)
    (record,) = [record for record in caplog.records if "different devices" in record.getMessage()]
    assert "(cuda NVIDIA A100, cuda NVIDIA H100)" in record.getMessage()
