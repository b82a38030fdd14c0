"""A checkout with an installed environment, in which the documentation's blocks run."""

import contextlib
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.docs.blocks import ROOT, Block
from tests.tracking.review_client import approve

TIMEOUT_SECONDS = 1200.0
_COPIED = ("Makefile", "pyproject.toml", "constraints.txt", "configs", "examples")
_SHORT = {
    "SPARSETUNE_GENERATION__NUM_INFERENCE_STEPS": "4",
    "SPARSETUNE_TUNE__CALIBRATION_STEPS": "2",
    "SPARSETUNE_TUNE__NUM_PROMPTS": "2",
    "SPARSETUNE_EVAL__NUM_PROMPTS": "3",
    "SPARSETUNE_GATE__MIN_PSNR": "33",
    "SPARSETUNE_GATE__MIN_PSNR_WORST": "27",
}
"""Settings of shorter commands, whose blocks are tested here, not their figures."""
_LINK = re.compile(r"http://127\.0\.0\.1:\d+(?P<review>/[\w-]{32}/)?")


@dataclass
class Workspace:
    """Runs blocks of the documentation one after the other, each text once, since pages repeat the main command.

    Args:
        folder: the checkout.
        outcomes: by text, None for success, else an error message.
    """

    folder: Path
    outcomes: dict[str, str | None] = field(default_factory=dict)

    def run(self, block: Block) -> None:
        """Run a block; fail with its output unless it succeeds."""
        if block.text not in self.outcomes:
            self.outcomes[block.text] = self._outcome(block)
        outcome = self.outcomes[block.text]
        assert outcome is None, f"{block}: {outcome}"

    def _outcome(self, block: Block) -> str | None:
        with _stdin(block) as stdin, subprocess.Popen(
            _command(block), cwd=self.folder, env=_environment(self.folder), text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=stdin, preexec_fn=_enable_ctrl_c,
        ) as process:  # fmt: skip
            timeout = threading.Timer(TIMEOUT_SECONDS, os.killpg, (process.pid, signal.SIGKILL))
            timeout.start()
            printed = _until_link(process) if block.until_stopped else ""
            printed += process.communicate()[0]
            timeout.cancel()
        if block.until_stopped:
            link = _LINK.search(printed)
            ended_well = process.returncode == 0 if link and link["review"] else process.returncode != -signal.SIGKILL
            succeeded = link and ended_well and "Traceback" not in printed
        else:
            succeeded = process.returncode == 0
        return None if succeeded else f"exit code {process.returncode}:\n{block.text}\n{printed[-6000:]}"

    def write(self, block: Block) -> None:
        """Write the file that a titled block shows."""
        assert block.title is not None
        (self.folder / block.title).write_text(block.text, encoding="utf-8")


@contextlib.contextmanager
def _stdin(block: Block) -> Iterator[int]:
    """Yield a terminal, at which a command waits for a person; none for a command that ends by itself."""
    if not block.until_stopped:
        yield subprocess.DEVNULL
        return
    ours, theirs = pty.openpty()
    try:
        yield theirs
    finally:
        os.close(ours)
        os.close(theirs)


def _enable_ctrl_c() -> None:
    """Restore the default handler: shells make background processes ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _until_link(process: subprocess.Popen[str]) -> str:
    """Return the output of a server up to its link; send Ctrl-C, but approve a review, which ends it too."""
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if link := _LINK.search(line):
            approve(link[0]) if link["review"] else os.killpg(process.pid, signal.SIGINT)
            break
    return printed


def make_workspace(folder: Path) -> Workspace:
    """Copy the files that documented commands use, and link the environment."""
    folder.mkdir()
    for name in _COPIED:
        source = ROOT / name
        shutil.copytree(source, folder / name) if source.is_dir() else shutil.copy(source, folder / name)
    _link_environment(folder / ".venv")
    return Workspace(folder)


def _link_environment(target: Path) -> None:
    """Link the environment that runs the tests, marked as installed for `make`."""
    target.mkdir()
    for name in ("bin", "lib"):
        (target / name).symlink_to(Path(sys.prefix) / name)
    shutil.copy(Path(sys.prefix) / "pyvenv.cfg", target)
    for name in (".installed", ".served", ".developed"):
        (target / name).touch()
    for name in ("pyproject.toml", "constraints.txt"):
        os.utime(target.parent / name, (0, 0))  # older than both, so that make installs nothing


def _command(block: Block) -> list[str]:
    if block.language == "python":
        return [".venv/bin/python", "-c", block.text]
    return ["bash", "-euo", "pipefail", "-c", block.text]


def _environment(folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SPARSETUNE_", "MLFLOW_"))}
    return kept | {
        "HF_HUB_OFFLINE": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PATH": f"{folder / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SPARSETUNE_CACHE__DIR": str(folder / "cache"),
        "SPARSETUNE_TUNE__CACHES": "none",  # seconds, by which caches win, mean nothing beside other tests
        **_SHORT,
    }
