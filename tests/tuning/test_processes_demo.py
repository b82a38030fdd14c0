"""Four concurrent commands on one study of the demo model in PostgreSQL; one of them is killed during the search."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from sparsetune.checkpoint import load_checkpoint
from sparsetune.config import TrackingConfig
from sparsetune.evaluation.baseline import BaselineCache
from sparsetune.tracking import connect, resolve_store
from sparsetune.tuning.search.study import OUTCOME, PROCESS, study_lock
from tests.tracking.conftest import runs_of
from tests.tracking.servers import postgres, postgres_binaries

pytestmark = pytest.mark.slow

NUM_TRIALS = 8
SETTINGS = (
    f"tune.n_trials={NUM_TRIALS}",
    "tune.num_prompts=2",
    "tune.validation_prompts=1",
    "tune.probe_prompts=1",
    "tune.calibration_steps=1",
    "tune.orders=raster",
    "tune.caches=none",
    "tune.granularity=global",
    "tune.margin_db=0",
    "eval.num_prompts=1",
    "eval.save_videos=false",
    "eval.metrics=psnr",
    "generation.num_inference_steps=2",
    "generation.num_frames=9",
    "gate.min_psnr=10",
    "gate.min_psnr_worst=1",
    "gate.min_frame_cosine=0.1",
)


@pytest.fixture
def database() -> Iterator[str]:
    binaries = postgres_binaries()
    if binaries is None:
        pytest.skip("PostgreSQL isn't installed")
    with postgres(binaries) as url:
        yield url


def start(url: str, folder: Path) -> "subprocess.Popen[str]":
    sets = [
        f"--set={setting}" for setting in (*SETTINGS, f"cache.dir={folder}/cache", f"tracking.root={folder}/mlruns")
    ]
    options = ["--model", "demo", "--study-name", "four", "--output-dir", str(folder / "results"), "--json", *sets]
    command = [sys.executable, "-W", "ignore", "-m", "tests.tuning.commands", str(folder), "4", "tune", *options]
    environment = os.environ | {"SPARSETUNE_TUNE__STORAGE": url, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def in_a_trial(url: str, processes: list[int], folder: Path) -> int:
    """Wait until one of the processes runs a trial; return its id."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study, end = None, time.monotonic() + 600
    while time.monotonic() < end:
        time.sleep(0.2)
        if study is None:
            try:
                with study_lock(url, "tables"):  # opening a storage creates its tables
                    study = optuna.load_study(study_name="four", storage=url)
            except KeyError:  # not begun yet
                continue
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            process = int(trial.user_attrs.get(PROCESS, "0-").partition("-")[0])
            if process in processes:
                return process
    raise AssertionError("no trial began: " + "".join(path.read_text() for path in folder.glob("*.err")))


def test_four_commands_do_one_search(database: str, tmp_path: Path) -> None:
    commands = start(database, tmp_path)
    assert commands.stdout is not None
    processes = json.loads(commands.stdout.readline())
    try:
        killed = in_a_trial(database, processes, tmp_path)
        os.kill(killed, signal.SIGKILL)
        statuses = json.loads(commands.stdout.readline())
    except BaseException:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        raise
    finally:
        commands.communicate()
    lived = [number for number, process in enumerate(processes) if process != killed]
    stderr = "".join((tmp_path / f"{number}.err").read_text() for number in range(4))
    assert [statuses[number] for number in lived] == [0, 0, 0], stderr
    outcomes = [json.loads((tmp_path / f"{number}.out").read_text()) for number in lived]

    trials = optuna.load_study(study_name="four", storage=database).get_trials(deepcopy=False)
    done = [trial for trial in trials if OUTCOME in trial.user_attrs]
    assert len(done) == NUM_TRIALS and not [trial for trial in trials if not trial.state.is_finished()]
    lost = [trial for trial in trials if OUTCOME not in trial.user_attrs]
    assert len(lost) <= 1  # none if it died between two trials
    for trial in lost:
        assert trial.user_attrs[PROCESS].startswith(f"{killed}-")
        # It may have died before it had all its parameters.
        assert [again for again in done if again.params.items() >= trial.params.items() and again.number > trial.number]

    # One process evaluated the winner, and all name the same winner.
    (judged,) = [outcome for outcome in outcomes if outcome["left_to"] is None]
    assert all("another process" in outcome["left_to"] for outcome in outcomes if outcome is not judged)
    assert len({outcome["best_trial"] for outcome in outcomes}) == 1 and judged["best_trial"] is not None
    saved = load_checkpoint(tmp_path / "results" / "checkpoint").manifest
    assert saved.tuner_settings["trial"] == judged["best_trial"] and judged["comparison"] is not None

    # Shared files were written once, and no lock is left but that of the killed process, for the next to end its runs;
    # not even that, if another of the four began to record after the kill.
    assert len(list((tmp_path / "mlruns" / "calibrations").glob("*.npz"))) == 1
    left = [path.name for path in tmp_path.rglob("*.lock") if path.is_file()]
    assert len(left) <= 1 and all(name.startswith(f".process-{killed}-") for name in left)
    baselines = BaselineCache(tmp_path / "cache", 1.0).ls()
    assert len(baselines) == 4  # two tune prompts, one validation prompt, one eval prompt
    assert 1 <= stderr.count("calibrating on the tune prompts") <= 2  # who had a prompt to calibrate

    # One run for the study, one for each trial.
    client = connect(resolve_store(TrackingConfig(root=tmp_path / "mlruns"), {}))
    runs = runs_of(client, "sparsetune/demo")
    assert left or "RUNNING" not in [
        run.info.status for run in runs
    ]  # who cleared the lock ended the killed one's runs
    (study,) = [run for run in runs if run.data.tags["sparsetune.kind"] == "tuning"]
    assert study.info.status == "FINISHED" and study.data.tags["best.trial"] == str(judged["best_trial"])
    recorded = sorted(int(run.data.params["trial"]) for run in runs if run.data.tags["sparsetune.kind"] == "trial")
    known = sorted(trial.number for trial in done)
    # The killed process may have stored its trial's result without recording it.
    assert len(set(recorded)) == len(recorded) and set(recorded) <= set(known) and len(recorded) >= len(known) - 1
    assert {run.data.tags["mlflow.parentRunId"] for run in runs if run is not study} == {study.info.run_id}
    assert study.data.tags["best.run_id"] in {run.info.run_id for run in runs}
