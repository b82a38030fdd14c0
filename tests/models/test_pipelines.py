"""The two pipeline callables, used as in a script with a custom metric."""

from pathlib import Path

import numpy as np
import pytest

import sparsetune
from sparsetune.attention.policy import Policy
from sparsetune.attention.thresholds import HeadThresholds
from sparsetune.checkpoint import Checkpoint, Manifest
from sparsetune.errors import CheckpointError, ConfigError, GenerationError
from sparsetune.models import pipelines
from sparsetune.models.loading import LoadedModel
from sparsetune.models.pipelines import VideoPipeline

FEW = {"num_inference_steps": 2, "num_frames": 9}


@pytest.fixture
def loaded(demo: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that were loaded; always the demo model."""
    asked: list[str] = []

    def load(config: object) -> LoadedModel:
        asked.append(config.source)  # type: ignore[attr-defined]
        return demo

    monkeypatch.setattr(pipelines, "load_pipeline", load)
    return asked


def half(demo: LoadedModel) -> Policy:
    head = HeadThresholds(simthreshd1=-1.0, cdfthreshd=0.5)
    return Policy.uniform([(name, heads) for name, heads, _ in demo.identity.layers], head)


def test_a_metric_of_one_s_own_takes_five_lines(loaded: list[str], demo: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle moving right over a black background\n")
    values = []

    pipe_dense, pipe_sparse = sparsetune.create_pipelines(checkpoint=half(demo))
    for prompt in sparsetune.load_prompts(tmp_path / "prompts.txt", 1):
        frames_dense = pipe_dense(prompt, **FEW).frames[0]
        frames_sparse = pipe_sparse(prompt, **FEW).frames[0]
        values.append(np.abs(frames_dense.astype(float) - frames_sparse).mean())

    assert frames_dense.dtype == np.uint8
    assert frames_dense.shape == (9, 64, 64, 3)
    assert values[0] > 0
    assert loaded == ["demo"]


@pytest.mark.slow
def test_dense_stays_dense_after_sparse_and_sparsity_is_told(loaded: list[str], demo: LoadedModel) -> None:
    dense, sparse = sparsetune.create_pipelines(checkpoint=half(demo))
    before, between, after = dense("a star", **FEW), sparse("a star", **FEW), dense("a star", **FEW)
    assert np.array_equal(before.frames[0], after.frames[0])
    assert not np.array_equal(before.frames[0], between.frames[0])
    assert (before.sparsity, after.sparsity) == (0.0, 0.0)
    assert 0.1 < between.sparsity < 0.9


def test_a_checkpoint_of_another_model_is_refused_at_once(loaded: list[str], demo: LoadedModel) -> None:
    foreign = Checkpoint(half(demo), Manifest(tuner="manual", transformer_class="WanTransformer3DModel"))
    with pytest.raises(CheckpointError, match="was tuned for another model"):
        sparsetune.create_pipelines(checkpoint=foreign)
    with pytest.raises(CheckpointError, match="don't match the model's 8 self-attention layers"):
        sparsetune.create_pipelines(checkpoint=Policy.uniform([("transformer.transformer_blocks.0.attn1", 3)]))


def test_a_model_is_named_as_on_the_command_line(loaded: list[str]) -> None:
    dense, sparse = sparsetune.create_pipelines("cogvideox-2b")
    assert loaded == ["zai-org/CogVideoX-2b"]
    assert isinstance(dense, VideoPipeline)
    assert isinstance(sparse, VideoPipeline)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_frames": 0}, "num_frames must be greater than 0, got 0"),
        ({"generator": None}, "unknown setting generator; settings of a call are seed and num_frames"),
    ],
)
def test_wrong_settings_of_a_call_are_said(loaded: list[str], settings: dict[str, object], message: str) -> None:
    dense, _ = sparsetune.create_pipelines()
    with pytest.raises(ConfigError, match=message):
        dense("a star", **settings)


def test_frames_that_the_model_cant_do_are_said(loaded: list[str]) -> None:
    dense, _ = sparsetune.create_pipelines()
    with pytest.raises(GenerationError, match="the nearest is 9"):
        dense("a star", num_frames=10)
