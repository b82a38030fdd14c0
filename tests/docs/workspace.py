"""A folder as a new user has it: a checkout whose environment is set up already."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

from tests.docs.blocks import ROOT, Block

TIMEOUT_SECONDS = 1200.0
_TAKEN = ("Makefile", "pyproject.toml", "constraints.txt", "configs", "examples")
_LINK = re.compile(r"http://127\.0\.0\.1:\d+")


@dataclass
class Workspace:
    """Runs blocks of the documentation one after the other, each text once: pages repeat the main job.

    Args:
        folder: the checkout.
        outcomes: how each text that was run ended: None where it ended well, else what is to be said of it.
    """

    folder: Path
    outcomes: dict[str, str | None] = field(default_factory=dict)

    def run(self, block: Block) -> None:
        """Run a block as it stands; fails with what it printed unless it ends well."""
        if block.text not in self.outcomes:
            self.outcomes[block.text] = self._outcome(block)
        outcome = self.outcomes[block.text]
        assert outcome is None, f"{block}: {outcome}"

    def _outcome(self, block: Block) -> str | None:
        with subprocess.Popen(
            _command(block), cwd=self.folder, env=_environment(self.folder), text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, preexec_fn=_hear_ctrl_c,
        ) as process:  # fmt: skip
            overdue = threading.Timer(TIMEOUT_SECONDS, os.killpg, (process.pid, signal.SIGKILL))
            overdue.start()
            printed = _until_link(process) if block.until_stopped else ""
            printed += process.communicate()[0]
            overdue.cancel()
        if block.until_stopped:
            well = _LINK.search(printed) and process.returncode != -signal.SIGKILL and "Traceback" not in printed
        else:
            well = process.returncode == 0
        return None if well else f"it ended with {process.returncode}:\n{block.text}\n{printed[-6000:]}"

    def write(self, block: Block) -> None:
        """Write the file that a block shows with its name."""
        assert block.title is not None
        (self.folder / block.title).write_text(block.text, encoding="utf-8")


def _hear_ctrl_c() -> None:
    """Undo what a shell does to what it starts in the background, which then never hears of Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _until_link(process: subprocess.Popen[str]) -> str:
    """Read what a server prints up to its link, and press Ctrl-C."""
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if _LINK.search(line):
            os.killpg(process.pid, signal.SIGINT)
            break
    return printed


def make_workspace(folder: Path) -> Workspace:
    """Copy what commands of the documentation use of the checkout, and link the environment in."""
    folder.mkdir()
    for name in _TAKEN:
        source = ROOT / name
        shutil.copytree(source, folder / name) if source.is_dir() else shutil.copy(source, folder / name)
    _link_environment(folder / ".venv")
    return Workspace(folder)


def _link_environment(target: Path) -> None:
    """Make a virtual environment of links to the one that runs the tests; `make` takes it for set up."""
    target.mkdir()
    for name in ("bin", "lib"):
        (target / name).symlink_to(Path(sys.prefix) / name)
    shutil.copy(Path(sys.prefix) / "pyvenv.cfg", target)
    (target / ".installed").touch()
    for name in ("pyproject.toml", "constraints.txt"):
        os.utime(target.parent / name, (0, 0))  # older than .installed, so that nothing is installed anew


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
    }
