import io
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.console import Console, ConsoleDimensions

from sparsetune.cli.console import Log
from sparsetune.cli.progress import (
    Memory,
    ProgressDisplay,
    TimeLeft,
    pace,
    pace_text,
    read_memory,
    seconds_left,
    stderr_console,
)
from sparsetune.signals import raising_interrupts
from tests.cli.events import FakeClock
from tests.cli.screen import PseudoTerminal

WORK = {"calibration": "", "trials": ""}


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[PseudoTerminal]:
    """A terminal of 80 columns."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = PseudoTerminal()
    yield terminal
    terminal.close()


def display_on(terminal: PseudoTerminal, monkeypatch: pytest.MonkeyPatch) -> ProgressDisplay:
    """Let stderr be the terminal; here, since pytest puts its own in place before the test's body."""
    monkeypatch.setattr(sys, "stderr", terminal.stream)
    console = stderr_console()
    console.size = ConsoleDimensions(80, 24)
    return ProgressDisplay(Log(), "tune demo", WORK, console, FakeClock())


def in_a_pipe(clock: FakeClock) -> ProgressDisplay:
    return ProgressDisplay(Log(), "tune demo", WORK, Console(file=io.StringIO()), clock)


def test_it_is_drawn_in_its_place_and_gone_in_the_end(
    terminal: PseudoTerminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    display = display_on(terminal, monkeypatch)
    display.start()
    for done in range(1, 4):
        display.on_progress("calibration", done, 10)
        display.refresh()
    first, bar, *_ = terminal.read().text
    assert first.startswith("tune demo")
    assert bar.startswith("calibration ") and bar.endswith("step 3/10") and " 30%" in bar
    display.close()
    assert terminal.read().text == []


def test_what_it_showed_last_stays_where_it_is_to_be_kept(
    terminal: PseudoTerminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    display = display_on(terminal, monkeypatch)
    display.start()
    display.close(keep=True)
    display.close()
    assert terminal.read().text[0].startswith("tune demo")
    assert terminal.screen.column == 0  # the next output starts on a new line


def test_lines_of_the_log_stand_above_it(terminal: PseudoTerminal, monkeypatch: pytest.MonkeyPatch) -> None:
    display = display_on(terminal, monkeypatch)
    display.start()
    Log().event("log", "the cache is full", "warning", logger="sparsetune")
    Log().event("note", "and on")
    display.refresh()
    assert terminal.read().text[:2] == ["warning: the cache is full", "and on"]
    assert terminal.screen.text[2].startswith("tune demo")
    display.close()
    assert sys.stderr is terminal.stream


def test_a_late_answer_to_ctrl_c_stands_above_what_ends_the_command(
    terminal: PseudoTerminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer() -> bool:
        time.sleep(0.3)
        Log().event("note", "stopping")
        return True

    display = display_on(terminal, monkeypatch)
    with raising_interrupts(answer):
        display.start()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        display.close(keep=True)
        Log().event("note", "interrupted")
    first, title, *_, last = terminal.read().text
    assert (first, title.split()[0], last) == ("stopping", "tune", "interrupted")


def test_an_error_while_drawing_leaves_stderr_as_it_was(
    terminal: PseudoTerminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> TimeLeft:
        raise ZeroDivisionError

    display = display_on(terminal, monkeypatch)
    display.time_left = fail
    with pytest.raises(ZeroDivisionError):
        display.start()
    assert sys.stderr is terminal.stream


def test_the_rest_takes_as_long_a_unit_as_what_was_done() -> None:
    clock = FakeClock()
    display = in_a_pipe(clock)
    display.start_phase("calibration", 40.0)
    clock.now += 20.0
    display.on_progress("calibration", 10.0, 40.0)
    task = display.phases["calibration"]
    assert (task.percentage, pace(task), seconds_left(task)) == (25.0, 2.0, 60.0)
    assert pace_text(task, "step") == "2 s a step over 10 steps"


def test_what_an_earlier_run_did_is_done_but_has_no_part_in_the_pace() -> None:
    clock = FakeClock()
    display = in_a_pipe(clock)
    display.start_phase("calibration", 40.0, reused=20.0)
    clock.now += 20.0
    display.on_progress("calibration", 30.0, 40.0)
    task = display.phases["calibration"]
    assert (task.percentage, pace(task), seconds_left(task)) == (75.0, 2.0, 20.0)


def test_nothing_is_foretold_before_anything_was_done() -> None:
    clock = FakeClock()
    display = in_a_pipe(clock)
    assert display.time_left() == TimeLeft()
    display.start_phase("calibration", 10.0)
    clock.now += 5.0
    assert seconds_left(display.phases["calibration"]) is None
    assert display.time_left().text("calibration") == "not known yet"


def test_a_phase_starts_and_ends_once() -> None:
    clock = FakeClock()
    display = in_a_pipe(clock)
    display.start_phase("calibration", 10.0)
    clock.now += 1.0
    display.start_phase("calibration", 20.0)
    assert display.phases["calibration"].total == 10.0
    clock.now += 4.0
    display.on_progress("calibration", 10.0, 10.0)
    clock.now += 3.0
    display.on_progress("trials", 1.0, 2.0)
    clock.now += 9.0
    assert display.phases["calibration"].elapsed == 5.0
    assert display.phases["trials"].elapsed == 12.0  # its first unit took the time since the last event
    assert display.phase is display.phases["trials"]


def test_time_left_in_words() -> None:
    left = TimeLeft(64.0, 454.0, "8 s a trial over 3 trials")
    assert left.text("trials") == "1:04 for trials, 7:34 in total (8 s a trial over 3 trials)"
    assert replace(left, at_most=True).text("trials").startswith("1:04 for trials, 7:34 in total at most")
    assert replace(left, total=None).text("calibration").startswith("1:04 for calibration, plus later phases")
    assert replace(left, total=64.0).text("trials") == "1:04 (8 s a trial over 3 trials)"


def test_a_gpu_that_nobody_uses_is_not_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    # Any other call fails on this stand-in, since it would initialize CUDA.
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: False)))
    assert read_memory().gpu is None


def test_without_pytorch_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    memory = read_memory()
    assert memory.gpu is None and "torch" not in sys.modules


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_process_s_memory_grows_with_what_it_holds() -> None:
    before = read_memory().process
    held = b"x" * (1 << 28)
    after = read_memory().process
    assert before is not None and after is not None
    assert after - before == pytest.approx(0.25, abs=0.05)
    assert len(held) == 1 << 28


def test_what_is_not_known_is_not_said() -> None:
    assert Memory().text == ""
    assert Memory(process=1.25).text == "process 1.2 GiB"
    assert Memory(3.2, 21.4, 25.0, 79.6).text == "GPU 21.4 of 79.6 GiB, peak 25.0, process 3.2 GiB"


@pytest.mark.gpu
def test_a_gpu_in_use_tells_what_is_held_of_it() -> None:
    import torch

    held = torch.zeros(1 << 28, device="cuda")  # 1 GiB
    memory = read_memory()
    assert memory.gpu is not None and memory.gpu_peak is not None and memory.gpu_total is not None
    assert 1.0 <= memory.gpu <= memory.gpu_peak < memory.gpu_total
    assert memory.gpu < 2.0 and held.numel() == 1 << 28
