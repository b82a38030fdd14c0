"""A policy on a real pipeline: what runs, what is counted, and complete removal."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsetune.attention.ordering import ORDERS
from sparsetune.attention.policy import Policy
from sparsetune.attention.schedule import DenseSchedule
from sparsetune.attention.step_cache import StepCache
from sparsetune.attention.thresholds import HeadThresholds, LayerThresholds
from sparsetune.checkpoint import Checkpoint, LayerShape, Manifest, save_checkpoint
from sparsetune.errors import CheckpointError, ModelError
from sparsetune.models.families import attention_sites
from sparsetune.models.generation import Renderer
from sparsetune.models.loading import LoadedModel
from sparsetune.models.sparsify import default_policy, sparsify
from tests.models.conftest import PROMPT, SMALL

DENSE = HeadThresholds(1.0, cdfthreshd=1.0)
HALF = HeadThresholds(-1.0, cdfthreshd=0.5)


@pytest.fixture(scope="module")
def dense(shared_demo: LoadedModel) -> np.ndarray:
    return Renderer(shared_demo, SMALL).render(PROMPT, 0).frames


def layers(demo: LoadedModel) -> list[tuple[str, int]]:
    return [(layer.name, layer.num_heads) for layer in attention_sites(demo.pipe).layers]


def uniform(demo: LoadedModel, head: HeadThresholds, **rest) -> Policy:
    return Policy.uniform(layers(demo), head, **rest)


def test_every_self_attention_layer_is_found(demo: LoadedModel) -> None:
    sites = attention_sites(demo.pipe)
    assert [layer.name for layer in sites.layers] == [f"transformer.transformer_blocks.{i}.attn1" for i in range(8)]
    assert {(layer.num_heads, layer.head_dim) for layer in sites.layers} == {(3, 64)}


def test_full_density_is_the_dense_video_bit_for_bit(demo: LoadedModel, renderer: Renderer, dense: np.ndarray) -> None:
    with sparsify(demo.pipe, uniform(demo, DENSE), "reference") as handle:
        assert np.array_equal(renderer.render(PROMPT, 0).frames, dense)
        assert handle.stats().sparsity == 0.0
        assert handle.stats().num_calls == {"sparse": 32, "dense": 0, "fallback": 0}


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_a_token_order_at_full_density_changes_nothing_but_rounding(
    demo: LoadedModel, renderer: Renderer, dense: np.ndarray, order: str
) -> None:
    with sparsify(demo.pipe, uniform(demo, DENSE, order=order), "reference"):
        frames = renderer.render(PROMPT, 0).frames
    assert np.abs(frames.astype(int) - dense).max() <= 1


def test_sparse_attention_changes_the_video_and_is_counted(
    demo: LoadedModel, renderer: Renderer, dense: np.ndarray
) -> None:
    with sparsify(demo.pipe, uniform(demo, HALF)) as handle:
        frames = renderer.render(PROMPT, 0).frames
        stats = handle.stats()
    assert not np.array_equal(frames, dense)
    assert 0.1 < stats.sparsity < 0.9
    assert stats.sparsity_active == stats.sparsity
    assert list(stats.by_layer) == [name for name, _ in layers(demo)]
    assert len(stats.by_step) == 4
    assert all(len(heads) == 3 for heads in stats.by_head.values())
    assert stats.sparsity == pytest.approx(np.mean(list(stats.by_layer.values())))
    assert stats.sparsity == pytest.approx(np.mean(list(stats.by_head.values())))
    assert set(stats.kernels.values()) == {"reference"}
    assert stats.fallbacks == {}


@pytest.mark.slow
def test_guidance_renders_two_videos_in_each_call(demo: LoadedModel) -> None:
    settings = SMALL.model_copy(update={"guidance_scale": 2.0, "num_inference_steps": 2})
    with sparsify(demo.pipe, uniform(demo, HALF)) as handle:
        Renderer(demo, settings).render(PROMPT, 0)
        stats = handle.stats()
    assert stats.num_calls == {"sparse": 16, "dense": 0, "fallback": 0}
    assert 0.1 < stats.sparsity < 0.9
    assert stats.fallbacks == {}


def test_removal_restores_the_dense_video_exactly(demo: LoadedModel, renderer: Renderer, dense: np.ndarray) -> None:
    handle = sparsify(demo.pipe, uniform(demo, HALF))
    handle.remove()
    handle.remove()
    assert np.array_equal(renderer.render(PROMPT, 0).frames, dense)


def test_an_error_in_the_block_takes_the_policy_off(demo: LoadedModel) -> None:
    with pytest.raises(RuntimeError, match="stop"), sparsify(demo.pipe, uniform(demo, HALF)):
        raise RuntimeError("stop")
    assert "forward" not in demo.pipe.transformer.transformer_blocks[0].attn1.__dict__


def test_a_forward_wrapped_around_ours_passes_through_after_removal(
    demo: LoadedModel, renderer: Renderer, dense: np.ndarray
) -> None:
    module = demo.pipe.transformer.transformer_blocks[0].attn1
    handle = sparsify(demo.pipe, uniform(demo, HALF))
    ours = module.forward
    module.forward = lambda *args, **kwargs: ours(*args, **kwargs)  # as accelerate's offloading hooks do
    handle.remove()
    assert np.array_equal(renderer.render(PROMPT, 0).frames, dense)
    del module.forward


def test_dense_steps_come_first_and_count(demo: LoadedModel, renderer: Renderer) -> None:
    with sparsify(demo.pipe, uniform(demo, HALF, schedule=DenseSchedule(0.5))) as handle:
        renderer.render(PROMPT, 0)
        stats = handle.stats()
    assert stats.by_step[:2] == (0.0, 0.0)
    assert min(stats.by_step[2:]) > 0.1
    assert stats.sparsity == pytest.approx(stats.sparsity_active / 2)
    assert stats.num_calls == {"sparse": 16, "dense": 16, "fallback": 0}


@pytest.mark.slow
def test_a_dense_layer_runs_on_the_pipelines_own_attention(demo: LoadedModel, renderer: Renderer) -> None:
    policy = uniform(demo, HALF)
    off = LayerThresholds.uniform(policy.layers[2].name, 3, HeadThresholds(1.0, cdfthreshd=1.0, is_sparse=False))
    policy = Policy((*policy.layers[:2], off, *policy.layers[3:]))
    with sparsify(demo.pipe, policy) as handle:
        renderer.render(PROMPT, 0)
        stats = handle.stats()
    assert stats.by_layer[off.name] == 0.0
    assert stats.kernels[off.name] == "sdpa"


@pytest.mark.slow
def test_a_policy_can_be_changed_in_place(demo: LoadedModel, renderer: Renderer, dense: np.ndarray) -> None:
    with sparsify(demo.pipe, uniform(demo, HALF)) as handle:
        handle.policy = uniform(demo, DENSE)
        assert np.array_equal(renderer.render(PROMPT, 0).frames, dense)
        handle.reset()
        assert handle.stats().records == ()


def test_a_call_outside_of_its_transformer_runs_dense_and_is_counted(
    demo: LoadedModel, renderer: Renderer, caplog: pytest.LogCaptureFixture
) -> None:
    attention = demo.pipe.transformer.transformer_blocks[0].attn1
    with sparsify(demo.pipe, uniform(demo, HALF)) as handle, caplog.at_level(logging.WARNING):
        renderer.render(PROMPT, 0)
        handle.reset()
        attention(torch.randn(1, 512, 192), encoder_hidden_states=torch.randn(1, 32, 192))
        assert handle.stats().fallbacks == {"the attention ran outside of its transformer": 1}
    assert "runs dense: the attention ran outside of its transformer" in caplog.text


def test_a_transformer_alone_runs_as_in_its_pipeline(demo: LoadedModel, renderer: Renderer, dense: np.ndarray) -> None:
    transformer, scheduler = demo.pipe.transformer, demo.pipe.scheduler
    stepwise = uniform(demo, HALF, schedule=DenseSchedule(0.5))
    with sparsify(demo.pipe, stepwise, "reference"):
        expected = renderer.render(PROMPT, 0).frames
    with sparsify(transformer, stepwise, "reference", scheduler=scheduler) as handle:
        assert np.array_equal(renderer.render(PROMPT, 0).frames, expected)
        assert handle.stats().num_calls == {"sparse": 16, "dense": 16, "fallback": 0}
    assert np.array_equal(renderer.render(PROMPT, 0).frames, dense)
    with sparsify(transformer, uniform(demo, HALF), "reference") as handle:
        renderer.render(PROMPT, 0)
        assert handle.stats().num_calls == {"sparse": 32, "dense": 0, "fallback": 0}
    with pytest.raises(ModelError, match=r"a transformer alone doesn't know them; pass the pipeline, or scheduler="):
        sparsify(transformer, stepwise)
    with pytest.raises(ModelError, match=r"has a step cache .*, which needs the pipeline"):
        sparsify(transformer, replace(stepwise, cache=StepCache("taylorseer", max_skips=1)))


def test_a_transformer_that_pipelines_use_in_different_ways_is_refused_alone(demo: LoadedModel) -> None:
    ambiguous = type("CosmosTransformer3DModel", (torch.nn.Linear,), {})(1, 1)
    with pytest.raises(ModelError, match="CosmosTransformer3DModel in different ways; pass the pipeline"):
        sparsify(ambiguous, uniform(demo, HALF))


def test_twice_is_refused_and_leaves_the_first(demo: LoadedModel) -> None:
    with sparsify(demo.pipe, uniform(demo, HALF)):
        forward = demo.pipe.transformer.transformer_blocks[0].attn1.forward
        with pytest.raises(ModelError, match="is sparse already; call remove"):
            sparsify(demo.pipe, uniform(demo, HALF))
        assert demo.pipe.transformer.transformer_blocks[0].attn1.forward is forward


def test_another_models_policy_is_refused(demo: LoadedModel) -> None:
    wrong = Policy.uniform([*layers(demo)[:7], ("transformer.transformer_blocks.9.attn1", 4)])
    with pytest.raises(CheckpointError, match=r"transformer_blocks\.9\.attn1"):
        sparsify(demo.pipe, wrong)


def test_a_checkpoint_folder_is_a_policy(demo: LoadedModel, tmp_path: Path) -> None:
    policy = uniform(demo, HALF, order="tiles")
    folder = save_checkpoint(Checkpoint(policy, Manifest(tuner="manual")), tmp_path / "checkpoint")
    with sparsify(demo.pipe, folder) as handle:
        assert handle.policy == policy
    with sparsify(demo.pipe, str(folder / "policy.safetensors")) as handle:
        assert handle.policy == policy


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (
            Manifest(tuner="manual", transformer_class="WanTransformer3DModel"),
            "tuned for another model: transformer WanTransformer3DM",
        ),
        (
            Manifest(
                tuner="manual",
                layers=(LayerShape(name="transformer.transformer_blocks.0.attn1", num_heads=3, head_dim=128),),
            ),
            "tuned for another model: head_dim 128 in transformer.transformer_blocks.0.attn1, the model has 64",
        ),
    ],
)
def test_a_manifest_of_another_model_is_refused(demo: LoadedModel, manifest: Manifest, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        sparsify(demo.pipe, Checkpoint(uniform(demo, HALF), manifest))
    assert "forward" not in demo.pipe.transformer.transformer_blocks[0].attn1.__dict__


def test_the_default_policy_is_sparge_untuned(demo: LoadedModel) -> None:
    policy = default_policy(demo.pipe)
    assert {(head.simthreshd1, head.cdfthreshd) for layer in policy.layers for head in layer.heads} == {(0.6, 0.98)}
    assert policy.schedule.dense_fraction == 0.0
    assert not policy.keep_text  # SpargeAttn keeps only its first key block
