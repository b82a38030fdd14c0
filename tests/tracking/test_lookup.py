import collections
import contextlib
from pathlib import Path

import pytest

import sparsetune
from sparsetune.checkpoint import Checkpoint, load_checkpoint
from sparsetune.errors import CheckpointError, TrackingError, UsageError
from sparsetune.models.loading import load_pipeline
from sparsetune.models.pipelines import demo_config
from sparsetune.models.sparsify import default_policy
from sparsetune.tracking.lookup import _file_name, check_files_host, find_run, is_reference, resolve_checkpoint
from sparsetune.tracking.promotion import judge, promote
from sparsetune.tracking.results import find_candidate
from sparsetune.tracking.store import MissingError
from tests.tracking.recorded import Place, World, checkpoint_of, policy_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("results/demo/checkpoint", False),
        ("deadbe", True),
        ("deadb", False),  # too short for a run id
        ("DEADBEEF", False),
        ("runs:/x", True),
        ("models:/demo-sparse@champion", True),
        ("tuned.pt", False),
    ],
)
def test_what_is_no_run_and_no_model_is_a_path(working_folder: Path, text: str, expected: bool) -> None:
    assert is_reference(text) is expected


def test_path_that_exists_is_a_path_even_where_it_could_be_a_run_id(working_folder: Path) -> None:
    (working_folder / "deadbeef").mkdir()
    assert resolve_checkpoint("deadbeef") == Path("deadbeef")


@pytest.mark.parametrize(
    ("files", "store", "refused"),
    [
        ("http://evil.example/a", "http://h:5000", True),
        ("mlflow-artifacts://evil.example/a", "http://h:5000", True),
        ("http://h:666/a", "http://h:5000", True),
        ("https://evil.example/a", "sqlite:///mlflow.db", True),
        ("mlflow-artifacts:/1/a", "http://h:5000", False),
        ("mlflow-artifacts://h/a", "http://ada:pw@h:5000", False),
        ("http://h:5000/a", "http://h:5000/", False),
        ("s3://bucket/a", "http://h:5000", False),
        ("file:///data/a", "sqlite:///mlflow.db", False),
        ("/data/a", "sqlite:///mlflow.db", False),
    ],
)
def test_files_on_another_server_are_not_read_with_the_users_credentials(files: str, store: str, refused: bool) -> None:
    with pytest.raises(TrackingError, match="would be sent there") if refused else contextlib.nullcontext():
        check_files_host(files, store)


@pytest.mark.parametrize("name", ["..", "../../../home/ada", "/etc", "a/b", "m-1\\..", "\0", ""])
def test_a_servers_names_cannot_lead_out_of_the_cache(tmp_path: Path, name: str) -> None:
    assert (tmp_path / _file_name(name)).resolve().parent == tmp_path


def test_path_is_given_back_whether_it_exists_or_not() -> None:
    assert resolve_checkpoint("no/such/path") == Path("no/such/path")


def test_runs_and_models_are_downloaded(shared_place: Place, world: World) -> None:
    run, policy = world.sparser.tuning, policy_of(0.8)
    (logged,) = [output.model_id for output in shared_place.client.get_run(run).outputs.model_outputs]
    evaluation = world.sparser.evaluation
    names = [run, run[:12], f"runs:/{run}", f"runs:/{evaluation}/checkpoint", f"runs:/{run}/policy"]
    names.append(f"models:/{logged}")
    for reference in names:
        assert load_checkpoint(resolve_checkpoint(reference)).policy == policy
    for reference in ("models:/demo-sparse@champion", "models:/demo-sparse/1", "models:/demo-sparse/latest"):
        path = resolve_checkpoint(reference)
        assert load_checkpoint(path).policy == policy_of(0.9)
        assert path.is_relative_to(shared_place.folder / "cache" / "checkpoints")


@pytest.mark.slow
def test_alias_that_moved_is_downloaded_anew(place: Place, world: World) -> None:
    assert resolve_checkpoint("models:/demo-sparse@champion").parent.parent.name == "1"
    registry = place.registry()
    promote(registry, judge(registry, find_candidate(place.client, world.sparser.tuning)))
    path = resolve_checkpoint("models:/demo-sparse@champion")
    assert path.parent.parent.name == "2" and load_checkpoint(path).policy == policy_of(0.8)


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        ("a" * 32, MissingError, "cannot find run a{32}: .*list runs with `sparsetune runs`"),
        ("aaaaaaaa", MissingError, "no run id starts with aaaaaaaa; list runs with `sparsetune runs`"),
        ("runs:/nonsense", UsageError, "'nonsense' is not a run: give its id, at least 6 characters of it, or latest"),
        ("models:/demo-sparse", UsageError, "is not models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("models:/nobody@champion", MissingError, "cannot find the registered model nobody.*`sparsetune promote RUN`"),
        ("models:/demo-sparse@staging", MissingError, r"no alias staging, only champion \(version 1\)"),
        ("models:/demo-sparse/9", MissingError, "cannot find version 9 of the model demo-sparse"),
    ],
)
def test_what_is_not_there_is_said(shared_place: Place, reference: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        resolve_checkpoint(reference)
    assert "\n" not in str(raised.value)


def test_runs_that_have_no_checkpoint_say_why(place: Place, world: World) -> None:
    with pytest.raises(TrackingError, match=r"is another tool's: it has no tag sparsetune\.kind"):
        resolve_checkpoint(place.foreign())
    trial = place.run("trial", "trial 1", {})
    with pytest.raises(TrackingError, match="has no checkpoint checkpoint; give its tuning run"):
        resolve_checkpoint(trial)
    with pytest.raises(TrackingError, match="the search had no winner"):
        resolve_checkpoint(place.run("tuning", "tune", {}))
    with pytest.raises(TrackingError, match="has no checkpoint other"):
        resolve_checkpoint(f"runs:/{world.sparser.tuning}/other")


def test_beginning_of_several_ids_lists_them(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsetune.tracking.lookup.SHORTEST_ID", 1)
    first = collections.Counter(run.info.run_id[0] for run in place.runs(at_least=17)).most_common(1)[0][0]
    with pytest.raises(UsageError, match=rf"\d+ run ids start with {first}: {first}.*give more"):
        find_run(place.client, first)


def test_model_of_another_flavour_is_refused(place: Place, tmp_path: Path) -> None:
    model = tmp_path / "other"
    model.mkdir()
    (model / "MLmodel").write_text("flavors:\n  sklearn:\n    pickled_model: model.pkl\nmodel_uuid: x\n")
    run = place.foreign()
    place.client.log_artifacts(run, str(model), "model")
    place.client.create_registered_model("other")
    uri = place.client.get_run(run).info.artifact_uri
    place.client.create_model_version("other", f"{uri}/model", run_id=run)
    with pytest.raises(CheckpointError, match="was not logged by sparsetune: it has the flavours sklearn"):
        resolve_checkpoint("models:/other/1")


def test_server_that_is_away_is_said_at_once(working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(TrackingError, match=r"the tracking server http://127\.0\.0\.1:9 does not answer"):
        resolve_checkpoint("models:/demo-sparse@champion")


def test_checkpoints_are_loaded_by_any_name(shared_place: Place, world: World) -> None:
    assert sparsetune.load_checkpoint("models:/demo-sparse@champion").policy == policy_of(0.9)
    assert sparsetune.load_checkpoint(world.sparser.tuning[:8]).policy == policy_of(0.8)


@pytest.mark.slow  # loads the demo model and renders
def test_promoted_checkpoint_is_installed_by_its_name_and_warns_of_other_settings(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = load_pipeline(demo_config().model).pipe
    fitting = Checkpoint(default_policy(pipe), checkpoint_of(0.9, layers=()).manifest)
    recorded = place.reviewed(place.tuned(0.5, sparsity=0.5, checkpoint=fitting))
    promote(place.registry(), judge(place.registry(), find_candidate(place.client, recorded.tuning)))
    with sparsetune.sparsify(pipe, "models:/demo-sparse@champion") as handle:
        pipe("a red circle", num_frames=9, height=64, width=64, num_inference_steps=2, guidance_scale=1.0)
        assert handle.stats().sparsity > 0
    warned = [message for message in caplog.messages if message.startswith("the checkpoint was tuned for")]
    assert len(warned) == 1
    assert "num_frames 17 and renders 9" in warned[0] and "num_inference_steps 10 and renders 2" in warned[0]
    with pytest.raises(CheckpointError, match="don't match the model's 8 self-attention layers"):
        sparsetune.sparsify(pipe, "models:/demo-sparse@previous")
    _, sparse = sparsetune.create_pipelines("demo", recorded.tuning)
    assert sparse("a red circle", num_inference_steps=2).sparsity > 0
