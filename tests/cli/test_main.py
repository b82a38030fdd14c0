import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest
from click.testing import CliRunner

from sparsetune.cli.main import COMMANDS, main
from sparsetune.doctor import Finding
from sparsetune.errors import CheckpointError, ConfigError, GateError, SparsetuneError

if TYPE_CHECKING:
    from tests.tracking.recorded import Place


def run(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, list(args))
    return result.exit_code, result.stdout, result.stderr


HEAVY = {"torch", "mlflow", "diffusers", "transformers", "optuna", "numpy", "pydantic", "yaml", "rich", "ray"}
PROBE = """
import sys
from sparsetune.cli.main import main
try:
    main({args})
except SystemExit:
    pass
loaded = {heavy} & set(sys.modules)
sys.exit(f"loaded: {{loaded}}" if loaded else 0)
"""


def test_help_loads_nothing_heavy() -> None:
    code = PROBE.format(args=["--help"], heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_lists_every_command_with_its_own_short_help() -> None:
    status, out, _ = run("--help")
    assert status == 0
    for name, text in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(text)}$", out, re.MULTILINE)
        command = main.get_command(click.Context(main), name)
        assert command is not None
        assert (command.name, command.short_help) == (name, text)


def leaves(group: click.Group) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        found += [(name, *rest) for rest in leaves(command)] if isinstance(command, click.Group) else [(name,)]
    return found


@pytest.mark.parametrize("path", leaves(main), ids=" ".join)
def test_every_command_has_an_example_and_every_option_its_default(path: tuple[str, ...]) -> None:
    status, out, _ = run(*path, "--help")
    assert status == 0
    assert re.search(rf"Examples?:\n\s+sparsetune {' '.join(path)}\b", out)
    command: click.Command = main
    for name in path:
        assert isinstance(command, click.Group)
        found = command.get_command(click.Context(command), name)
        assert found is not None
        command = found
    for option in command.params:
        if isinstance(option, click.Option) and not option.hidden:
            assert "[default: " in (option.help or ""), option.opts


@pytest.mark.parametrize("path", leaves(main), ids=" ".join)
def test_help_of_a_command_loads_nothing_heavy(path: tuple[str, ...]) -> None:
    code = PROBE.format(args=[*path, "--help"], heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_version() -> None:
    status, out, _ = run("--version")
    assert status == 0
    assert re.fullmatch(r"sparsetune \d+\.\d+\.\d+\S*\n", out)


def test_unknown_command_is_a_usage_error_with_the_nearest() -> None:
    status, _, err = run("metric")
    assert status == 2
    assert "Did you mean 'metrics'?" in err


def test_unknown_option_is_a_usage_error() -> None:
    assert run("cache", "ls", "--jsonn")[0] == 2


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let `sparsetune cache ls` end with an error."""

    def build_config(ctx: click.Context) -> None:
        raise error

    monkeypatch.setattr("sparsetune.cli.cache.build_config", build_config)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (SparsetuneError("it must hold,\nbut doesn't"), 1, "sparsetune: it must hold, but doesn't\n"),
        (CheckpointError("no checkpoint"), 1, "sparsetune: no checkpoint\n"),
        (ConfigError("no such key"), 2, "sparsetune: no such key\n"),
        (GateError("not met"), 3, "sparsetune: not met\n"),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "x"),
            1,
            "sparsetune: cannot use x: File name too long; check the path, its permissions and the free space\n",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            1,
            "sparsetune: No space left on device; check the path, its permissions and the free space\n",
        ),
        (KeyboardInterrupt(), 130, "sparsetune: interrupted; no incomplete files were left\n"),
        (
            ValueError("odd"),
            1,
            "sparsetune: unexpected ValueError: odd; run it again as `sparsetune --debug ...` for the traceback\n",
        ),
    ],
)
def test_failure_is_one_line_and_an_exit_status(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, line: str
) -> None:
    fail_with(monkeypatch, error)
    found, out, err = run("cache", "ls")
    assert (found, out, err.lstrip("\n")) == (status, "", line)


@pytest.mark.parametrize("args", [("--debug", "cache", "ls"), ("cache", "ls", "--debug")])
def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...]) -> None:
    fail_with(monkeypatch, ValueError("odd"))
    status, _, err = run(*args)
    assert status == 1
    assert "Traceback (most recent call last)" in err
    assert err.endswith("sparsetune: unexpected ValueError: odd\n")


@pytest.mark.parametrize("args", [("--quiet", "runs"), ("runs", "--quiet"), ("runs", "-q")])
def test_quiet_may_stand_before_a_command_and_after_it(shared_place: "Place", args: tuple[str, ...]) -> None:
    assert "no runs are recorded" in run("runs", "--model", "nobody")[2]
    assert run(*args, "--model", "nobody") == (0, "", "")


@pytest.mark.parametrize("option", ["-q", "-v", "--debug", "--log-format=json"])
@pytest.mark.parametrize("path", [*leaves(main), ("models",)], ids=" ".join)
def test_global_options_may_stand_before_a_command_and_after_it(path: tuple[str, ...], option: str) -> None:
    for args in ((option, *path, "--help"), (*path, option, "--help")):
        assert run(*args)[0] == 0


def test_help_lists_ten_options_in_groups_and_help_all_the_others_too() -> None:
    short, whole = run("tune", "--help")[1], run("tune", "--help-all")[1]
    options = re.compile(r"^  (?:-\w, )?(--[\w-]+)", re.MULTILINE)
    assert len(options.findall(short)) == 11 and "--help" in options.findall(short)
    more = re.search(r"^(\d+) more options: \S+ tune --help-all$", short, re.MULTILINE)
    assert more is not None
    assert len(options.findall(whole)) == 11 + int(more[1])
    headings = [line for line in whole.splitlines() if re.fullmatch(r"[A-Z].*:", line)]
    assert headings == [
        "What to tune or evaluate:", "How to search:", "Generation:", "Quality:", "Where it runs:", "Tracking:",
        "Output:",
    ]  # fmt: skip


@pytest.mark.parametrize("args", [("--log-format", "json", "cache", "ls"), ("cache", "ls", "--log-format=json")])
def test_json_log_tells_failures_too(monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...]) -> None:
    fail_with(monkeypatch, GateError("not met"))
    status, out, err = run(*args)
    event = json.loads(err)
    assert (status, out) == (3, "")
    assert (event["event"], event["message"], event["error_type"], event["exit_code"]) == (
        "error",
        "not met",
        "GateError",
        3,
    )


def test_json_log_tells_wrong_usage_and_interruptions(monkeypatch: pytest.MonkeyPatch) -> None:
    event = json.loads(run("--log-format", "json", "metric")[2])
    assert (event["exit_code"], event["level"]) == (2, "error") and "metrics" in event["message"]
    fail_with(monkeypatch, KeyboardInterrupt())
    assert json.loads(run("--log-format", "json", "--quiet", "cache", "ls")[2])["exit_code"] == 130


def test_debug_and_json_keep_to_one_object_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, ValueError("odd"))
    trace, event = map(json.loads, run("--debug", "--log-format", "json", "cache", "ls")[2].splitlines())
    assert trace["message"].startswith("Traceback") and event["error_type"] == "ValueError"


@pytest.mark.parametrize(
    ("environ", "coloured"), [({"FORCE_COLOR": "1"}, True), ({"NO_COLOR": "1"}, False), ({}, False)]
)
def test_results_are_coloured_as_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], coloured: bool
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sparsetune.doctor.examine", lambda _: [Finding("python", "ok", "3.12")])
    assert ("\x1b[32mok  \x1b[0m" in run("doctor")[1]) is coloured


def test_unknown_setting_is_a_usage_error_that_names_the_nearest() -> None:
    status, _, err = run("cache", "ls", "--set", "cache.max_bg=3")
    assert status == 2
    assert "did you mean cache.max_gb?" in err


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_that_a_library_made_an_error_of_its_own_is_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    def build_config(*_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(30)
        except KeyboardInterrupt as error:
            raise ValueError("a schema can't be built") from error

    monkeypatch.setattr("sparsetune.cli.cache.build_config", build_config)
    status, _, err = run("cache", "ls")
    assert (status, err.strip()) == (130, "sparsetune: interrupted; no incomplete files were left")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_a_running_command_as_ctrl_c_does(tmp_path: Path, number: str) -> None:
    code = (
        "import sys, time\nfrom sparsetune.cli import cache\nfrom sparsetune.cli.main import main\n"
        "def wait(ctx):\n    print('ready', flush=True)\n    time.sleep(30)\n"
        "cache.build_config = wait\nmain(['cache', 'ls'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(getattr(signal, number))
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + getattr(signal, number)
    assert err.strip() == "sparsetune: interrupted; no incomplete files were left"
