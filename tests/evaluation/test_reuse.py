"""An evaluation under the same conditions is copied instead of rendered again."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsetune.config import Config
from sparsetune.evaluation import reuse
from sparsetune.evaluation.evaluate import evaluate_config
from sparsetune.evaluation.events import EvaluationListener, EvaluationStarted
from sparsetune.evaluation.result import EvaluationResult, load_result
from sparsetune.models.pipelines import demo_config

NAME = "cogvideo_accuracy_default.json"


class Starts(EvaluationListener):
    def __init__(self) -> None:
        self.number = 0

    def on_start(self, event: EvaluationStarted) -> None:
        self.number += 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of an evaluation, by code whose commit is known."""
    root = tmp_path_factory.mktemp("reuse")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsetune.evaluation.conditions.git_commit", lambda: "abc")
        evaluate_config(config(root), None, root / "first")
    yield root / "first"


@pytest.fixture
def commit(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (reuse, __import__("sparsetune.evaluation.conditions", fromlist=["git_commit"])):
        monkeypatch.setattr(module, "git_commit", lambda: "abc")


def config(root: Path, **overrides: Any) -> Config:
    small = {
        "generation.num_frames": 9, "generation.num_inference_steps": 2, "eval.num_prompts": 1,
        "eval.metrics": ("psnr",), "cache.dir": root / "cache",
    }  # fmt: skip
    return demo_config(small | {key.replace("__", "."): value for key, value in overrides.items()})


def again(folder: Path, output: Path, **overrides: Any) -> tuple[EvaluationResult, int]:
    """Evaluate with leave to reuse a folder; returns the result and how many evaluations started."""
    starts = Starts()
    result = evaluate_config(config(folder.parent, **overrides), None, output, [starts], reuse=[folder])
    return result, starts.number


@pytest.mark.usefixtures("commit")
def test_the_same_evaluation_is_copied_with_its_files_and_says_so(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "sparsetune"):
        result, started = again(folder, tmp_path / "second")
    assert started == 0 and result == load_result(folder / NAME) == load_result(tmp_path / "second" / NAME)
    names = [{path.relative_to(one) for path in one.rglob("*.*")} for one in (folder, tmp_path / "second")]
    assert names[0] == names[1] and len(names[0]) >= 6
    assert f"reused the same evaluation from {folder}" in caplog.text and "--no-reuse" in caplog.text
    assert again(folder, folder)[1] == 0  # in its own place


@pytest.mark.usefixtures("commit")
@pytest.mark.parametrize(
    "changed",
    [{"eval__seed": 7}, {"gate__min_psnr": 99.0}, {"eval__metrics": ("ssim",)}, {"generation__guidance_scale": 2.0}],
    ids=str,
)
def test_another_seed_gate_metric_or_setting_renders_again(folder: Path, tmp_path: Path, changed: Any) -> None:
    assert again(folder, tmp_path, **changed)[1] == 1


@pytest.mark.parametrize("commit", ["def", "abc-dirty"])
def test_other_code_renders_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commit: str) -> None:
    monkeypatch.setattr(reuse, "git_commit", lambda: commit)
    assert again(folder, tmp_path)[1] == 1


@pytest.mark.usefixtures("commit")
def test_a_damaged_result_renders_again(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / NAME).write_text("{")
    starts = Starts()
    evaluate_config(config(folder.parent), None, tmp_path / "out", [starts], reuse=[tmp_path / "broken"])
    assert starts.number == 1
