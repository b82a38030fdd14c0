import io
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from sparsetune.cli.console import (
    QUIET_ENVIRONMENT,
    GlobalOptions,
    Log,
    colour_wanted,
    only_results_on_stdout,
    quiet_libraries,
)
from sparsetune.cli.log_schema import COMMON, EVENTS

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "log-events.md"


def log_three(log: Log) -> None:
    log.event("loading", "loading demo ...", model="demo")
    log.event("log", "the cache is full", "warning", logger="sparsetune.evaluation")
    log.event("error", "it must hold", "error", error_type="ModelError", exit_code=1)


def test_text_is_a_line_an_event_and_what_went_wrong_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    log_three(Log())
    assert capsys.readouterr().err == "loading demo ...\nwarning: the cache is full\nsparsetune: it must hold\n"


def test_text_leaves_out_what_only_programs_need(capsys: pytest.CaptureFixture[str]) -> None:
    Log().event("study_end", "study demo", best_trial=1, seconds=2.0, interrupted=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_quiet_says_errors_alone(log_format: str, capsys: pytest.CaptureFixture[str]) -> None:
    log_three(GlobalOptions(quiet=True, log_format=log_format).log)  # type: ignore[arg-type]
    (line,) = capsys.readouterr().err.splitlines()
    assert "it must hold" in line


def test_json_is_one_object_a_line_with_the_promised_fields() -> None:
    stream = io.StringIO()
    log_three(Log("json", stream=stream))
    loading, warning, error = map(json.loads, stream.getvalue().splitlines())
    assert list(loading) == [*COMMON, "model"]
    assert (loading["event"], loading["level"], loading["message"]) == ("loading", "info", "loading demo ...")
    assert loading["time"].endswith("+00:00")
    assert (warning["level"], warning["logger"]) == ("warning", "sparsetune.evaluation")
    assert (error["error_type"], error["exit_code"]) == ("ModelError", 1)


def test_json_has_null_for_what_is_no_number() -> None:
    stream = io.StringIO()
    metrics = {"psnr": float("nan"), "ssim": 0.5, "all": (float("inf"), 1)}
    Log("json", stream=stream).event("pair", "a", name="a", metrics=metrics)
    assert json.loads(stream.getvalue())["metrics"] == {"psnr": None, "ssim": 0.5, "all": [None, 1]}


def test_fields_that_are_not_promised_are_our_own_bug() -> None:
    with pytest.raises(AssertionError, match="loading must have"):
        Log().event("loading", "loading demo ...", modell="demo")


def test_what_libraries_print_becomes_events_line_by_line() -> None:
    stream = io.StringIO()
    with Log("json", stream=stream).capture_output():
        print("chatter", end="")
        print(" goes on\nand on")
        sys.stderr.write("without an end")
    events_logged = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(one["event"], one["message"]) for one in events_logged] == [
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
    Log().event("log", "the cache is full", "warning", logger="sparsetune")
    assert ("\x1b[33mwarning: \x1b[0m" in capsys.readouterr().err) is coloured


def documentation() -> str:
    """Return the events and fields as Markdown."""
    lines = ["| field | of every line |", "| --- | --- |"]
    lines += [f"| `{name}` | {text} |" for name, text in COMMON.items()]
    lines += ["", "| event | field | |", "| --- | --- | --- |"]
    for event, fields in EVENTS.items():
        rows = list(fields.items()) or [("", "no further fields")]
        lines += [
            f"| {f'`{event}`' if place == 0 else ''} | {f'`{name}`' if name else ''} | {text} |"
            for place, (name, text) in enumerate(rows)
        ]
    return "\n".join(lines)


def test_the_documentation_has_every_event_and_field() -> None:
    assert documentation() in DOCUMENTATION.read_text(encoding="utf-8")


class LibraryWarning(UserWarning):
    """A warning category of a library."""


def warn_as(module: str, text: str, category: type[Warning] = UserWarning) -> None:
    warnings.warn_explicit(text, category, "file.py", 1, module=module)


def test_our_warnings_are_one_line_each_and_others_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    with quiet_libraries():
        warn_as("sparsetune.attention.backends", "the kernel\nis missing")
        warn_as("torch.nn", "chatter")
        warn_as("sparsetune.tuning.search.study", "this call is on its way out", FutureWarning)
        warn_as("sparsetune.tuning.search.study", "this feature is experimental", LibraryWarning)
    assert capsys.readouterr().err == "warning: the kernel is missing\n"


def test_our_log_records_are_shown_and_others_only_as_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with quiet_libraries():
        logging.getLogger("sparsetune.evaluation").info("waiting")
        logging.getLogger("sparsetune.evaluation").warning("damaged")
        logging.getLogger("elsewhere").warning("chatter")
        logging.getLogger("elsewhere").error("lost")
    logging.getLogger("sparsetune.evaluation").info("after the command")
    assert capsys.readouterr().err == "waiting\nwarning: damaged\nerror: lost\n"


def test_what_libraries_print_does_not_reach_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with only_results_on_stdout():
        print("chatter")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "chatter\n")


def test_user_s_own_environment_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    with quiet_libraries():
        assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"


@pytest.mark.slow
def test_libraries_take_the_environment_as_their_verbosity() -> None:
    code = (
        "from diffusers.utils import logging as a; from transformers.utils import logging as b; import tqdm\n"
        "list(tqdm.tqdm(range(3)))\n"
        "print(a.get_verbosity(), b.get_verbosity())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | QUIET_ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert (done.stdout.split(), done.stderr) == ([str(logging.ERROR)] * 2, "")
