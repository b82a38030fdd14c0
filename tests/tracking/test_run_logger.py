import time
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from sparsetune.config.files import flatten
from sparsetune.errors import TrackingError
from sparsetune.tracking import Store
from sparsetune.tracking.run_logger import MAX_TAG, RunLogger, fit_name, start_run, text
from sparsetune.tracking.store import experiment_id

Start = Callable[..., RunLogger]


@pytest.fixture
def start(client: MlflowClient, store: Store, experiment: str) -> Start:
    identifier = experiment_id(client, store, experiment)
    return lambda name="a run", **rest: start_run(client, identifier, name, **({"kind": "trial"} | rest))


def read(run: RunLogger) -> mlflow.entities.Run:
    return run.client.get_run(run.run_id)


def test_everything_logged_is_read_back(start: Start) -> None:
    run = start()
    run.log({"psnr/mean": 1, "left out": None}, params={"a": True, "b": 0.1, "c": (1, "x")}, tags={"t": "v", "u": None})
    run.finish()
    found = read(run)
    assert found.data.metrics == {"psnr/mean": 1.0}
    assert found.data.params == {"a": "true", "b": "0.1", "c": "1, x"}
    assert found.data.tags["t"] == "v" and "u" not in found.data.tags
    assert found.info.status == "FINISHED"


def test_a_child_names_its_parent_and_leaves_the_environment_to_it(start: Start) -> None:
    parent = start(kind="tuning")
    child = start(parent=parent)
    assert read(child).data.tags["mlflow.parentRunId"] == parent.run_id
    assert "version.torch" in read(parent).data.tags
    assert "version.torch" not in read(child).data.tags


@pytest.mark.slow
def test_more_than_a_batch_is_cut_into_several(start: Start) -> None:
    run = start()
    run.log(
        {f"m{index}": index for index in range(2500)},
        params={f"p{index}": index for index in range(250)},
        tags={f"t{index}": index for index in range(150)},
    )
    found = read(run).data
    assert len(found.metrics) == 2500
    assert len(found.params) == 250
    assert len([tag for tag in found.tags if tag.startswith("t")]) == 150


def test_a_long_parameter_is_cut_visibly_and_kept_whole(start: Start, tmp_path: Path) -> None:
    run, long = start(), "x" * 7000
    run.log(params={"prompts/all": long, "short": "y" * 6000}, tags={"why": "z" * 9000})
    found = read(run).data
    assert found.params["prompts/all"].endswith("… (cut; whole in the artifact long/prompts_all.txt)")
    assert len(found.params["prompts/all"]) == len(found.params["short"]) == 6000
    assert found.tags["why"].endswith("long/why.txt)")
    path = run.client.download_artifacts(run.run_id, "long/prompts_all.txt", str(tmp_path))
    assert Path(path).read_text() == long


def test_a_long_description_is_cut_at_a_line_and_points_to_the_whole(start: Start) -> None:
    run = start()
    run.describe("a line of text\n" * 1000, "report.md")
    note = read(run).data.tags["mlflow.note.content"]
    assert len(note) <= MAX_TAG
    assert note.endswith("a line of text\n\n… the rest is in the artifact report.md")


def test_tables_of_several_calls_are_all_listed_and_load(
    start: Start, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)  # load_table searches the default store
    run = start()
    run.log(tables={"one.json": [{"a": 1, "b": "x"}, {"a": 2, "c": None}]})
    run.log(tables={"two.json": [{"a": 1}]})
    RunLogger(run.client, run.run_id).log(tables={"two.json": [{"a": 1}]})
    assert read(run).data.tags["mlflow.loggedArtifacts"].count("one.json") == 1
    assert read(run).data.tags["mlflow.loggedArtifacts"].count("two.json") == 1
    (experiment,) = {read(run).info.experiment_id}
    table = run.client.load_table(experiment, "one.json", run_ids=[run.run_id])
    assert table.columns.tolist() == ["a", "b", "c"]
    assert table["a"].tolist() == [1, 2]


@pytest.mark.parametrize(("error", "status"), [(OSError("full"), "FAILED"), (SystemExit(), "KILLED")])
def test_a_failed_run_keeps_its_cause(start: Start, error: BaseException, status: str) -> None:
    run = start()
    run.fail(error)
    assert read(run).info.status == status
    assert read(run).data.tags["error"].startswith(type(error).__name__)


def test_a_run_that_is_gone_is_an_error_of_one_line(start: Start) -> None:
    run = start()
    run.client.delete_run(run.run_id)
    with pytest.raises(TrackingError, match=rf"cannot write to run {run.run_id}:") as raised:
        run.log({"a": 1})
    assert "\n" not in str(raised.value)


def test_names_are_made_to_fit() -> None:
    assert fit_name("a(b)=é/c.d-e f") == "a_b___/c.d-e f"
    assert len(fit_name("x" * 300)) == 250


def test_nested_values_are_laid_out_under_dotted_names() -> None:
    assert flatten({"a": {"b": {"c": 1}}, "d": None}) == {"a.b.c": 1, "d": None}


@pytest.mark.parametrize(
    ("value", "written"), [(0.1 + 0.2, "0.3"), (1e-9, "1e-09"), (False, "false"), ([1.0, "a"], "1, a")]
)
def test_values_are_written_as_people_read_them(value: object, written: str) -> None:
    assert text(value) == written


def test_a_trials_worth_of_entries_takes_a_fraction_of_a_second(start: Start) -> None:
    start()
    began = time.perf_counter()
    for _ in range(5):
        run = start()
        run.log({f"m{index}": index for index in range(40)}, params={f"p{index}": index for index in range(20)})
        run.finish()
    assert (time.perf_counter() - began) / 5 < 1.0
