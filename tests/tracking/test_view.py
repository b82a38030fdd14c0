import json

from mlflow import MlflowClient

from sparsetune.config import Config
from sparsetune.tracking import TrackingListener
from sparsetune.tracking.ui import VIEW, experiment_page, page_of
from tests.tracking.conftest import Evaluation


def test_the_page_is_the_newest_runs_experiment_with_the_view_on_it(
    config: Config, client: MlflowClient, experiment: str, evaluation: Evaluation
) -> None:
    client.create_experiment(f"{experiment}, newer, without runs")
    listener = TrackingListener(config)
    listener.on_start(evaluation.start)
    listener.on_end(evaluation.end)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    unnamed = config.tracking.model_copy(update={"experiment": None})
    page = f"#/experiments/{found.experiment_id}/runs?viewStateShareKey=sparsetune&workflowType=machine_learning"
    assert experiment_page(client, unnamed) == experiment_page(client, config.tracking) == page
    written = client.get_experiment(found.experiment_id).tags["mlflow.sharedViewState.sparsetune"]
    assert json.loads(written) == VIEW


def test_an_experiment_that_does_not_exist_has_no_page(config: Config, client: MlflowClient) -> None:
    assert experiment_page(client, config.tracking) == ""


def test_a_store_that_cannot_be_read_has_no_page(config: Config) -> None:
    assert page_of("http://127.0.0.1:9", config.tracking) == ""


def test_a_view_that_must_not_be_written_leaves_the_plain_page(
    config: Config, client: MlflowClient, experiment: str
) -> None:
    made = client.create_experiment(experiment)
    client.delete_experiment(made)  # MLflow refuses to write on it, as it does without permission
    assert experiment_page(client, config.tracking) == f"#/experiments/{made}/runs"
