from pathlib import Path

import pytest
from mlflow.models import Model

from sparsetune import __version__
from sparsetune.checkpoint import save_checkpoint
from sparsetune.errors import TrackingError
from sparsetune.evaluation.conditions import policy_digest
from sparsetune.tracking.logged_model import DIGEST, find_model, log_checkpoint_model
from tests.tracking.recorded import Place, checkpoint_of, policy_of


def test_model_is_an_output_of_its_run_with_the_tuned_generation(place: Place, tmp_path: Path) -> None:
    run = place.run("tuning", "tune", {})
    checkpoint = save_checkpoint(checkpoint_of(0.9), tmp_path / "checkpoint")
    model_id = log_checkpoint_model(place.client, run, checkpoint)
    model = place.client.get_logged_model(model_id)
    assert (str(model.status), model.name, model.source_run_id) == ("READY", "policy", run)
    assert model.params["num_inference_steps"] == "10"
    assert model.tags["base_revision"] == "0123abc"
    assert model.tags[DIGEST] == policy_digest(policy_of(0.9))
    assert [output.model_id for output in place.client.get_run(run).outputs.model_outputs] == [model_id]
    # The same policy is the same model; another policy is another model.
    assert log_checkpoint_model(place.client, run, checkpoint) == model_id
    other = save_checkpoint(checkpoint_of(0.8), tmp_path / "other")
    assert log_checkpoint_model(place.client, run, other) != model_id


@pytest.mark.usefixtures("not_installed")
def test_model_is_logged_from_a_checkout_that_is_not_installed(place: Place, tmp_path: Path) -> None:
    run = place.run("tuning", "tune", {})
    checkpoint = save_checkpoint(checkpoint_of(0.9), tmp_path / "checkpoint")
    model_id = log_checkpoint_model(place.client, run, checkpoint)
    location = place.client.get_logged_model(model_id).artifact_location
    model = Model.load(f"{location.removeprefix('file://')}/MLmodel")
    assert model.flavors["sparsetune"]["sparsetune_version"] == __version__


@pytest.mark.parametrize(
    ("lost", "status"),
    [
        pytest.param(("log_model_artifacts",), "FAILED", marks=pytest.mark.slow),
        (("log_outputs", "finalize_logged_model"), "PENDING"),  # the server is unreachable from here on
        pytest.param(("finalize_logged_model",), "PENDING", marks=pytest.mark.slow),
    ],
)
def test_model_that_was_left_half_made_is_none_until_the_next_call_completes_it(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: tuple[str, ...], status: str
) -> None:
    run = place.run("tuning", "tune", {})
    checkpoint = save_checkpoint(checkpoint_of(0.9), tmp_path / "checkpoint")

    def refuse(*_: object) -> None:
        raise ConnectionError("gone")

    with monkeypatch.context() as patch, pytest.raises(TrackingError, match=f"cannot write to run {run}: gone"):
        for call in lost:
            patch.setattr(place.client, call, refuse)
        log_checkpoint_model(place.client, run, checkpoint)
    assert find_model(place.client, run, policy_digest(policy_of(0.9))) is None
    (begun,) = place.client.search_logged_models(["1"], filter_string=f"source_run_id = '{run}'")
    assert str(begun.status) == status
    assert log_checkpoint_model(place.client, run, checkpoint) == begun.model_id
    (model,) = place.client.search_logged_models(["1"], filter_string=f"source_run_id = '{run}'")
    assert str(model.status) == "READY"
    assert [output.model_id for output in place.client.get_run(run).outputs.model_outputs] == [model.model_id]
