"""The program in a real pseudo-terminal, with the demo model."""

import fcntl
import json
import os
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.screen import PseudoTerminal

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="POSIX terminals")]

SMALL = ("--no-track", "--num-prompts", "1", "--num-frames", "9", "--num-inference-steps", "4", "--output-dir", "out")


@pytest.fixture
def terminal() -> Iterator[PseudoTerminal]:
    terminal = PseudoTerminal(80, 24)
    yield terminal
    terminal.close()


def start(terminal: PseudoTerminal, *args: str, stdout: int | None = None) -> "subprocess.Popen[bytes]":
    """Run the program with the terminal as its own, so that Ctrl-C there reaches it."""
    root = str(Path(__file__).parents[2])
    environ = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "CI")}
    return subprocess.Popen(
        [sys.executable, "-m", "sparsetune", *args],
        stdin=terminal.slave,
        stdout=terminal.slave if stdout is None else stdout,
        stderr=terminal.slave,
        env=environ | {"TERM": "xterm-256color", "PYTHONPATH": root},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )


def test_results_go_to_a_file_while_the_view_is_drawn(terminal: PseudoTerminal, working_folder: Path) -> None:
    with (working_folder / "result.json").open("wb") as file:
        process = start(terminal, "eval", "--json", *SMALL, stdout=file.fileno())
    seen: set[str] = set()
    while process.poll() is None:
        seen.update(line.split(" ")[0] for line in terminal.read(0.2).text)
    assert process.returncode == 0
    assert json.loads((working_folder / "result.json").read_text())["config"]["num_prompts"] == 1
    assert {"eval", "evaluation", "prompt", "rendering", "left"} <= seen
    assert terminal.read().text == ["loading demo ..."]


def test_ctrl_c_leaves_the_last_view_and_the_terminal_as_it_was(terminal: PseudoTerminal, working_folder: Path) -> None:
    before = termios.tcgetattr(terminal.slave)
    process = start(terminal, "eval", *SMALL)
    end = time.monotonic() + 300
    while not any(line.startswith("rendering ") and "step" in line for line in terminal.read(0.2).text):
        assert time.monotonic() < end and process.poll() is None, terminal.screen.text
    os.write(terminal.master, b"\x03")
    while process.poll() is None:
        terminal.read(0.2)
        assert time.monotonic() < end
    assert process.returncode == 130
    lines = terminal.read(0.2).text
    text = "".join(lines).replace(" ", "")  # as the terminal folds it
    for said in (
        "stopping, which takes some seconds; rendered dense videos are kept; Ctrl-C again ends it at once",
        "sparsetune: interrupted; no incomplete files were left; go on with: sparsetune eval ",
    ):
        assert said.replace(" ", "") in text
    assert any(line.startswith("eval demo  ") for line in lines)
    assert "policy      SpargeAttn's default thresholds" in lines
    assert termios.tcgetattr(terminal.slave) == before
