import io
import json
import sys
from pathlib import Path

import pytest

from sparsetune.cli.colour import colour_wanted
from sparsetune.cli.log import JsonLog, Log, TextLog, make_log
from sparsetune.cli.log_events import COMMON, documentation

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "log-events.md"


def say_three(log: Log) -> None:
    log.say("loading", "loading demo ...", model="demo")
    log.say("log", "the cache is full", "warning", logger="sparsetune.evaluation")
    log.say("error", "it must hold", "error", error_type="ModelError", exit_code=1)


def test_text_is_a_line_an_event_and_what_went_wrong_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    say_three(TextLog())
    assert capsys.readouterr().err == "loading demo ...\nwarning: the cache is full\nsparsetune: it must hold\n"


def test_text_leaves_out_what_only_programs_need(capsys: pytest.CaptureFixture[str]) -> None:
    TextLog().say("study_end", "study demo", best_trial=1, seconds=2.0, interrupted=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_quiet_says_errors_alone(log_format: str, capsys: pytest.CaptureFixture[str]) -> None:
    say_three(make_log(log_format, quiet=True))  # type: ignore[arg-type]
    (line,) = capsys.readouterr().err.splitlines()
    assert "it must hold" in line


def test_json_is_one_object_a_line_with_the_promised_fields() -> None:
    stream = io.StringIO()
    say_three(JsonLog(stream=stream))
    loading, warning, error = map(json.loads, stream.getvalue().splitlines())
    assert list(loading) == [*COMMON, "model"]
    assert (loading["event"], loading["level"], loading["message"]) == ("loading", "info", "loading demo ...")
    assert loading["time"].endswith("+00:00")
    assert (warning["level"], warning["logger"]) == ("warning", "sparsetune.evaluation")
    assert (error["error_type"], error["exit_code"]) == ("ModelError", 1)


def test_json_has_null_for_what_is_no_number() -> None:
    stream = io.StringIO()
    metrics = {"psnr": float("nan"), "ssim": 0.5, "all": (float("inf"), 1)}
    JsonLog(stream=stream).say("pair", "a", name="a", metrics=metrics)
    assert json.loads(stream.getvalue())["metrics"] == {"psnr": None, "ssim": 0.5, "all": [None, 1]}


def test_fields_that_are_not_promised_are_our_own_bug() -> None:
    with pytest.raises(AssertionError, match="loading must have"):
        TextLog().say("loading", "loading demo ...", modell="demo")


def test_what_libraries_print_becomes_events_line_by_line() -> None:
    stream = io.StringIO()
    with JsonLog(stream=stream).gathered():
        print("chatter", end="")
        print(" goes on\nand on")
        sys.stderr.write("without an end")
    said = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(one["event"], one["message"]) for one in said] == [
        ("output", "chatter goes on"), ("output", "and on"), ("output", "without an end"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, None),
        ({"NO_COLOR": "1"}, False),
        ({"NO_COLOR": ""}, None),
        ({"TERM": "dumb"}, False),
        ({"TERM": "xterm-256color", "FORCE_COLOR": "1"}, True),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, False),
    ],
)
def test_colours_are_as_the_environment_says(environ: dict[str, str], wanted: bool | None) -> None:
    assert colour_wanted(environ) is wanted


@pytest.mark.parametrize(("variable", "coloured"), [("FORCE_COLOR", True), ("NO_COLOR", False)])
def test_warnings_are_coloured_unless_told_not_to(
    variable: str, coloured: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(variable, "1")
    TextLog().say("log", "the cache is full", "warning", logger="sparsetune")
    assert ("\x1b[33mwarning: \x1b[0m" in capsys.readouterr().err) is coloured


def test_the_documentation_has_every_event_and_field() -> None:
    assert documentation() in DOCUMENTATION.read_text(encoding="utf-8")
