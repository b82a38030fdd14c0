"""Who is hired in the place of workers that were lost; no Ray is started for it."""

import logging
from collections import deque
from types import SimpleNamespace

import pytest

from sparsetune.errors import ExecutorError
from sparsetune.executor.events import Worker
from sparsetune.executor.remote_worker import deciding_versions
from sparsetune.executor.worker_plan import WorkerInfo
from sparsetune.models.pipelines import demo_config

ray = pytest.importorskip("ray", reason="the extra ray isn't installed")

from sparsetune.executor.ray_executor import RayExecutor, _Work  # noqa: E402 - Ray may be missing
from sparsetune.executor.ray_worker import WorkerHandle  # noqa: E402

pytestmark = pytest.mark.slow  # Ray takes seconds to import
TORCH = deciding_versions()["torch"].partition("+")[0]


class Hiring(RayExecutor):
    def __init__(self, *hands: object) -> None:
        self._hands, self._stillborn, self._refused, self.hired = list(hands), 0, 0, 0
        self._incidents, self._untold, self._running, self._waiting, self._said = [], [], {}, deque(), set()

    def _hire(self) -> None:
        self.hired += 1


def test_workers_that_never_load_the_model_are_not_hired_without_end() -> None:
    engine = Hiring(SimpleNamespace(loaded=True))
    for _ in range(5):
        engine._replace(SimpleNamespace(loaded=False), "its process ended")
    assert (engine.hired, engine._refused) == (2, 3)
    engine._replace(SimpleNamespace(loaded=True), "its process ended")  # one that worked is replaced again
    assert engine.hired == 3


def test_where_none_loads_the_model_the_work_ends() -> None:
    engine = Hiring()
    for _ in range(2):
        engine._replace(SimpleNamespace(loaded=False), "its process ended")
    with pytest.raises(ExecutorError, match="must live to load the model, but 3 in a row didn't: its process ended"):
        engine._replace(SimpleNamespace(loaded=False), "its process ended")


class Actor:
    """A worker's process that does nothing, and can be ended."""

    def __init__(self) -> None:
        self.load = SimpleNamespace(remote=lambda: "loading")


def test_a_worker_that_never_has_the_model_is_left_out_and_the_last_such_one_ends_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended: list[object] = []
    monkeypatch.setattr(ray, "kill", lambda actor, no_restart: ended.append(actor))
    engine = Hiring(*(WorkerHandle(index, Actor(), None) for index in range(2)))
    engine._config = demo_config({"engine.load_seconds": 7.0})
    for hand in engine._hands:
        hand.load()
    engine._leave_out_stuck()
    assert len(engine._hands) == 2
    first, second = engine._hands
    first.loads_since -= 8.0
    engine._leave_out_stuck()
    assert engine._hands == [second] and ended == [first.actor] and engine._refused == 1
    assert "is not used: a worker must load the model within 7 s, but worker 0" in engine.incidents[0].text
    second.loads_since -= 8.0
    with pytest.raises(
        ExecutorError, match=r"worker 1 \(unknown host\) didn't; look whether its host reaches the weights"
    ):
        engine._leave_out_stuck()
    assert engine.hired == 0


def test_what_a_worker_left_out_had_in_hand_is_next_in_line() -> None:
    sick, other = (Worker(index, "node7", "cpu", 100) for index in range(2))
    engine = Hiring(
        *(WorkerHandle(each.index, Actor(), None, WorkerInfo(each, "cpu", {}), True) for each in (sick, other))
    )
    work = engine._running[5] = _Work(5, None)
    engine._hands[0].ticket = 5
    engine._waiting.append(_Work(6, None))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ray, "kill", lambda actor, no_restart: None)
        engine.leave_out(sick, "three renderings failed on it")
    assert engine.workers == (other,) and engine._waiting[0] is work
    assert engine.incidents[0].text == "worker 0 (node7) is not used: three renderings failed on it"


def test_what_is_said_of_workers_that_join_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    engine = Hiring()
    engine._config, engine._measures_speed = demo_config({}), False
    kinds = ("cuda NVIDIA H100", "cuda NVIDIA A100", "cuda NVIDIA H100", "cuda NVIDIA L40S")
    hellos = [
        WorkerInfo(Worker(index, "node7", kind, 1), kind, deciding_versions() | {"torch": f"{TORCH}+other"})
        for index, kind in enumerate(kinds)
    ]
    with caplog.at_level(logging.INFO):
        for count in range(1, 5):
            engine._check(hellos[:count])
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING", "WARNING"]
    assert "(cuda NVIDIA A100, cuda NVIDIA H100, cuda NVIDIA L40S)" in caplog.records[-1].getMessage()
