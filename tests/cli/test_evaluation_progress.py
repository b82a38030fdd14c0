import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from sparsetune.cli.console import Log
from sparsetune.cli.evaluation_progress import EvaluationProgress, EvaluationState
from sparsetune.cli.progress import ProgressDisplay, SteadyConsole, is_live
from sparsetune.cli.tables import clock_text
from sparsetune.evaluation.events import EvaluationEnded, EvaluationStarted, PromptDone, PromptStarted
from sparsetune.evaluation.prompt import PromptResult
from sparsetune.executor import Side, StepDone
from tests.cli.events import FakeClock, done, evaluation, judged
from tests.cli.screen import PseudoTerminal
from tests.tracking.conftest import make_result


class Terminal(io.StringIO):
    """A file whose isatty() is true."""

    def isatty(self) -> bool:
        return True


def watch(log: Log, result: PromptResult, seconds: float = 1.0, console: Console | None = None) -> None:
    time = FakeClock()
    display = EvaluationProgress(ProgressDisplay(log, "eval demo", None, console or Console(file=io.StringIO()), time))
    display.on_start(EvaluationStarted({}, ("a red circle", "b"), 10, ("dense", "sparse"), ("psnr",)))
    display.on_prompt_start(PromptStarted(0, 2, "a red circle", 1))
    display.on_step(StepDone("evaluation", "dense", 10, 10, 0, 4, cached=True))
    for step in range(1, 11):
        time.now += seconds
        display.on_step(StepDone("evaluation", "sparse", step, 10, 0, 4))
    display.on_prompt(PromptDone(0, 2, result, {"dense": Path("x.mp4")}))
    display.on_prompt_start(PromptStarted(1, 2, "b", 1))
    display.on_end(EvaluationEnded(make_result(), (result,)))


def test_plain_lines_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    watch(Log(), judged(38.453))
    assert capsys.readouterr().err.splitlines() == [
        "prompt 1/2: a red circle",
        "  psnr 38.45 dB, frame_cosine 0.990000, sparsity 0.250, dense cached, sparse 3.0 s",
        "prompt 2/2: b (0:20 left)",
    ]


def test_failed_prompt_is_shown_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    watch(Log(), judged(error="all frames are black"))
    assert "  failed: all frames are black\n" in capsys.readouterr().err


def test_long_work_says_every_minute_how_far_it_has_come(capsys: pytest.CaptureFixture[str]) -> None:
    watch(Log(), judged(), seconds=40.0)
    logged = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evaluation")]
    assert logged[:2] == [
        "evaluation 7%, left: 18:40 (40 s a step over 2 steps)",
        "evaluation 13%, left: 17:20 (40 s a step over 4 steps)",
    ]
    assert len(logged) == 5


def test_json_has_every_event_of_an_evaluation() -> None:
    stream = io.StringIO()
    watch(Log("json", stream=stream), judged(38.453), seconds=6.0)
    logged = [json.loads(line) for line in stream.getvalue().splitlines()]
    start, first, *progress, end, second, ended = logged
    assert [one["event"] for one in (start, first, end, second, ended)] == [
        "evaluation_start", "prompt_start", "prompt_end", "prompt_start", "evaluation_end",
    ]  # fmt: skip
    assert [one["event"] for one in progress] == ["progress"] * 5
    assert (progress[0]["phase"], progress[0]["seconds_left"]) == ("evaluation", 168.0)
    assert end["metrics"] == {"frame_cosine": 0.99, "psnr": 38.453}
    assert (ended["score"], ended["verdict"], ended["gate_passed"]) == (85, "good", False)


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    watch(Log(quiet=True), judged(), seconds=40.0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("file", "environ", "log", "live"),
    [
        (Terminal, {"TERM": "xterm"}, Log(), True),
        (Terminal, {"TERM": "xterm", "NO_COLOR": "1"}, Log(), True),
        (Terminal, {"TERM": "dumb"}, Log(), False),
        (Terminal, {"TERM": "xterm"}, Log(quiet=True), False),
        (Terminal, {"TERM": "xterm"}, Log("json", stream=io.StringIO()), False),
        (io.StringIO, {"TERM": "xterm"}, Log(), False),
        (io.StringIO, {"TERM": "xterm", "FORCE_COLOR": "1"}, Log(), False),
    ],
)
def test_a_view_is_drawn_on_terminals_for_people_only(
    file: Callable[[], io.StringIO], environ: dict[str, str], log: Log, live: bool
) -> None:
    assert is_live(log, Console(file=file(), _environ=environ)) is live


@pytest.mark.parametrize(("variable", "coloured"), [("SOMETHING", True), ("NO_COLOR", False)])
def test_a_terminal_gets_the_view_in_colours_unless_told_not_to(variable: str, coloured: bool) -> None:
    terminal = PseudoTerminal()
    environ = {"TERM": "xterm-256color", variable: "1"}
    console = SteadyConsole(file=terminal.stream, width=80, height=24, _environ=environ)
    display = EvaluationProgress(ProgressDisplay(Log(), "eval demo", None, console, FakeClock()))
    display.on_start(EvaluationStarted({}, ("a red circle", "b"), 10, ("dense", "sparse"), ("psnr",)))
    display.on_prompt_start(PromptStarted(0, 2, "a red circle", 1))
    display.on_step(StepDone("evaluation", "sparse", 5, 10, 0, 4))
    display.on_failure(KeyboardInterrupt())
    screen = terminal.read()
    terminal.close()
    assert "prompt      1/2  a red circle" in screen.text
    assert bool(re.search(r"\x1b\[[39]\d", screen.raw)) is coloured


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (65, "1:05"), (3725, "1:02:05")])
def test_clock(seconds: float, text: str) -> None:
    assert clock_text(seconds) == text


def begun(cached: tuple[Side, ...] = (), ladder: bool = False) -> EvaluationState:
    return EvaluationState(evaluation(ladder=ladder), cached)


def test_work_is_the_steps_of_all_renderings_and_cached_ones_are_taken_out() -> None:
    state = begun()
    assert state.total == 80
    state.on_step(StepDone("evaluation", "dense", 10, 10, 0, 4, cached=True))
    assert (state.total, state.done) == (70, 0)
    state.on_step(StepDone("evaluation", "sparse", 1, 10, 0, 4))
    assert state.rendering is not None
    assert (state.done, state.rendering.side, state.rendering.step) == (1, "sparse", 1)


def test_a_side_that_was_thought_cached_and_is_not_comes_on_top() -> None:
    state = begun(("dense",))
    assert state.total == 40
    state.on_step(StepDone("evaluation", "dense", 10, 10, 0, 4, cached=True))
    assert state.total == 40
    state.on_step(StepDone("evaluation", "dense", 1, 10, 0, 4))
    state.on_step(StepDone("evaluation", "dense", 2, 10, 0, 4))
    assert (state.total, state.done) == (50, 2)


def test_the_ladder_has_four_renderings() -> None:
    assert begun(ladder=True).total == 160


def test_figures_so_far_are_means_and_the_worst_over_prompts_that_have_some() -> None:
    state = begun()
    assert (state.mean("psnr"), state.sparsity, state.worst) == (None, None, None)
    for one in (done(0, 38.0), done(1, 34.0), done(2, error="all frames are black")):
        state.on_prompt(one)
    assert (state.mean("psnr"), state.sparsity) == (36.0, 0.25)
    assert state.worst is not None and state.worst.index == 1


def test_a_prompt_that_failed_counts_as_done() -> None:
    state = begun()
    state.on_prompt(done(0, error="all frames are black"))
    assert state.done / state.total == 0.25


def test_the_view_shows_its_prompts_figures_and_failures() -> None:
    file = io.StringIO()
    console = Console(file=file, width=80, height=24)
    display = ProgressDisplay(Log(), "eval demo", None, console, FakeClock())
    listener = EvaluationProgress(display)
    listener.on_start(evaluation())
    for one in (done(0, 37.0), done(1, error="all frames are black")):
        listener.on_prompt_start(PromptStarted(one.index, 4, "a\nprompt", 1))
        listener.on_prompt(one)
    listener.on_prompt_start(PromptStarted(2, 4, "a blue square", 1))
    listener.on_step(StepDone("evaluation", "sparse", 6, 10, 2, 4))
    console.print(display)
    lines = [line.rstrip() for line in file.getvalue().splitlines()]
    assert lines[0] == "eval demo  0:00"
    assert lines[1].startswith("evaluation ") and lines[1].endswith("2 of 4 prompts")
    assert "policy      the tuned checkpoint" in lines
    assert "prompt      3/4  a blue square" in lines
    assert "rendering   sparse, step 6/10" in lines
    assert "latest      prompt 2  failed: all frames are black" in lines
    assert "            prompt 1  sparsity 0.250, psnr 37.00 dB, frame_cosine 0.9900, 3.0 s" in lines
    text = " ".join(file.getvalue().split())
    assert "mean sparsity 0.250, psnr 37.00 dB (worst 37.00), the worst is prompt 1" in text
