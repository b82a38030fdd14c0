"""Reports of runs, in a real store."""

import json
import logging
from pathlib import Path

import pytest
from mlflow import MlflowClient

from sparsetune.config import Config
from sparsetune.errors import ReportError, TrackingError
from sparsetune.tracking import TrackingListener
from sparsetune.tracking import log_report as reporting
from sparsetune.tracking.log_report import source_of
from sparsetune.tuning.record import RECORD_NAME, save_record
from tests.report.synthetic import record_of, result_of
from tests.tracking.conftest import Evaluation, artifacts_of, make_evaluation
from tests.tracking.recorded import Place, World


def reported(config: Config) -> Config:
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"report": True})})


def play(listener: TrackingListener, evaluation: Evaluation) -> str:
    listener.on_start(evaluation.start)
    for prompt in evaluation.prompts:
        listener.on_prompt(prompt)
    listener.on_end(evaluation.end)
    assert listener.run_id is not None
    return listener.run_id


def test_an_evaluation_has_its_report_and_figures(client: MlflowClient, config: Config, tmp_path: Path) -> None:
    run_id = play(TrackingListener(reported(config)), make_evaluation(tmp_path / "results"))
    assert {"report.html", "figures", "report.md", "videos"} <= set(artifacts_of(client, run_id))
    assert artifacts_of(client, run_id, "figures") == ["figures/time_by_phase.png"]
    page = Path(client.download_artifacts(run_id, "report.html", str(tmp_path))).read_text()
    assert 'id="clip-after-1"' in page  # the videos are inside
    assert client.get_run(run_id).info.status == "FINISHED"


def test_no_report_is_made_where_none_is_wanted(client: MlflowClient, config: Config, evaluation: Evaluation) -> None:
    run_id = play(TrackingListener(config), evaluation)
    assert not {"report.html", "figures"} & set(artifacts_of(client, run_id))


def test_a_missing_extra_is_said_once_and_the_runs_go_on(
    client: MlflowClient,
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def missing() -> None:
        raise ReportError("a report must have jinja2; run: pip install 'sparsetune[report]'")

    monkeypatch.setattr(reporting, "check_extra", missing)
    listener = TrackingListener(reported(config))
    runs = [play(listener, make_evaluation(tmp_path / name)) for name in ("first", "second")]
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings == [
        "runs are recorded without a report: a report must have jinja2; run: pip install 'sparsetune[report]'"
    ]
    assert [client.get_run(run_id).info.status for run_id in runs] == ["FINISHED", "FINISHED"]


def test_a_drawing_that_fails_ends_neither_work_nor_recording(
    client: MlflowClient,
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("no width")

    monkeypatch.setattr(reporting, "log_report", broken)
    listener = TrackingListener(reported(config))
    run_id = play(listener, make_evaluation(tmp_path / "results"))
    assert f"run {run_id[:8]} is recorded without a report: unexpected ZeroDivisionError: no width" in caplog.text
    assert client.get_run(run_id).info.status == "FINISHED"
    assert listener.recorder.problem is None


def test_a_tunings_run_is_told_whole(shared_place: Place, world: World, tmp_path: Path) -> None:
    source = source_of(shared_place.client, world.sparser.tuning, tmp_path)
    assert source.name == world.sparser.tuning[:8]
    assert source.evaluation == world.sparser.result
    assert source.before is not None and not source.before.config.use_tuned
    assert sorted(source.files.videos) == [0, 1]
    assert source.tuning is None  # recorded by a version without tuning.json


def test_a_tuning_with_its_record_has_its_search(place: Place, tmp_path: Path) -> None:
    tuning = place.tuned(0.9, before=True).tuning
    record = record_of(8, result_of(use_tuned=False), result_of())
    save_record(record, tmp_path / RECORD_NAME)
    place.client.log_artifact(tuning, str(tmp_path / RECORD_NAME))
    source = source_of(place.client, tuning, tmp_path / "files")
    assert (source.tuning, source.evaluation) == (record, record.evaluation)
    assert sorted(source.files.videos) == [0, 1]


@pytest.mark.parametrize("form", ["{}", "runs:/{}", "models:/demo-sparse@champion"])
def test_an_evaluation_is_found_by_any_name(shared_place: Place, world: World, tmp_path: Path, form: str) -> None:
    source = source_of(shared_place.client, form.format(world.champion.evaluation), tmp_path)
    assert (source.name, source.evaluation) == (world.champion.evaluation[:8], world.champion.result)
    assert json.loads(source.evaluation.model_dump_json())["config"]["use_tuned"]


def test_a_trial_has_no_report(place: Place, tmp_path: Path) -> None:
    trial = place.run("trial", "trial 0", {"mlflow.parentRunId": place.tuned(0.9).tuning})
    with pytest.raises(TrackingError, match="is a trial, which has no evaluation"):
        source_of(place.client, trial, tmp_path)
