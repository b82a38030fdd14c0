import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import numpy as np
import pytest
import yaml
from mlflow.models import Model

from sparsetune.checkpoint import Manifest, load_checkpoint, versions
from sparsetune.errors import CheckpointError, ConfigError, PromptError
from sparsetune.models.pipelines import VideoOutput
from sparsetune.tracking import flavor
from sparsetune.tracking.pyfunc import SparseVideoModel, base_config, call_parameters
from tests.tracking.recorded import checkpoint_of, policy_of


@pytest.fixture
def model(tmp_path: Path) -> Path:
    flavor.save_model(checkpoint_of(0.9), tmp_path / "model", metadata={"team": "video"})
    return tmp_path / "model"


def test_model_is_the_policy_with_a_reference_to_its_base_and_no_weights(model: Path) -> None:
    described = Model.load(str(model / "MLmodel"))
    ours = described.flavors["sparsetune"]
    assert (ours["base_source"], ours["base_revision"]) == ("demo", "0123abc")
    assert described.flavors["python_function"]["loader_module"] == "sparsetune.tracking.flavor"
    assert described.metadata == {"team": "video"}
    assert sum(file.stat().st_size for file in model.rglob("*") if file.is_file()) < 20_000
    assert load_checkpoint(model / "checkpoint").policy == policy_of(0.9)


def test_model_names_what_it_needs_to_render(model: Path) -> None:
    requirements = (model / "requirements.txt").read_text().split()
    assert f"sparsetune=={versions()['sparsetune']}" in requirements
    assert {line.partition("==")[0] for line in requirements} >= {"torch", "diffusers", "mlflow"}
    assert yaml.safe_load((model / "conda.yaml").read_text())["dependencies"][-1] == {"pip": requirements}
    assert yaml.safe_load((model / "python_env.yaml").read_text())["dependencies"] == ["-r requirements.txt"]


def test_signature_takes_prompts_and_gives_the_tuned_generation_as_defaults(model: Path) -> None:
    signature = Model.load(str(model / "MLmodel")).signature
    defaults = {param["name"]: param["default"] for param in json.loads(signature.to_dict()["params"])}
    assert defaults == {
        "seed": 42, "num_frames": 17, "height": 64, "width": 64, "num_inference_steps": 10,
        "guidance_scale": 1.0, "fps": 8,
    }  # fmt: skip
    assert signature.inputs.input_types() == [mlflow.types.DataType.string]


def test_native_model_is_the_checkpoint(model: Path) -> None:
    assert flavor.load_model(str(model)).policy == policy_of(0.9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "MLmodel has no flavours; download or save the model again"),
        ("[]", "has no flavours"),
        ("flavors: []", "has no flavours"),
        ("flavors: {sparsetune: 3}", "which is not in its folder"),
        ("flavors: {sparsetune: {checkpoint: 3}}", "which is not in its folder"),
        ("flavors: {3: {}, sklearn: {}}", "was not logged by sparsetune: it has the flavours 3, sklearn"),
        ("flavors: {", "MLmodel is damaged: not valid YAML in line 1"),
        ("a: \x01", "MLmodel is damaged: not valid YAML"),
        ("a: 2026-13-45", "MLmodel is damaged: not valid YAML: month must be in 1..12"),
    ],
)
def test_damaged_mlmodel_is_told(model: Path, text: str, message: str) -> None:
    (model / "MLmodel").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        flavor.load_model(str(model))


def test_folder_that_holds_something_is_left_alone(model: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model is not empty"):
        flavor.save_model(checkpoint_of(0.8), model)
    assert load_checkpoint(model / "checkpoint").policy == policy_of(0.9)


def test_logged_by_mlflow_s_own_means_it_loads_by_its_uri(own_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{own_store}")
    experiment = mlflow.MlflowClient().create_experiment("mine", (own_store.parent / "artifacts").as_uri())
    with mlflow.start_run(experiment_id=experiment) as run:
        info = flavor.log_model(checkpoint_of(0.9), name="policy")
    assert flavor.load_model(info.model_uri).policy == policy_of(0.9)
    assert mlflow.MlflowClient().get_logged_model(info.model_id).source_run_id == run.info.run_id
    loaded = mlflow.pyfunc.load_model(info.model_uri, model_config={"device": "cpu"})
    assert loaded.metadata.run_id == run.info.run_id


def test_base_model_is_loaded_as_it_was_tuned_unless_it_moved() -> None:
    tuned = {"base_source": "owner/name", "base_model": "name", "num_frames": 9, "sigmas": (1.0, 0.5)}
    manifest = checkpoint_of(0.9, **tuned).manifest
    config = base_config(manifest, {})
    assert (config.model.source, config.model.revision, config.model.name) == ("owner/name", "0123abc", "name")
    assert (config.generation.num_frames, config.generation.sigmas) == (9, (1.0, 0.5))
    moved = base_config(manifest, {"base_source": "/models/name", "device": "cpu"})
    assert (moved.model.source, moved.model.revision, moved.model.device) == ("/models/name", None, "cpu")


def test_checkpoint_of_an_unknown_base_must_be_told_one() -> None:
    manifest = Manifest(tuner="manual")
    assert call_parameters(manifest) == {"seed": 42}
    with pytest.raises(ConfigError, match=r"does not name its base model.*set base_source in model_config"):
        base_config(manifest, {})


def test_unknown_model_config_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown model_config keys colour; use base_source, device"):
        SparseVideoModel(checkpoint_of(0.9), {"colour": 1})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "at least one prompt"),
        (["a", " "], "non-empty text, got ' '"),
        ([1], "non-empty text, got 1"),
        ("", "non-empty text, got ''"),
    ],
)
def test_prompts_that_say_nothing_are_refused_before_a_model_is_loaded(given: object, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        SparseVideoModel(checkpoint_of(0.9), {}).predict(given)


def test_a_caller_of_a_served_model_chooses_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="output_dir is set where the model is loaded"):
        SparseVideoModel(checkpoint_of(0.9), {}).predict(["a"], {"output_dir": str(tmp_path / "x")})
    assert list(tmp_path.iterdir()) == []
    model = SparseVideoModel(checkpoint_of(0.9), {})
    with pytest.raises(PromptError):  # models of earlier versions have it as a parameter, empty by default
        model.predict([""], {"output_dir": ""})


def test_requests_in_several_threads_are_rendered_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, most = [], []

    def render(prompt: str, seed: int | None) -> VideoOutput:
        running.append(prompt)
        most.append(len(running))
        time.sleep(0.05)
        running.remove(prompt)
        return VideoOutput((np.zeros((1, 16, 16, 3), dtype=np.uint8),))

    model = SparseVideoModel(checkpoint_of(0.9), {"output_dir": str(tmp_path)})
    monkeypatch.setattr(model, "_pipeline", render)
    with ThreadPoolExecutor(3) as threads:
        paths = [path for found in threads.map(model.predict, (["a", "b"], ["c"], ["d"])) for path in found]
    assert max(most) == 1 and len(most) == len(set(paths)) == 4


@pytest.mark.parametrize("named", ["../../any/path", "/etc", "..", "", None, 7, ["checkpoint"], "link"])
def test_a_model_names_no_checkpoint_outside_its_folder(model: Path, tmp_path: Path, named: object) -> None:
    (tmp_path / "elsewhere").mkdir()
    (model / "link").symlink_to(tmp_path / "elsewhere")
    described = yaml.safe_load((model / "MLmodel").read_text())
    described["flavors"]["sparsetune"]["checkpoint"] = named
    (model / "MLmodel").write_text(yaml.safe_dump(described))
    with pytest.raises(CheckpointError):
        flavor.load_model(str(model))


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "7", "flavors: 3", "flavors: [a]", "flavors: {1: 2}", "flavors: {sparsetune: 3}", "a: b: c",
     "flavors: {sparsetune: {checkpoint: {}}}", "utc_time_created: {}", "[" * 1000, "signature: x", "\x00"],
)  # fmt: skip
def test_a_damaged_mlmodel_is_an_error_of_one_line(model: Path, text: str) -> None:
    (model / "MLmodel").write_text(text)
    with pytest.raises(
        CheckpointError, match=r"MLmodel is damaged|has no flavours|not logged by sparsetune|not in its folder"
    ):
        flavor.checkpoint_folder(model)


@pytest.mark.slow  # loads the demo model and renders three videos
def test_pyfunc_renders_prompts_of_every_form_to_videos(tmp_path: Path) -> None:
    import pandas as pd

    from sparsetune.checkpoint import Checkpoint
    from sparsetune.decoding import read_video
    from sparsetune.models.loading import load_pipeline
    from sparsetune.models.pipelines import create_pipelines, demo_config
    from sparsetune.models.sparsify import default_policy

    policy = default_policy(load_pipeline(demo_config().model).pipe)
    manifest = checkpoint_of(0.9, layers=()).manifest
    flavor.save_model(Checkpoint(policy, manifest), tmp_path / "model")
    loaded = mlflow.pyfunc.load_model(str(tmp_path / "model"), model_config={"output_dir": str(tmp_path / "out")})
    steps = {"num_inference_steps": 2}
    prompts = ["a red circle", "a blue star"]
    first, second = loaded.predict(prompts, params=steps)
    (table,) = loaded.predict(pd.DataFrame({"prompt": prompts[:1]}), params=steps)
    assert Path(first).parent == Path(table).parent == tmp_path / "out"
    assert Path(first).read_bytes() != Path(second).read_bytes()
    assert Path(first).read_bytes() == Path(table).read_bytes()
    _, sparse = create_pipelines("demo", policy)
    expected = sparse(prompts[0], seed=42, num_inference_steps=2).frames[0]
    assert read_video(Path(first)).frames.shape == expected.shape
