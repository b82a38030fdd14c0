from dataclasses import dataclass

import pytest

from sparsetune.errors import GenerationError
from sparsetune.executor import Event, ModelSession, Started, StepDone, run_all, run_one
from tests.executor.engines import FakeExecutor


@dataclass(frozen=True)
class Square:
    number: int

    def run(self, session: ModelSession, emit) -> int:
        emit(StepDone("trials", "sparse", 1, 1))
        if self.number < 0:
            raise GenerationError("a number must be positive")
        return self.number**2


def test_tasks_come_back_with_their_place_whoever_ends_first() -> None:
    engine = FakeExecutor(3, lambda in_hand: in_hand - 1)
    told: list[tuple[int, Event]] = []
    outcomes = list(run_all(engine, [Square(number) for number in range(7)], lambda *event: told.append(event)))
    assert {place: outcome.result() for place, outcome in outcomes} == {number: number**2 for number in range(7)}
    assert [place for place, _ in outcomes] != list(range(7))
    assert engine.most_in_flight == 3
    for place in range(7):
        assert [type(event.what) for at, event in told if at == place] == [Started, StepDone]


def test_nothing_is_handed_out_once_there_is_no_time_left() -> None:
    answers = iter([True, True, True, False])
    outcomes = list(run_all(FakeExecutor(2), [Square(1)] * 9, more=lambda: next(answers, False)))
    assert len(outcomes) == 3  # what was in hand is still taken in


def test_an_error_comes_with_its_outcome() -> None:
    engine = FakeExecutor()
    assert run_one(engine, Square(4)) == 16
    with pytest.raises(GenerationError, match="must be positive"):
        run_one(engine, Square(-1))
