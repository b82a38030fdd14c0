"""A search repeated from the manifest of its checkpoint."""

import json
import logging
from pathlib import Path

import pytest
import torch

from sparsetune.attention.device import device_name
from sparsetune.attention.policy import Policy
from sparsetune.checkpoint import Checkpoint, Manifest, hash_prompts, load_checkpoint, save_checkpoint, versions
from sparsetune.config import Config
from sparsetune.config.files import configs_folder
from sparsetune.errors import CheckpointError, TuningError
from sparsetune.models.pipelines import demo_config
from sparsetune.models.prompts import load_prompts
from sparsetune.tuning import tune
from sparsetune.tuning.reproduce import config_from_manifest, recorded

TUNED = {
    "model.device": "cpu",
    "tune.seed": 7,
    "tune.num_prompts": 3,
    "tune.caches": ("none",),
    "tune.rules": ("cdf", "topk"),
    "tune.storage": "sqlite:///the-first.db",
    "gate.min_psnr": 31.5,
    "eval.output_dir": "elsewhere",
    "tracking.root": "first",
}


def searched(**changes: object) -> Config:
    return demo_config(TUNED | {key.replace("__", "."): value for key, value in changes.items()})


def saved(config: Config, folder: Path, **changes: object) -> Path:
    """A checkpoint as saved by a search with this configuration."""
    manifest = Manifest(
        tuner="optuna",
        tuner_settings={"study_name": "demo-0123abcd"},
        search=recorded(config),
        prompts_hash=hash_prompts(load_prompts(config.tune.prompt_file, config.tune.num_prompts)),
        eval_prompts_hash=hash_prompts(load_prompts(config.eval.prompt_file, config.eval.num_prompts)),
        kernel="reference",
        device=device_name(torch.device("cpu")),
        versions=versions(),
    )
    policy = Policy.uniform([("transformer.transformer_blocks.0.attn1", 3)])
    return save_checkpoint(Checkpoint(policy, manifest.model_copy(update=changes)), folder / "checkpoint")


def test_a_configuration_comes_back_whole_with_the_callers_places(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = searched()
    base = demo_config({"tracking.root": "second", "cache.dir": "cache", "tune.storage": "sqlite:///second.db"})
    again = config_from_manifest(saved(config, tmp_path), base)
    assert (again.tracking, again.cache, again.tune.storage) == (base.tracking, base.cache, "sqlite:///second.db")
    assert again.tune.study_name == "demo-0123abcd-rerun"
    assert again.eval.output_dir is None
    assert again.generation == config.generation and again.gate == config.gate and again.backend == config.backend
    assert again.model == config.model
    mine = {"storage": None, "study_name": None}
    assert again.tune.model_copy(update=mine) == config.tune.model_copy(update=mine)
    assert caplog.messages == []


def test_the_callers_name_for_the_study_is_kept(tmp_path: Path) -> None:
    base = demo_config({"tune.study_name": "mine"})
    assert config_from_manifest(saved(searched(), tmp_path), base).tune.study_name == "mine"


def test_a_packaged_prompt_file_is_told_without_this_machines_folders(tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("a red ball\na blue box\na green cone\n")
    text = json.dumps(recorded(searched(tune__prompt_file=own)))
    assert '"prompt_file": "prompts/demo-eval.txt"' in text
    assert f'"prompt_file": "{own}"' in text
    assert str(configs_folder()) not in text


def test_relative_paths_are_recorded_from_the_root(working_folder: Path) -> None:
    Path("metrics.py").write_text("")
    Path("model").mkdir()
    recorded_search = recorded(searched(eval__metric_modules=("metrics.py", "my.package"), model__source="model"))
    assert recorded_search["eval"]["metric_modules"] == [str(working_folder / "metrics.py"), "my.package"]
    assert recorded_search["model"]["source"] == str(working_folder / "model")
    assert recorded(searched())["model"]["source"] == "demo"


def test_the_commit_of_a_hub_model_takes_the_place_of_its_branch(tmp_path: Path) -> None:
    hub = saved(searched(model__source="someone/model", model__revision="main"), tmp_path, base_revision="abc123")
    assert config_from_manifest(hub, Config()).model.revision == "abc123"
    embedded = saved(searched(), tmp_path)
    assert config_from_manifest(embedded, Config()).model.revision is None


@pytest.mark.parametrize("kind", ["tune", "eval"])
def test_other_prompts_are_refused(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red ball\na blue box\na green cone\na white cube\n")
    path = saved(searched(**{f"{kind}__prompt_file": file, f"{kind}__num_prompts": 3}), tmp_path)
    file.write_text("a red ball\na blue box\na green cone\nanother one\n")
    base = demo_config({f"{kind}.prompt_file": file})
    config_from_manifest(path, base)
    with pytest.raises(TuningError, match=rf"the {kind} prompts must be those .* with --.*prompt-file"):
        config_from_manifest(path, demo_config({}))  # a file that only the manifest names isn't read
    file.write_text("a red ball\na blue box\na cone\na white cube\n")
    with pytest.raises(TuningError, match=f"the {kind} prompts must be those .* the first 3 of {file} are others"):
        config_from_manifest(path, base)
    file.unlink()
    with pytest.raises(TuningError, match=rf"the {kind} prompts must be .*{file}: No such file"):
        config_from_manifest(path, base)


def test_a_module_that_only_the_manifest_names_is_never_imported(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (working_folder / "evil.py").write_text("open('it-ran', 'w')")
    monkeypatch.syspath_prepend(working_folder)
    modules = (str(working_folder / "evil.py"), "evil")
    path = saved(searched(eval__metric_modules=modules), working_folder)
    with caplog.at_level(logging.WARNING):
        config = config_from_manifest(path, demo_config({}))
    assert config.eval.metric_modules == ()
    (message,) = caplog.messages
    assert f"the modules {modules[0]}, evil (give them with --metric-module)" in message
    given = demo_config({"eval.metric_modules": modules})
    assert config_from_manifest(path, given).eval.metric_modules == modules
    assert not (working_folder / "it-ran").exists()


def test_a_model_folder_must_be_given_by_the_caller(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    folder = str(tmp_path / "model")
    path = saved(searched(model__source=folder), tmp_path)
    with pytest.raises(TuningError, match=rf"model is the folder {folder}; if you trust it, give it with --model"):
        config_from_manifest(path, demo_config({}))
    assert config_from_manifest(path, demo_config({"model.source": folder})).model.source == folder


def test_a_prompt_file_cannot_lead_out_of_the_packaged_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorded_search = recorded(searched())
    recorded_search["tune"]["prompt_file"] = "../../../../etc/passwd"
    config = config_from_manifest(saved(searched(), tmp_path, search=recorded_search), demo_config({}))
    assert config.tune.prompt_file == demo_config({}).tune.prompt_file
    assert "the prompt file ../../../../etc/passwd (give it with --prompt-file)" in caplog.text


def test_another_machine_is_a_warning_that_names_what_differs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    there = {"device": "NVIDIA H100 80GB HBM3", "kernel": "sparge", "versions": versions() | {"torch": "2.11.0"}}
    path = saved(searched(), tmp_path, **there)
    with caplog.at_level(logging.WARNING):
        config_from_manifest(path, Config())
    (message,) = caplog.messages
    assert f"device was NVIDIA H100 80GB HBM3 and is {device_name(torch.device('cpu'))}" in message
    assert "kernel was sparge and is reference" in message
    assert f"torch was 2.11.0 and is {versions()['torch']}" in message
    assert "diffusers" not in message


def test_a_manifest_without_a_search_is_refused(tmp_path: Path) -> None:
    path = saved(searched(), tmp_path, search={})
    with pytest.raises(TuningError, match=rf"manifest of {path} has no search settings \(tuner optuna\)"):
        config_from_manifest(path, Config())
    with pytest.raises(CheckpointError, match="there is no"):
        config_from_manifest(tmp_path / "nowhere", Config())


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda recorded_search: recorded_search["tune"].update(magic=3), "tune.magic: Extra inputs are not permitted"),
        (
            lambda recorded_search: recorded_search["gate"].update(min_psnr=-1),
            "gate.min_psnr: Input should be greater than or equal to 0",
        ),
        (lambda recorded_search: recorded_search.pop("generation"), "KeyError 'generation'"),
        (lambda recorded_search: recorded_search.update(tune=[]), "TypeError"),
    ],
)
def test_a_search_of_another_version_names_that(tmp_path: Path, change, cause: str) -> None:
    recorded_search = recorded(searched())
    change(recorded_search)
    path = saved(searched(), tmp_path, search=recorded_search, versions={"sparsetune": "0.9"})
    with pytest.raises(TuningError, match=rf"{cause}.*; repeat it with sparsetune 0.9, which made it"):
        config_from_manifest(path, Config())


@pytest.mark.slow
def test_a_search_repeated_from_its_manifest_finds_the_same_policy(tmp_path: Path) -> None:
    small = {
        "generation.num_frames": 9, "generation.num_inference_steps": 2, "tune.n_trials": 4, "tune.num_prompts": 1,
        "tune.calibration_steps": 1, "tune.orders": ("tiles",), "tune.probe_prompts": 0, "tune.caches": ("none",),
        "tune.max_minutes": None, "eval.num_prompts": 1, "eval.save_videos": False,
        "gate.min_psnr": 10.0, "gate.min_frame_cosine": 0.5, "gate.min_psnr_worst": None,
        "tracking.root": tmp_path / "first", "cache.dir": tmp_path / "cache",
    }  # fmt: skip
    first = tune(demo_config(small), output_dir=tmp_path / "one")
    base = demo_config({"tracking.root": tmp_path / "second", "cache.dir": tmp_path / "other"})
    config = config_from_manifest(first.checkpoint_path, base)
    second = tune(config, output_dir=tmp_path / "two")
    assert [trial.params for trial in second.trials] == [trial.params for trial in first.trials]
    assert load_checkpoint(second.checkpoint_path).policy == load_checkpoint(first.checkpoint_path).policy
