"""Tables measured prompt by prompt by one process while others wait for its lock, and resumed after a process died."""

import functools
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from sparsetune.errors import GenerationError, TuningError
from sparsetune.tuning import prepare
from sparsetune.tuning.calibration.curves import Curves
from sparsetune.tuning.context import TimeIsUp
from sparsetune.tuning.events import TuningListener
from tests.executor.engines import FakeExecutor
from tests.tuning.tables import curves

NUM_PROMPTS = 4


@dataclass(frozen=True)
class MeasurePrompt:
    folder: Path
    index: int
    stops_at: int | None = None
    fails_at: int | None = None

    def run(self, session: object, emit: object) -> Curves:
        with (self.folder / f"{self.index}.started").open("a") as file:
            file.write(f"{os.getpid()}\n")
        if self.index == self.stops_at:
            time.sleep(60)
        if self.index == self.fails_at:
            raise GenerationError("the rendering failed")
        time.sleep(0.02)
        return curves(self.index)


class Waits(TuningListener):
    def __init__(self, then: Callable[[], None] = lambda: None) -> None:
        self.reported: list[str] = []
        self.then = then

    def on_wait(self, what: str) -> None:
        self.reported.append(what)
        self.then()


def measure(
    folder: Path, *, listener: TuningListener | None = None, more: Callable[[], bool] = lambda: True, **how: int
) -> Curves:
    context = SimpleNamespace(executor=FakeExecutor(), listeners=(listener,) if listener else (), has_time=more)
    tasks = [MeasurePrompt(folder, index, **how) for index in range(NUM_PROMPTS)]
    return prepare._measured_table(context, "calibration", folder / "curves.npz", Curves.load, tasks)


def started_by(folder: Path, index: int) -> list[int]:
    path = folder / f"{index}.started"
    return [int(line) for line in path.read_text().split()] if path.is_file() else []


def expected(folder: Path) -> bytes:
    """The file of all prompts' merged curves."""
    path = folder / "expected.npz"
    functools.reduce(Curves.merged, [curves(index) for index in range(NUM_PROMPTS)]).save(path)
    return path.read_bytes()


def forked(work: Callable[[], object]) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other tests left threads
        child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return child


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "POLL_SECONDS", 0.02)


def test_processes_at_once_measure_each_prompt_once_and_end_with_the_same_table(tmp_path: Path) -> None:
    gate, opened = os.pipe()

    def work() -> None:
        os.close(opened)
        os.read(gate, 1)  # until all of them are there
        table = measure(tmp_path)
        table.save(tmp_path / f"{os.getpid()}.out.npz")

    children = [forked(work) for _ in range(4)]
    os.close(opened)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert [len(started_by(tmp_path, index)) for index in range(NUM_PROMPTS)] == [1] * NUM_PROMPTS
    outcomes = {path.read_bytes() for path in tmp_path.glob("*.out.npz")}
    assert outcomes == {expected(tmp_path)} == {(tmp_path / "curves.npz").read_bytes()}
    assert not list(tmp_path.glob("*.lock")) and not list(tmp_path.glob("curves.*.npz"))


def test_a_killed_process_is_taken_over_from_and_no_completed_prompt_is_lost(tmp_path: Path) -> None:
    holder = forked(lambda: measure(tmp_path, stops_at=2))
    while not started_by(tmp_path, 2):
        time.sleep(0.01)

    def kill() -> None:
        os.kill(holder, 9)
        os.waitpid(holder, 0)

    waits = Waits(kill)
    measure(tmp_path, listener=waits)
    assert waits.reported == ["the calibration"]
    assert (tmp_path / "curves.npz").read_bytes() == expected(tmp_path)
    assert [started_by(tmp_path, index) for index in range(NUM_PROMPTS)] == [
        [holder], [holder], [holder, os.getpid()], [os.getpid()]
    ]  # fmt: skip


def test_the_time_limit_ends_it_with_the_completed_prompts_kept(tmp_path: Path) -> None:
    answers = iter([True, True, True])
    with pytest.raises(TimeIsUp):
        measure(tmp_path, more=lambda: next(answers, False))
    assert len(list(tmp_path.glob("curves.*.npz"))) == 3
    measure(tmp_path)
    assert (tmp_path / "curves.npz").read_bytes() == expected(tmp_path)
    assert [len(started_by(tmp_path, index)) for index in range(NUM_PROMPTS)] == [1] * NUM_PROMPTS


def test_the_time_limit_ends_the_wait_for_another_process(tmp_path: Path) -> None:
    holder = forked(lambda: measure(tmp_path, stops_at=0))
    while not started_by(tmp_path, 0):
        time.sleep(0.01)
    answers = iter([True, True])
    with pytest.raises(TimeIsUp):
        measure(tmp_path, more=lambda: next(answers, False))
    os.kill(holder, 9)
    os.waitpid(holder, 0)


def test_a_prompt_that_fails_ends_it_and_releases_the_lock(tmp_path: Path) -> None:
    with pytest.raises(GenerationError, match="the rendering failed"):
        measure(tmp_path, fails_at=1)
    measure(tmp_path)
    assert [len(started_by(tmp_path, index)) for index in range(NUM_PROMPTS)] == [1, 2, 1, 1]


def test_damaged_probes_are_named_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "curves-sensitivity.json"
    path.write_text('{"phase/0": ')
    with pytest.raises(TuningError, match=r"cannot read the probes .*-sensitivity\.json .*; remove it to probe again"):
        prepare._read_probes(path)
