import io
from pathlib import Path

import pytest
from rich.console import Console

from sparsetune.cli.display import EvaluationDisplay
from sparsetune.cli.progress import ProgressBar, clock
from sparsetune.evaluation.events import EvaluationStarted, PromptDone, PromptStarted, StepDone
from sparsetune.evaluation.pair import PromptResult

GOOD = PromptResult(
    prompt="a red circle",
    seed=1,
    metrics={"frame_cosine": 0.9871, "psnr": 38.453},
    sparsity=0.25,
    seconds_dense=4.0,
    seconds_sparse=3.0,
    dense_cached=True,
)


def watch(console: Console, result: PromptResult) -> str:
    display = EvaluationDisplay(ProgressBar(console))
    display.on_start(EvaluationStarted({}, ("a red circle",), 10, ("dense", "sparse"), ("psnr",)))
    display.on_prompt_start(PromptStarted(0, 1, "a red circle", 1))
    display.on_step(StepDone(0, "dense", 10, 10, cached=True))
    for step in range(1, 11):
        display.on_step(StepDone(0, "sparse", step, 10))
    display.on_prompt(PromptDone(0, 1, result, {"dense": Path("x.mp4")}))
    display.on_failure(KeyboardInterrupt())
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_plain_lines_where_stderr_is_no_terminal() -> None:
    text = watch(Console(file=io.StringIO(), force_terminal=False), GOOD)
    assert text.splitlines() == [
        "prompt 1/1: a red circle",
        "  frame_cosine 0.987100, psnr 38.45 dB, sparsity 0.250, dense cached, sparse 3.0 s",
    ]


def test_failed_prompt_is_shown_as_such() -> None:
    failed = PromptResult(prompt="a red circle", seed=1, error="all frames are black")
    assert "  failed: all frames are black\n" in watch(Console(file=io.StringIO(), force_terminal=False), failed)


def test_terminal_gets_a_bar_with_step_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = watch(Console(file=io.StringIO(), force_terminal=True, width=120, color_system="standard"), GOOD)
    assert "prompt 1/1, sparse, step 10/10" in text
    assert "left" in text
    assert "\x1b[3" in text


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    text = watch(Console(file=io.StringIO(), force_terminal=True, width=120), GOOD)
    assert "\x1b[3" not in text.replace("\x1b[?25", "")


def test_cached_video_takes_no_part_in_the_time_left() -> None:
    bar = ProgressBar(Console(file=io.StringIO()))
    bar.start("", 20)
    bar.skip(10)
    bar.advance(10)
    assert bar.time_left == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (65, "1:05"), (3725, "1:02:05")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
