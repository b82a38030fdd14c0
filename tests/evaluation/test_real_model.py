"""An evaluation of the packaged demo model, with few frames and steps."""

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from sparsetune.config import Config, resolve
from sparsetune.decoding import read_video
from sparsetune.evaluation.baseline import BaselineCache
from sparsetune.evaluation.compare import compare
from sparsetune.evaluation.evaluate import evaluate, evaluate_config
from sparsetune.evaluation.prompt import dense_baseline
from sparsetune.evaluation.result import SCHEMA_PATH, EvaluationResult
from sparsetune.models.generation import Renderer
from sparsetune.models.loading import load_pipeline
from sparsetune.models.sparsify import default_policy, sparsify


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("demo")
    (folder / "prompts.txt").write_text("a red circle moving right over a white background\n")
    settings = {
        "generation.num_inference_steps": 2,
        "generation.num_frames": 9,
        "eval.num_prompts": 1,
        "eval.prompt_file": str(folder / "prompts.txt"),
        "tune.prompt_file": str(folder / "prompts.txt"),
        "eval.metrics": ("ssim",),
        "eval.ladder": True,
        "eval.yardsticks": "all",
        "cache.dir": str(folder / "cache"),
        "backend": "reference",
    }
    return resolve("demo", (), {}, settings)


@pytest.fixture(scope="module")
def renderer(config: Config) -> Renderer:
    return Renderer(load_pipeline(config.model), config.generation)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def result(config: Config, folder: Path) -> EvaluationResult:
    return evaluate_config(config, None, folder)


def test_a_real_result_is_valid_and_whole(result: EvaluationResult, folder: Path) -> None:
    value = json.loads((folder / "cogvideo_accuracy_default.json").read_text())
    jsonschema.validate(value, json.loads(SCHEMA_PATH.read_text()))
    assert EvaluationResult.model_validate(value) == result
    assert result.failed == ()
    assert result.sparsity.overall is not None
    assert result.sparsity.num_calls["sparse"] > 0
    assert result.sparsity.fallbacks == {}
    assert set(result.sparsity.kernels.values()) == {"reference"}
    assert result.sparsity.measured_speedup is None
    assert len(result.sparsity.by_step) == 2


def test_its_floors_are_low_and_its_videos_there(result: EvaluationResult, folder: Path, config: Config) -> None:
    for row in result.detailed_results:
        assert row.ladder is not None
        assert row.ladder["dense_again"]["psnr"] == 100.0
        assert row.ladder["kernel"]["psnr"] > 50.0
        found = {name: one.dense["psnr"] for name, one in row.yardsticks.items()}
        assert set(found) == {"kernel", "dtype", "fp8", "seed"}
        assert found["kernel"] > found["dtype"] > found["fp8"] > found["seed"]
        video = read_video(folder / "videos" / f"prompt_{row.index}_sparse.mp4")
        assert len(video.frames) == config.generation.num_frames


def test_the_baseline_under_a_handle_is_the_bare_pipelines(renderer: Renderer, tmp_path: Path) -> None:
    bare = renderer.render("a blue star", 42).frames
    with sparsify(renderer.loaded.pipe, default_policy(renderer.loaded.pipe), "reference") as handle:
        found = dense_baseline(renderer, handle, "a blue star", 42, BaselineCache(tmp_path, 1.0))
    np.testing.assert_array_equal(found.frames, bare)


def test_a_second_evaluation_renders_no_dense_video_and_compares_equal(
    result: EvaluationResult, config: Config, renderer: Renderer
) -> None:
    prompts = tuple(row.prompt for row in result.detailed_results)
    again = evaluate(
        renderer, None, prompts, cache=BaselineCache(config.cache.folder, 1.0), metrics=("ssim",), backend="reference"
    )
    assert [row.dense_cached for row in again.detailed_results] == [True]
    changes = {change.name: change.difference.mean for change in compare(result, again).changes}
    assert {name for name, mean in changes.items() if mean != 0} <= {"seconds_sparse"}
