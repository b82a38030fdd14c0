"""A real tuning of the demo model whose tracking server is killed during the search."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.tracking.conftest import artifacts_of, runs_of
from tests.tracking.servers import MlflowServer

SETTINGS = (
    "tune.n_trials=3",
    "tune.num_prompts=1",
    "tune.calibration_steps=1",
    "eval.num_prompts=1",
    "generation.num_inference_steps=3",
    "gate.min_psnr=1",
    "gate.min_psnr_worst=1",
    "gate.min_frame_cosine=0.1",
    "tune.margin_db=0",
    "tune.caches=none",
)


@pytest.mark.slow
def test_a_tuning_goes_on_without_its_server_and_sync_sends_the_rest(tmp_path: Path) -> None:
    server = MlflowServer(f"sqlite:///{tmp_path}/server.db", tmp_path)
    server.start()
    try:
        sets = [f"--set={setting}" for setting in (*SETTINGS, f"cache.dir={tmp_path}/cache")]
        command = [sys.executable, "-m", "sparsetune", "tune", "--model", "demo", "--tracking-uri", server.uri, *sets]
        tuning = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        reader = MlflowClient(server.uri)
        while not (found := reader.get_experiment_by_name("sparsetune/demo")) or not reader.search_runs(
            [found.experiment_id], "tags.`sparsetune.kind` = 'trial'"
        ):
            assert tuning.poll() is None, tuning.communicate()
            time.sleep(0.2)
        server.kill()
        error = tuning.communicate(timeout=600)[1]
        assert tuning.returncode == 0, error
        assert "runs are kept in the local store meanwhile" in error
        assert "publish them with `sparsetune sync --tracking-uri" in error
        server.start()
        synced = subprocess.run(
            [sys.executable, "-m", "sparsetune", "sync", "--json", "--tracking-uri", server.uri],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert synced.returncode == 0, synced.stderr
        assert [session["left"] for session in json.loads(synced.stdout)] == [0]
        runs = runs_of(reader, "sparsetune/demo")
        kinds = sorted(run.data.tags["sparsetune.kind"] for run in runs)
        assert kinds.count("tuning") == 1 and kinds.count("trial") == 3 and "evaluation" in kinds
        assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}
        (parent,) = [run for run in runs if run.data.tags["sparsetune.kind"] == "tuning"]
        assert parent.info.status == "FINISHED"
        assert {"trials.json", "checkpoint", "layers"} <= set(artifacts_of(reader, parent.info.run_id))
        tuned = next(run for run in runs if run.data.tags.get("policy") == "tuned")
        assert artifacts_of(reader, tuned.info.run_id, "videos") == ["videos/prompt_0_compare.mp4"]
    finally:
        server.kill()
