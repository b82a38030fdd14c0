import threading
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from sparsetune.errors import GenerationError
from sparsetune.executor import Event, LocalExecutor, ModelSession, Started, StepDone, run_all, run_one
from tests.executor.engines import FakeExecutor


@dataclass(frozen=True)
class Square:
    number: int

    def run(self, session: ModelSession, emit) -> int:
        emit(StepDone("trials", "sparse", 1, 1))
        if self.number < 0:
            raise GenerationError("a number must be positive")
        return self.number**2


@dataclass(frozen=True)
class Interrupted:
    def run(self, session: ModelSession, emit) -> None:
        raise KeyboardInterrupt


def test_results_have_their_index_whichever_task_ends_first() -> None:
    executor = FakeExecutor(3, lambda in_flight: in_flight - 1)
    events: list[tuple[int, Event]] = []
    threads = set()

    def on_event(index: int, event: Event) -> None:
        events.append((index, event))
        threads.add(threading.current_thread())

    finished = list(run_all(executor, [Square(number) for number in range(7)], on_event))
    assert {index: future.result() for index, future in finished} == {number: number**2 for number in range(7)}
    assert [index for index, _ in finished] != list(range(7))
    assert executor.most_in_flight == 3 and threads == {threading.current_thread()}
    for number in range(7):
        assert [type(event.what) for index, event in events if index == number] == [Started, StepDone]


def test_no_task_is_submitted_once_more_returns_false() -> None:
    answers = iter([True, True, True, False])
    finished = list(run_all(FakeExecutor(2), [Square(1)] * 9, more=lambda: next(answers, False)))
    assert len(finished) == 3  # tasks in flight are still finished


def test_run_one_returns_the_result_or_raises_the_error() -> None:
    executor = FakeExecutor()
    assert run_one(executor, Square(4)) == 16
    with pytest.raises(GenerationError, match="must be positive"):
        run_one(executor, Square(-1))


def test_the_local_executor_runs_a_task_within_submit_and_is_interrupted_there() -> None:
    loaded = SimpleNamespace(device=torch.device("cpu"))
    executor = LocalExecutor(ModelSession(SimpleNamespace(loaded=loaded)))
    events: list[Event] = []
    future = executor.submit(Square(4), events.append)
    assert future.done() and future.result() == 16 and (future.worker,) == executor.workers
    assert [type(event.what) for event in events] == [Started, StepDone]
    with pytest.raises(KeyboardInterrupt):
        executor.submit(Interrupted())
    assert isinstance(executor.submit(Square(-1)).exception(), GenerationError)


def test_an_error_of_the_callback_is_the_result() -> None:
    loaded = SimpleNamespace(device=torch.device("cpu"))
    executor = LocalExecutor(ModelSession(SimpleNamespace(loaded=loaded)))

    def fail(event: Event) -> None:
        raise ValueError("a listener's bug")

    with pytest.raises(ValueError, match="a listener's bug"):
        executor.submit(Square(4), fail).result()
