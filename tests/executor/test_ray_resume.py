"""The driver process is killed during a search; the same command resumes the search."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from sparsetune.tuning.search import study as studies
from sparsetune.tuning.search.study import OUTCOME, PROCESS

pytest.importorskip("ray", reason="the extra ray isn't installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in Linux's /proc"),
]

NUM_TRIALS = 6
SETTINGS = (
    f"tune.n_trials={NUM_TRIALS}",
    "tune.num_prompts=2",
    "tune.probe_prompts=1",
    "tune.calibration_steps=1",
    "tune.orders=raster",
    "tune.caches=none",
    "tune.granularity=global",
    "eval.num_prompts=1",
    "eval.save_videos=false",
    "eval.metrics=psnr",
    "generation.num_inference_steps=2",
    "generation.num_frames=9",
    "gate.min_psnr=5",
    "gate.min_psnr_worst=1",
    "gate.min_frame_cosine=0.1",
    "engine.start_seconds=300",
)
TOKEN = "TEST_OF_SPARSETUNE"


def start(folder: Path, token: str) -> "subprocess.Popen[str]":
    """Start the command; whatever it starts carries the token in its environment."""
    places = (f"cache.dir={folder}/cache", f"tracking.root={folder}/mlruns")
    sets = [f"--set={setting}" for setting in (*SETTINGS, *places)]
    options = ["--model", "demo", "--device", "cpu", "--engine", "ray", "--workers", "2", "--study-name", "killed"]
    storage = ["--storage", f"journal:{folder}/study.log", "--output-dir", str(folder / "results"), "--json"]
    command = [sys.executable, "-W", "ignore", "-m", "sparsetune", "tune", *options, *storage, *sets]
    with (folder / "stderr").open("a") as stderr:
        return subprocess.Popen(
            command, env=os.environ | {TOKEN: token}, stdout=subprocess.PIPE, stderr=stderr, text=True
        )


def carrying(token: str) -> list[int]:
    """Find the processes with a token."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"{TOKEN}={token}".encode() in (path / "environ").read_bytes():
                found.append(int(path.name))
        except OSError:  # the process ended meanwhile, or belongs to another user
            continue
    return found


def trials_of(folder: Path) -> list[FrozenTrial]:
    with studies.quiet():
        storage = studies._open_storage(f"journal:{folder}/study.log")
        return optuna.load_study(study_name="killed", storage=storage).get_trials(deepcopy=False)


def in_the_middle(folder: Path, command: "subprocess.Popen[str]") -> None:
    """Wait until a trial has ended and two run."""
    end = time.monotonic() + 300
    while time.monotonic() < end and command.poll() is None:
        time.sleep(0.2)
        try:
            trials = trials_of(folder)
        except KeyError:  # not begun yet
            continue
        running = [trial for trial in trials if trial.state == TrialState.RUNNING and trial.params]
        if len(running) == 2 and any(OUTCOME in trial.user_attrs for trial in trials):
            return
    raise AssertionError((folder / "stderr").read_text())


def test_the_same_command_goes_on_where_its_driver_was_killed(tmp_path: Path) -> None:
    token = uuid.uuid4().hex
    first = start(tmp_path, token)
    try:
        in_the_middle(tmp_path, first)
        first.kill()
        first.wait()
        before = [trial for trial in trials_of(tmp_path) if OUTCOME in trial.user_attrs]
        end = time.monotonic() + 240  # Ray notices after some seconds, on a busy machine after many
        while (left := carrying(token)) and time.monotonic() < end:
            time.sleep(0.5)
        assert not left, "the killed driver's workers still run"
        second = start(tmp_path, token)
        stdout, _ = second.communicate(timeout=300)
    finally:
        for process in carrying(token):
            os.kill(process, signal.SIGKILL)
        first.communicate()
    assert second.returncode == 0, (tmp_path / "stderr").read_text()

    trials = trials_of(tmp_path)
    assert all(trial.state.is_finished() for trial in trials)
    done = {trial.number: trial for trial in trials if OUTCOME in trial.user_attrs}
    lost = [trial for trial in trials if OUTCOME not in trial.user_attrs]
    assert len(done) == NUM_TRIALS and 1 <= len(lost) <= 2
    assert {trial.number for trial in before} < done.keys()
    for trial in lost:  # each was tried again, once, by the second driver
        # It may have died before it had all its parameters; then others may agree with those that it had.
        agree = [each for each in done.values() if each.params.items() >= trial.params.items()]
        again = [each for each in agree if each.number > trial.number]
        assert any(each.user_attrs[PROCESS].startswith(f"{second.pid}-") for each in again)
        assert len(agree) == len(again) == 1 or len(trial.params) < len(again[0].params)
    assert max(Counter(json.dumps(trial.params, sort_keys=True) for trial in done.values()).values()) == 1
    result = json.loads(stdout)
    assert result["best_trial"] in done and (tmp_path / "results" / "checkpoint").is_dir()
