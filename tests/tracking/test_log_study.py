"""Trials and studies from the events of the tuner, recorded in a real store and read back."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from sparsetune.attention.policy import Policy
from sparsetune.attention.thresholds import HeadThresholds, LayerThresholds
from sparsetune.checkpoint import Checkpoint, Manifest, load_checkpoint, save_checkpoint
from sparsetune.checkpoint.manifest import hash_prompts
from sparsetune.config import Config
from sparsetune.evaluation.compare import compare
from sparsetune.executor import Incident, Worker
from sparsetune.tracking import TrackingListener
from sparsetune.tuning.events import SearchStatistics, StudyStarted, TrialPrompt, TrialResult, TuningResult, Validation
from tests.tracking.conftest import LAYERS, Evaluation, artifacts_of, make_prompt, make_result, runs_of

STUDY_RUN = "tune demo's study"
POLICY = Policy.uniform([(name, 3) for name in LAYERS])


def make_trial(number: int, **changes: Any) -> TrialResult:
    trial = TrialResult(
        number=number,
        params={"cdf/layer_00": 0.98, "dense_fraction": 0.0},
        state="complete",
        reason=None,
        policy=POLICY,
        prompts=(make_prompt(0, 36.0), make_prompt(1, 40.0)),
        sparsity=0.25,
        psnr=38.0,
        psnr_worst=36.0,
        frame_cosine=0.99,
        feasible=True,
        seconds=10.0,
    )
    return replace(trial, **changes)


TRIALS = (
    make_trial(0),
    make_trial(1, state="pruned", reason="prompt 1 at 21.0 dB", prompts=(make_prompt(0, 21.0),), feasible=False),
    make_trial(
        2,
        state="failed",
        reason="frames are NaN",
        prompts=(),
        sparsity=None,
        psnr=None,
        psnr_worst=None,
        frame_cosine=None,
        feasible=False,
    ),
)


def started(config: Config, num_done: int = 0, n_trials: int = 3) -> StudyStarted:
    return StudyStarted(
        study_name="demo's study",
        storage="postgresql://user:secret@host/db",
        config=config.model_dump(mode="json") | {"tune": {"n_trials": n_trials, "storage": "a://user:secret@host"}},
        n_trials=n_trials,
        num_done=num_done,
        prompts=("a red circle", "a blue square"),
        num_steps=10,
        output_dir=Path("results"),
    )


def ended(trials: tuple[TrialResult, ...], best: TrialResult | None = None, **changes: Any) -> TuningResult:
    result = TuningResult("demo's study", trials, best, None, None, None, Path("no calibration.json"), 60.0)
    return replace(result, **changes)


def test_a_tuning_is_a_run_with_a_child_a_trial(
    config: Config, client: MlflowClient, experiment: str, tmp_path: Path
) -> None:
    checkpoint = save_checkpoint(Checkpoint(POLICY, Manifest(tuner="optuna")), tmp_path / "tuned")
    listener = TrackingListener(config)
    listener.on_study_start(started(config))
    for trial in TRIALS:
        for index, prompt in enumerate(trial.prompts):
            listener.on_prompt(TrialPrompt(trial.number, index, 2, prompt))
        listener.on_trial(trial)
    validations = (Validation(1, 4, 32.89, 29.2, False), Validation(0, 4, 40.29, 36.5, True, {"mean psnr": -2.8}))
    result = ended(TRIALS, TRIALS[0], checkpoint_path=checkpoint, evaluation=make_result(), validations=validations)
    listener.on_study_end(result)
    runs = {run.info.run_name: run for run in runs_of(client, experiment)}
    assert runs.keys() == {STUDY_RUN, "trial 0", "trial 1", "trial 2"}
    parent = runs[STUDY_RUN]
    assert parent.info.run_id == listener.run_id
    assert parent.info.status == "FINISHED"
    assert parent.data.params["model.source"] == "demo"
    assert parent.data.tags["best.params"] == "cdf/layer_00=0.98, dense_fraction=0"
    assert parent.data.tags["best.run_id"] == runs["trial 0"].info.run_id
    assert (parent.data.tags["gate"], parent.data.tags["verdict"], parent.data.metrics["score"]) == (
        "failed",
        "good",
        85,
    )
    assert "secret" not in str(parent.to_dictionary())
    metrics = parent.data.metrics
    assert (metrics["trials/complete"], metrics["trials/pruned"], metrics["trials/failed"]) == (1, 1, 1)
    assert (metrics["psnr/mean"], metrics["sparsity/overall"], metrics["psnr/min"]) == (38.0, 0.25, 36.0)
    assert (metrics["tune/psnr/mean"], metrics["tune/sparsity/overall"]) == (38.0, 0.25)
    for run in runs.values():
        assert len(run.data.metrics) <= 40
    assert [runs[f"trial {number}"].data.tags.get("winner") for number in range(3)] == ["true", None, None]
    assert [runs[f"trial {number}"].data.tags["gate"] for number in range(3)] == ["passed", "failed", "failed"]
    winner = runs["trial 0"].data
    assert (winner.tags["verdict"], winner.metrics["score"], winner.metrics["gate_passed"]) == ("good", 90, 1)
    assert load_checkpoint(client.download_artifacts(parent.info.run_id, "checkpoint", str(tmp_path))).policy == POLICY
    table = json.loads(Path(client.download_artifacts(parent.info.run_id, "trials.json")).read_text())
    assert table["columns"][:3] == ["trial", "run_id", "state"]
    found = [(row[0], row[1], row[2]) for row in table["data"]]
    assert found == [(trial.number, runs[f"trial {trial.number}"].info.run_id, trial.state) for trial in TRIALS]
    note = parent.data.tags["mlflow.note.content"]
    link = f"[trial 0](#/experiments/{parent.info.experiment_id}/runs/{runs['trial 0'].info.run_id})"
    assert f"Winner: {link}" in note
    assert "On 4 validation prompts: trial 1 misses the gate (32.9 dB), trial 0 meets the gate (40.3 dB)." in note
    table = json.loads(Path(client.download_artifacts(parent.info.run_id, "validation.json")).read_text())
    assert table["columns"] == ["number", "num_prompts", "psnr", "psnr_worst", "feasible"]
    assert [row[0] for row in table["data"]] == [1, 0]
    verdict = "On eval prompts: good, gate failed (psnr is too low), sparsity 0.25, PSNR 38.00 dB, worst 36.00."
    assert note.startswith(verdict)
    assert f"/runs/{runs['trial 1'].info.run_id}) | pruned | 0.25 | 38 | 36 | prompt 1 at 21.0 dB |" in note
    for trial in TRIALS:
        assert runs[f"trial {trial.number}"].data.tags["mlflow.parentRunId"] == parent.info.run_id


def test_trials_tell_who_rendered_them_and_the_study_what_befell_workers(
    config: Config, client: MlflowClient, experiment: str
) -> None:
    listener = TrackingListener(config)
    listener.on_study_start(started(config))
    trials = (make_trial(0, worker=Worker(5, "node7", "NVIDIA H100", 99, ("2",))), make_trial(1))
    for trial in trials:
        listener.on_trial(trial)
    lost = Incident("lost", "worker 4", "worker 4 (node7) was lost", "2026-11-25T12:00:00+00:00")
    listener.on_study_end(ended(trials, trials[0], incidents=(lost,)))
    runs = {run.info.run_name: run for run in runs_of(client, experiment)}
    tags = runs["trial 0"].data.tags
    assert [tags[f"worker{part}"] for part in ("", ".host", ".device", ".gpu")] == ["5", "node7", "NVIDIA H100", "2"]
    assert "worker" not in runs["trial 1"].data.tags
    assert runs[STUDY_RUN].data.tags["incidents"] == "1"
    assert lost.text in runs[STUDY_RUN].data.tags["mlflow.note.content"]
    assert "incidents.json" in artifacts_of(client, runs[STUDY_RUN].info.run_id)


def test_trials_keep_their_state_reason_time_and_prompts(config: Config, client: MlflowClient, experiment: str) -> None:
    listener = TrackingListener(config)
    listener.on_study_start(started(config))
    for trial in TRIALS:
        listener.on_trial(trial)
    runs = {run.info.run_name: run for run in runs_of(client, experiment)}
    states = [(runs[f"trial {index}"].info.status, runs[f"trial {index}"].data.tags["state"]) for index in range(3)]
    assert states == [("FINISHED", "complete"), ("KILLED", "pruned"), ("FAILED", "failed")]
    assert runs["trial 1"].data.tags["reason"] == "prompt 1 at 21.0 dB"
    first = runs["trial 0"]
    assert first.info.end_time - first.info.start_time == pytest.approx(10_000, abs=3000)
    assert first.data.params == {"trial": "0", "cdf/layer_00": "0.98", "dense_fraction": "0"}
    history = client.get_metric_history(first.info.run_id, "prompt/psnr")
    assert sorted((point.step, point.value) for point in history) == [(1, 36.0), (2, 40.0)]
    assert first.data.metrics["psnr/min"] == 36.0
    assert artifacts_of(client, first.info.run_id) == ["layers", "prompts.json"]
    assert runs["trial 2"].data.metrics.keys() == {"seconds/total"}


def test_an_evaluation_within_a_tuning_is_its_child(
    config: Config, client: MlflowClient, experiment: str, evaluation: Evaluation
) -> None:
    listener = TrackingListener(config)
    listener.on_study_start(started(config))
    listener.on_start(evaluation.start)
    listener.on_prompt(evaluation.prompts[0])
    listener.on_end(evaluation.end)
    listener.on_study_end(ended(()))
    parent, child = runs_of(client, experiment)
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.metrics["prompt/psnr"] == 36.0
    assert (parent.info.status, child.info.status) == ("FINISHED", "FINISHED")


def test_an_interrupted_tuning_is_killed(config: Config, client: MlflowClient, experiment: str) -> None:
    listener = TrackingListener(config)
    listener.on_study_start(started(config))
    listener.on_trial(TRIALS[0])
    listener.on_failure(KeyboardInterrupt())
    listener.on_trial(TRIALS[1])
    parent, trial = sorted(runs_of(client, experiment), key=lambda run: run.info.run_name or "", reverse=True)
    assert parent.info.run_name == STUDY_RUN
    assert (parent.info.status, trial.info.status) == ("KILLED", "FINISHED")


def test_a_store_that_fails_in_a_trial_ends_no_tuning(
    config: Config, client: MlflowClient, experiment: str, caplog: pytest.LogCaptureFixture
) -> None:
    listener = TrackingListener(config)
    listener.on_study_start(started(config))
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    client.delete_experiment(found.experiment_id)
    listener.on_trial(TRIALS[0])
    listener.on_trial(TRIALS[1])
    listener.on_study_end(ended(TRIALS, TRIALS[0]))
    assert listener.recorder.problem is not None
    assert len(caplog.records) == 1
    client.restore_experiment(found.experiment_id)
    listener.recorder.abandon()


@pytest.mark.slow
def test_thirty_trials_take_seconds_to_record(config: Config, client: MlflowClient) -> None:
    listener = TrackingListener(config)
    listener.on_study_start(started(config))
    began = time.perf_counter()
    for number in range(30):
        listener.on_trial(make_trial(number))
    assert (time.perf_counter() - began) / 30 < 0.5


def test_a_study_that_goes_on_goes_on_in_its_run(config: Config, client: MlflowClient, experiment: str) -> None:
    before = TrackingListener(config)
    before.on_study_start(started(config))
    before.on_trial(TRIALS[0])
    before.on_failure(KeyboardInterrupt())
    after = TrackingListener(config)
    after.on_study_start(started(config, num_done=1, n_trials=5))
    assert after.run_id is not None
    assert client.get_run(after.run_id).info.status == "RUNNING"
    after.on_trial(TRIALS[1])
    earlier = replace(TRIALS[0], prompts=())
    after.on_study_end(ended((earlier, TRIALS[1]), earlier))
    runs = {run.info.run_name: run for run in runs_of(client, experiment)}
    assert runs.keys() == {STUDY_RUN, "trial 0", "trial 1"}
    parent = runs[STUDY_RUN]
    assert parent.info.run_id == before.run_id == after.run_id
    assert (parent.info.status, parent.data.tags["n_trials"]) == ("FINISHED", "5")
    assert parent.data.tags["best.run_id"] == runs["trial 0"].info.run_id


def test_a_study_that_goes_on_without_its_run_gets_a_new_one(
    config: Config, client: MlflowClient, experiment: str
) -> None:
    listener = TrackingListener(config)
    listener.on_study_start(started(config, num_done=7))
    listener.on_study_end(ended(TRIALS, closest=TRIALS[1]))
    (run,) = runs_of(client, experiment)
    assert (run.data.tags["closest.trial"], run.data.tags["resumed_at"]) == ("1", "7")
    assert run.data.tags["best.trial"] == "none"


def test_every_threshold_and_every_layers_mean_are_in_tables(
    config: Config, client: MlflowClient, experiment: str, tmp_path: Path
) -> None:
    heads = (
        HeadThresholds(0.5, cdfthreshd=0.9),
        HeadThresholds(0.7, cdfthreshd=0.8),
        HeadThresholds(0.1, 0.1, None, 1, False),
    )
    layers = (
        LayerThresholds(LAYERS[0], heads),
        replace(LayerThresholds.uniform(LAYERS[1], 3, HeadThresholds(0.2, topk=0.3)), order="whf"),
    )
    listener = TrackingListener(config)
    listener.on_study_start(started(config))
    listener.on_trial(make_trial(0, policy=Policy(layers)))
    run = next(run for run in runs_of(client, experiment) if run.info.run_name == "trial 0")
    table = json.loads(Path(client.download_artifacts(run.info.run_id, "layers/thresholds.json")).read_text())
    columns = ["index", "head", "simthreshd1", "cdfthreshd", "topk", "pvthreshd", "is_sparse", "order", "layer"]
    assert table["columns"] == columns
    assert table["data"][1] == [0, 1, 0.7, 0.8, None, 50.0, True, "raster", LAYERS[0]]
    assert table["data"][2] == [0, 2, 0.1, 0.1, None, 1, False, "raster", LAYERS[0]]
    assert table["data"][5] == [1, 2, 0.2, None, 0.3, 50.0, True, "whf", LAYERS[1]]
    layers = json.loads(Path(client.download_artifacts(run.info.run_id, "layers/thresholds_by_layer.json")).read_text())
    names = ("sparse_heads", "simthreshd1", "cdfthreshd", "topk")
    means = [[row[layers["columns"].index(name)] for name in names] for row in layers["data"]]
    assert means == [[2, pytest.approx(0.6), pytest.approx(0.85), None], [3, pytest.approx(0.2), None, 0.3]]


def test_what_came_before_and_what_the_trials_say_are_recorded(
    config: Config, client: MlflowClient, experiment: str
) -> None:
    before, after = make_result((30.0, 34.0)), make_result()
    insight = SearchStatistics(-0.8, {"dense_fraction": 0.25, "cdf/layer_00": 0.75})
    listener = TrackingListener(config)
    listener.on_study_start(started(config))
    listener.on_trial(replace(TRIALS[0], predicted_error=0.03, seconds_sparse=1.5))
    found = {"before": before, "evaluation": after, "comparison": compare(before, after), "insight": insight}
    listener.on_study_end(ended(TRIALS[:1], TRIALS[0], calibration_path=None, **found))
    runs = {run.info.run_name: run for run in runs_of(client, experiment)}
    parent, trial = runs[STUDY_RUN], runs["trial 0"]
    metrics = parent.data.metrics
    assert (metrics["insight/rank_correlation"], metrics["sparsity/overall"]) == (-0.8, 0.25)
    assert (trial.data.metrics["predicted_error"], trial.data.metrics["seconds/sparse"]) == (0.03, 1.5)
    table = json.loads(Path(client.download_artifacts(parent.info.run_id, "importances.json")).read_text())
    assert table["data"] == [["cdf/layer_00", 0.75], ["dense_fraction", 0.25]]
    changes = json.loads(Path(client.download_artifacts(parent.info.run_id, "comparison.json")).read_text())["changes"]
    assert changes["psnr"]["after"] - changes["psnr"]["before"] == pytest.approx(6)


def test_the_prompts_are_a_data_set_that_the_tuning_used(config: Config, client: MlflowClient, experiment: str) -> None:
    listener = TrackingListener(config)
    event = started(config)
    listener.on_study_start(replace(event, config=event.config | {"tune": {"prompt_file": "prompts/tune.txt"}}))
    (run,) = runs_of(client, experiment)
    (used,) = run.inputs.dataset_inputs
    whole = hash_prompts(event.prompts)
    assert (used.dataset.name, used.dataset.digest) == ("tuning prompts", whole[:36])
    assert json.loads(used.dataset.source) == {"uri": "prompts/tune.txt"}
    assert json.loads(used.dataset.profile) == {"num_rows": 2, "prompts_hash": whole}
    assert [(tag.key, tag.value) for tag in used.tags] == [("mlflow.data.context", "tuning")]
    assert run.data.tags["sparsetune.model"] == "demo"
    assert run.data.tags["device"]


def test_a_trials_videos_lie_in_its_run_with_the_worst_prompts_under_one_name(
    config: Config, client: MlflowClient, experiment: str
) -> None:
    listener = TrackingListener(config)
    listener.on_study_start(started(config))
    listener.on_trial(
        replace(TRIALS[0], prompts=(make_prompt(0, 40.0), make_prompt(1, 36.0)), videos={0: b"a", 1: b"b"})
    )
    listener.on_trial(replace(TRIALS[1], videos={0: b"c"}))
    listener.on_trial(TRIALS[2])
    runs = {run.info.run_name: run for run in runs_of(client, experiment)}
    every, pruned, failed = (runs[f"trial {number}"] for number in range(3))
    names = ["videos/prompt_0_compare.mp4", "videos/prompt_1_compare.mp4", "videos/worst_compare.mp4"]
    assert artifacts_of(client, every.info.run_id, "videos") == names
    assert Path(client.download_artifacts(every.info.run_id, names[2])).read_bytes() == b"b"
    assert every.data.tags["worst_prompt"] == "2: a red circle, number 1"
    assert artifacts_of(client, pruned.info.run_id, "videos") == ["videos/worst_compare.mp4"]
    assert artifacts_of(client, failed.info.run_id, "videos") == []
