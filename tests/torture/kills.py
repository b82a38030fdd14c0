"""Killed commands: no trial is lost or doubled, no store is damaged, and the next run cleans up what a kill left."""

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
from mlflow import MlflowClient

N_TRIALS = 3
TUNE = (
    "tune", "--model", "demo", "--n-trials", str(N_TRIALS), "--num-prompts", "1", "--num-inference-steps", "2",
    "--caches", "none", "--num-frames", "9", "--orders", "raster", "--probe-prompts", "0", "--calibration-steps", "1",
    "--min-psnr", "0", "--min-frame-cosine", "-1", "--margin-db", "0", "--set", "eval.num_prompts=1",
    "--set", "eval.metrics=psnr", "--set", "tracking.report=false",
)  # fmt: skip
EVAL = (
    "eval", "--model", "demo", "--num-prompts", "2", "--num-inference-steps", "2", "--num-frames", "9",
    "--metrics", "psnr", "--set", "tracking.report=false",
)  # fmt: skip
RELEASE = (
    ("review", "latest", "--ok", "--reviewer", "Ada", "--no-open"),
    ("promote", "latest", "--override", "torture"),
    ("sync",),
)
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Duration:
    """What a whole command takes."""

    seconds: float
    statements: int


@dataclass(frozen=True)
class Place:
    """A folder in which commands run, with caches and temporary files of its own."""

    folder: Path

    def start(self, arguments: Sequence[str], statement: int | None = None, **more: str) -> "subprocess.Popen[str]":
        """Start a command, killed at a database statement if one is given, with further environment variables."""
        (self.folder / "tmp").mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(self.folder / "tmp"), "HF_HUB_OFFLINE": "1",
            "SPARSETUNE_CACHE__DIR": str(self.folder / "cache"), "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true", "GIT_PYTHON_REFRESH": "quiet", **more,
        }  # fmt: skip
        module = ["sparsetune"] if statement is None else ["tests.torture.at_statement", str(statement)]
        command = [sys.executable, "-m", *module, *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=self.folder, env=environment, stdout=pipe, stderr=pipe, text=True)

    def run(self, arguments: Sequence[str], **more: str) -> tuple[int, float, str]:
        """Return a command's status, its seconds and its log."""
        started = time.monotonic()
        process = self.start(arguments, **more)
        _, log = process.communicate()
        return process.returncode, time.monotonic() - started, log

    def measure(self, arguments: Sequence[str]) -> "Duration":
        """Run a command to its end."""
        started = time.monotonic()
        process = self.start(arguments, 0)
        _, log = process.communicate()
        assert process.returncode == 0, log
        statements = self.folder / "statements"
        found = Duration(time.monotonic() - started, int(statements.read_text()))
        statements.unlink()
        return found

    def kill(self, arguments: Sequence[str], whole: "Duration", draw: random.Random) -> str:
        """Kill a command at a random moment or database statement; return what was wrong with its end."""
        if draw.random() < 0.5:
            process = self.start(arguments, draw.randint(1, max(1, whole.statements)))
        else:
            process = self.start(arguments)
            try:
                process.wait(draw.uniform(0.3, 1.1 * whole.seconds))  # before that Python itself starts
            except subprocess.TimeoutExpired:
                process.send_signal(draw.choice(SIGNALS))
        _, log = process.communicate()
        (self.folder / "statements").unlink(missing_ok=True)
        return unexpected(log)

    def outcomes(self) -> list[tuple[int, dict[str, object]]]:
        """Return the number and the outcome of each trial that has one."""
        path = self.folder / "mlruns" / "optuna.db"
        if not path.exists():
            return []
        storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
        found = [trial for study in storage.get_all_studies() for trial in storage.get_all_trials(study._study_id)]
        return [(trial.number, trial.user_attrs["outcome"]) for trial in found if "outcome" in trial.user_attrs]

    def faults(self) -> list[str]:
        """What a whole command must not leave."""
        found = [f"{path.name} is damaged" for path in self.folder.glob("mlruns/*.db") if not _is_whole(path)]
        client = MlflowClient(f"sqlite:///{self.folder}/mlruns/mlflow.db")
        experiments = [one.experiment_id for one in client.search_experiments()]
        running = client.search_runs(experiments, "attributes.status = 'RUNNING'")
        found += [f"{run.info.run_name} is RUNNING" for run in running]
        left = [path for path in self.folder.rglob(".*") if not path.name.endswith(".lock")]
        left += [path for path in (self.folder / "tmp").iterdir() if not path.name.startswith("torchinductor_")]
        return found + [f"{path.relative_to(self.folder)} is left" for path in left]


def unexpected(log: str) -> str:
    """What a command's log must not have."""
    lines = log.splitlines()
    starts = [n for n, line in enumerate(lines) if "Traceback" in line or "sparsetune: unexpected" in line]
    return "a traceback: " + " | ".join(lines[starts[0] :]) if starts else ""


def _is_whole(database: Path) -> bool:
    with sqlite3.connect(database) as connection:
        (answer,) = connection.execute("PRAGMA integrity_check").fetchone()
    return bool(answer == "ok")


def kill_tune(folder: Path, count: int, draw: random.Random) -> list[str]:
    """Kill `tune` until `count` kills are used up; each study is then run to its end."""
    undisturbed = Place(folder / "undisturbed")
    whole = undisturbed.measure(TUNE)
    faults, number = list[str](), 0
    while number < count:
        place = Place(folder / f"tune-{number}")
        known: dict[int, object] = {}
        for _ in range(min(5, count - number)):
            fault = place.kill(TUNE, whole, draw)
            number += 1
            faults += [f"kill {number}: {fault}"] * bool(fault)
            now = dict(place.outcomes())
            faults += [f"kill {number}: trial {one} is lost or changed" for one in known if now.get(one) != known[one]]
            known = dict(now)
        status, _, log = place.run(TUNE)
        faults += [f"after kill {number}: {fault}" for fault in [log] * (status != 0) + place.faults()]
        if sorted(_params(place)) != sorted(_params(undisturbed)):
            faults.append(f"after kill {number}: other trials than {undisturbed.outcomes()}: {place.outcomes()}")
    return faults


def _params(place: Place) -> list[str]:
    return [f"{outcome['params']} {outcome['sparsity']}" for _, outcome in place.outcomes()]


def kill_eval(folder: Path, count: int, draw: random.Random) -> list[str]:
    """Kill `eval` in one folder; then it runs to its end."""
    place = Place(folder / "eval")
    whole = place.measure(EVAL)
    faults = [f"kill {number}: {fault}" for number in range(count) if (fault := place.kill(EVAL, whole, draw))]
    status, _, log = place.run(EVAL)
    return faults + [log] * (status != 0) + place.faults()


def kill_release(folder: Path, count: int, draw: random.Random) -> list[str]:
    """Kill `review`, `promote` and `sync` of one tuning in turn; then each runs to its end."""
    place = Place(folder / "release")
    status, _, log = place.run(TUNE)
    assert status == 0, log
    shutil.copytree(place.folder, folder / "measured")
    whole = [Place(folder / "measured").measure(command) for command in RELEASE]
    faults = list[str]()
    for number in range(count):
        fault = place.kill(RELEASE[number % 3], whole[number % 3], draw)
        faults += [f"kill {number}: {fault}"] * bool(fault)
    for command in RELEASE:
        status, _, log = place.run(command)
        faults += [f"{command[0]}: {log}"] * (status != 0)
    client = MlflowClient(f"sqlite:///{place.folder}/mlruns/mlflow.db")
    champion = client.get_model_version_by_alias("demo-sparse", "champion")
    if champion.version != max(one.version for one in client.search_model_versions("name = 'demo-sparse'")):
        faults.append(f"version {champion.version} is champion, not the newest")
    return faults + place.faults()
