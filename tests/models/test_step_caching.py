"""Step caches of a policy: installed through diffusers' hooks, counted, and taken off exactly."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    EulerDiscreteScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    PyramidAttentionBroadcastConfig,
    UniPCMultistepScheduler,
)

from sparsetune.attention.policy import Policy
from sparsetune.attention.step_cache import CACHE_KINDS, StepCache
from sparsetune.attention.thresholds import HeadThresholds
from sparsetune.checkpoint import Checkpoint, Manifest, load_checkpoint, save_checkpoint
from sparsetune.checkpoint.sparge_pt import check_expressible
from sparsetune.errors import CheckpointError, ModelError, ThresholdError
from sparsetune.executor import ModelSession
from sparsetune.models import calls
from sparsetune.models.calls import noise_share
from sparsetune.models.generation import Renderer
from sparsetune.models.loading import LoadedModel
from sparsetune.models.sparsify import sparsify
from sparsetune.models.step_caching import hooks_of, measuring_ratios
from sparsetune.tuning.calibration.step_caches import ProbeCaches

NUM_STEPS, NUM_LAYERS = 6, 8
RATIOS = ((1.0,) * NUM_STEPS,)
ALWAYS = {
    "first_block": StepCache("first_block", 1e3),
    "mag": StepCache("mag", 1e3, 5, ratios=RATIOS),
    "taylorseer": StepCache("taylorseer", max_skips=5),
    "sea": StepCache("sea", 1e3, 5),
}
PROMPT = "a red circle moving right over a black background"


@pytest.fixture
def renderer(demo: LoadedModel) -> Iterator[Renderer]:
    from sparsetune.models.pipelines import demo_config

    settings = demo_config({"generation.num_inference_steps": NUM_STEPS, "generation.num_frames": 9}).generation
    yield Renderer(demo, settings)
    assert not hooks_of(demo.pipe.transformer)


def dense(demo: LoadedModel, cache: StepCache | None = None) -> Policy:
    head = HeadThresholds(-1.0, cdfthreshd=1.0, is_sparse=False)
    return replace(Policy.uniform([(name, heads) for name, heads, _ in demo.identity.layers], head), cache=cache)


def half(demo: LoadedModel, cache: StepCache | None = None) -> Policy:
    head = HeadThresholds(-1.0, topk=0.5)
    return replace(Policy.uniform([(name, heads) for name, heads, _ in demo.identity.layers], head), cache=cache)


def attributes(demo: LoadedModel) -> dict[str, set[str]]:
    return {name: set(module.__dict__) for name, module in demo.pipe.transformer.named_modules() if name}


@pytest.mark.parametrize("kind", CACHE_KINDS)
def test_a_cache_skips_blocks_which_are_counted_and_is_taken_off_exactly(
    kind: str, renderer: Renderer, demo: LoadedModel
) -> None:
    before, plain = attributes(demo), renderer.render(PROMPT, 0).frames
    with sparsify(demo.pipe, dense(demo, ALWAYS[kind])) as handle:
        cached = renderer.render(PROMPT, 0).frames
        stats = handle.stats()
    ran = {"first_block": NUM_LAYERS + NUM_STEPS - 1, "taylorseer": 3 * NUM_LAYERS}.get(kind, NUM_LAYERS)
    assert stats.num_calls == {"sparse": 0, "fallback": 0, "dense": ran, "skipped": NUM_STEPS * NUM_LAYERS - ran}
    assert stats.blocks_run == pytest.approx(ran / (NUM_STEPS * NUM_LAYERS))
    assert stats.attention_computed == pytest.approx(stats.blocks_run)
    assert stats.sparsity == 0.0  # of the calls that ran
    assert stats.blocks_run_by_step[0] == 1.0
    assert min(stats.blocks_run_by_step) == (1 / NUM_LAYERS if kind == "first_block" else 0.0)
    assert not np.array_equal(plain, cached)
    assert attributes(demo) == before
    assert np.array_equal(renderer.render(PROMPT, 0).frames, plain)


@pytest.mark.parametrize("kind", CACHE_KINDS)
def test_the_first_and_last_steps_are_never_skipped(kind: str, renderer: Renderer, demo: LoadedModel) -> None:
    cache = replace(ALWAYS[kind], first=0.5, last=0.3)  # the first 3 and the last 2 of 6
    with sparsify(demo.pipe, dense(demo, cache)) as handle:
        renderer.render(PROMPT, 0)
        by_step = handle.stats().blocks_run_by_step
    assert [share == 1.0 for share in by_step] == [True, True, True, kind == "taylorseer", True, True]


@pytest.mark.parametrize(
    "cache", [StepCache("mag", 0.2, 2, ratios=((1.0, 0.95, 0.9, 0.95, 1.0, 1.1),)), StepCache("sea", 0.7, 2)]
)
def test_the_same_generation_is_cached_the_same_way_again(
    cache: StepCache, renderer: Renderer, demo: LoadedModel
) -> None:
    with sparsify(demo.pipe, dense(demo, cache)) as handle:
        first, stats = renderer.render(PROMPT, 0).frames, handle.stats()
        handle.reset()
        assert np.array_equal(renderer.render(PROMPT, 0).frames, first)
        assert handle.stats().blocks_run_by_step == stats.blocks_run_by_step
    assert 0.0 < stats.blocks_run < 1.0


def test_sparsity_is_of_the_calls_that_ran_and_attention_computed_of_all(renderer: Renderer, demo: LoadedModel) -> None:
    with sparsify(demo.pipe, half(demo)) as handle:
        renderer.render(PROMPT, 0)
        alone = handle.stats()
        handle.policy = half(demo, ALWAYS["mag"])
        renderer.render(PROMPT, 0)
        both = handle.stats()
    assert both.sparsity == pytest.approx(alone.sparsity, abs=0.01)  # topk leaves out about the same of every call
    assert both.attention_computed == pytest.approx((1 - both.sparsity) / NUM_STEPS)
    assert set(both.by_layer_and_step[next(iter(both.by_layer))][1:]) == {1.0}


def test_a_paused_policy_caches_nothing_and_goes_on_afterwards(renderer: Renderer, demo: LoadedModel) -> None:
    plain = renderer.render(PROMPT, 0).frames
    with sparsify(demo.pipe, dense(demo, ALWAYS["first_block"])) as handle:
        with handle.paused():
            assert np.array_equal(renderer.render(PROMPT, 0).frames, plain)
        renderer.render(PROMPT, 0)
        assert handle.stats().blocks_run < 1.0


def tidy(demo: LoadedModel) -> None:
    """Remove what diffusers leaves behind when a cache that it enabled is disabled."""
    for module in demo.pipe.transformer.modules():
        module.__dict__.pop("_diffusers_hook", None)
        module.__dict__.pop("forward", None)


def broadcast(pipe: Any) -> PyramidAttentionBroadcastConfig:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 900),
        current_timestep_callback=lambda: pipe.current_timestep,
    )


@pytest.mark.slow
@pytest.mark.parametrize("config", [broadcast, lambda pipe: FirstBlockCacheConfig(threshold=1e3)])
@pytest.mark.parametrize("order", ["cache outside", "policy outside", "cache first", "policy first"])
def test_a_user_s_cache_and_a_policy_may_come_and_go_in_any_order(
    order: str, config: Any, renderer: Renderer, demo: LoadedModel
) -> None:
    pipe, transformer, plain = demo.pipe, demo.pipe.transformer, renderer.render(PROMPT, 0).frames
    with sparsify(pipe, half(demo)) as handle:
        renderer.render(PROMPT, 0)
        wanted = handle.stats().num_calls

    def calls_of_a_rendering() -> dict[str, int]:
        handle.reset()
        renderer.render(PROMPT, 0)
        return handle.stats().num_calls

    if order in ("cache outside", "cache first"):
        transformer.enable_cache(config(pipe))
        handle = sparsify(pipe, half(demo))
    else:
        handle = sparsify(pipe, half(demo))
        transformer.enable_cache(config(pipe))
    both = calls_of_a_rendering()
    assert both["skipped"] > 0
    assert both["sparse"] + both["skipped"] == wanted["sparse"]
    if order in ("cache first", "policy outside"):  # the cache goes, and sparsity stays at work
        transformer.disable_cache()
        assert calls_of_a_rendering() == wanted
        handle.remove()
    else:
        handle.remove()
        transformer.disable_cache()
    assert np.array_equal(renderer.render(PROMPT, 0).frames, plain)
    tidy(demo)


def test_a_policy_s_cache_beside_a_user_s_is_refused_and_nothing_is_installed(
    renderer: Renderer, demo: LoadedModel
) -> None:
    demo.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    try:
        with pytest.raises(ModelError, match="FirstBlockCache is enabled already"):
            sparsify(demo.pipe, dense(demo, ALWAYS["mag"]))
        sparsify(demo.pipe, half(demo)).remove()  # nothing was left behind
    finally:
        demo.pipe.transformer.disable_cache()
        tidy(demo)


def test_ratios_of_another_number_of_transformers_are_refused(renderer: Renderer, demo: LoadedModel) -> None:
    with pytest.raises(ModelError, match="ratios of 2 transformers, the model has 1"):
        sparsify(demo.pipe, dense(demo, StepCache("mag", 0.1, 1, ratios=RATIOS * 2)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "pab"}, "must be one of first_block, mag, taylorseer, sea"),
        ({"kind": "first_block"}, "has a threshold"),
        ({"kind": "first_block", "threshold": 0.0}, "must be above 0"),
        ({"kind": "first_block", "threshold": 0.1, "max_skips": 1}, "has no max_skips"),
        ({"kind": "taylorseer", "max_skips": 0}, "at least 1"),
        ({"kind": "taylorseer", "max_skips": 1, "threshold": 0.1}, "has no threshold"),
        ({"kind": "sea", "threshold": 0.1}, "has a max_skips"),
        ({"kind": "taylorseer", "max_skips": 1, "first": 1.5}, r"first must be in \[0, 1\]"),
        ({"kind": "mag", "threshold": 0.1, "max_skips": 1}, "calibrated ratios"),
    ],
)
def test_parameters_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ThresholdError, match=message):
        StepCache(**values)


def test_mag_ratios_are_those_of_the_residuals(renderer: Renderer, demo: LoadedModel) -> None:
    inputs: list[Any] = []
    outputs: list[Any] = []
    blocks = demo.pipe.transformer.transformer_blocks
    hooks = [
        blocks[0].register_forward_pre_hook(
            lambda _, args, kwargs: inputs.append(kwargs["hidden_states"]), with_kwargs=True
        ),
        blocks[-1].register_forward_hook(lambda module, args, output: outputs.append(output[0])),
    ]
    try:
        renderer.render(PROMPT, 0)
    finally:
        for hook in hooks:
            hook.remove()
    norms = [(out - given).float().norm(dim=-1) for given, out in zip(inputs, outputs, strict=True)]
    wanted = [1.0, *(float((norms[i] / norms[i - 1]).mean()) for i in range(1, NUM_STEPS))]
    with measuring_ratios([demo.pipe.transformer]) as ratios:
        renderer.render(PROMPT, 0)
    assert ratios[0] == pytest.approx(wanted, rel=1e-4)


def test_the_probe_finds_what_works(renderer: Renderer) -> None:
    found = ProbeCaches(PROMPT, 0, CACHE_KINDS, "reference").run(ModelSession(renderer), lambda event: None)
    assert (found.kinds, found.reasons) == (CACHE_KINDS, ())
    assert [len(each) for each in found.ratios] == [NUM_STEPS]


def test_the_probe_says_why_a_model_supports_none(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, config: Any) -> None:
        raise ValueError("Model class Block not registered.")

    monkeypatch.setattr(type(renderer.loaded.pipe.transformer), "enable_cache", refuse)
    found = ProbeCaches(PROMPT, 0, ("first_block",), "reference").run(ModelSession(renderer), lambda event: None)
    assert found.kinds == ()
    assert (
        "doesn't support the cache first_block (Model class Block not registered.)"
        in dict(found.reasons)["first_block"]
    )


def test_checkpoints_hold_the_cache_and_older_ones_load_without(demo: LoadedModel, tmp_path: Any) -> None:
    policy = dense(demo, StepCache("mag", 0.12, 2, first=0.3, ratios=((1.0, 0.95, 0.9),)))
    save_checkpoint(Checkpoint(policy, Manifest(tuner="test")), tmp_path / "new")
    assert load_checkpoint(tmp_path / "new").policy == policy
    with pytest.raises(CheckpointError, match=r"would lose cache mag 0\.12, max_skips 2, first 0\.3"):
        check_expressible(policy, tmp_path / "old.pt")


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of diffusers
@pytest.mark.parametrize(
    "scheduler",
    [
        CogVideoXDDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"),
        EulerDiscreteScheduler(),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        UniPCMultistepScheduler(),
        UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_the_share_of_noise_is_that_of_the_scheduler_s_own_noising(scheduler: Any) -> None:
    scheduler.set_timesteps(6)
    one, none = torch.ones(1, 1), torch.zeros(1, 1)
    for step in range(6):
        at = scheduler.timesteps[step : step + 1]
        if hasattr(scheduler, "scale_noise"):
            signal, noise = (float(scheduler.scale_noise(x, at, n)) for x, n in ((one, none), (none, one)))
        else:
            signal, noise = (float(scheduler.add_noise(x, n, at)) for x, n in ((one, none), (none, one)))
        assert noise_share(scheduler, step) == pytest.approx(noise / (noise + signal), abs=1e-4)


def test_inverted_sigmas_are_of_the_signal() -> None:
    found = []
    for inverted in (False, True):
        scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=inverted)
        scheduler.set_timesteps(4)
        found.append([noise_share(scheduler, step) for step in range(4)])
    assert found[1] == pytest.approx(found[0], abs=1e-6)


@pytest.mark.parametrize("name", ["latents", "frames first", "channels last", "packed", "positioned"])
def test_latents_are_those_of_the_video_in_any_layout(name: str) -> None:
    video = torch.arange(2 * 4 * 3 * 5 * 6.0).view(2, 4, 3, 5, 6)  # 4 channels, the last of them of a condition
    module: Any = SimpleNamespace(config=SimpleNamespace(out_channels=3, patch_size=1))
    packed, time = video.movedim(1, -1).flatten(1, 3), {"timestep": torch.zeros(1)}
    more = torch.cat([packed, packed[:, :7]], 1)  # tokens of a conditioning image
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(15.0), torch.arange(6.0))
    read, given = {
        "latents": (calls.latents_call, {"hidden_states": video}),
        "frames first": (calls.frames_first_call, {"hidden_states": video.transpose(1, 2)}),
        "channels last": (calls.frames_rows_call, {"hidden_states": video.movedim(1, -1)}),
        "packed": (calls.packed_video_call, {"hidden_states": more, "num_frames": 3, "height": 5, "width": 6} | time),
        "positioned": (calls.positioned_call, {"hidden_states": packed, "img_ids": ids} | time),
    }[name]
    found = calls.latents_of(read, module, given)
    wanted = video[:, :3].view(2, 3, 1, 15, 6) if name == "positioned" else video[:, :3]
    assert found is not None
    assert torch.equal(torch.stack(found), wanted)


def test_upstream_s_hooks_have_the_names_that_we_rely_on() -> None:
    from diffusers.hooks import first_block_cache, mag_cache, sea_cache, taylorseer_cache
    from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS
    from diffusers.hooks.hooks import CacheContext, HookRegistry, ModelHook, StateManager

    assert "transformer_blocks" in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS
    assert StateManager(object)._context is None
    assert {"hooks", "_fn_refs"} <= set(vars(HookRegistry(None)))
    assert first_block_cache.FBCHeadBlockHook(StateManager(object), 0.5).threshold == 0.5
    config = mag_cache.MagCacheConfig(mag_ratios=[1.0], num_inference_steps=1)
    assert mag_cache.MagCacheHeadHook(StateManager(object), config).config is config
    hook = taylorseer_cache.TaylorSeerCacheHook(5, 2, None, StateManager(object))
    assert hook.disable_cache_after_step is None
    assert {"name", "step_index", "num_inference_steps", "sigma"} <= set(CacheContext.__dataclass_fields__)
    assert "fn_ref" in vars(ModelHook())
    sea, shared = sea_cache.SeaCacheConfig(), sea_cache.SeaCacheSharedState()
    # What StepCache's `sea` doesn't name, and what the others are set to.
    assert (sea.residual_order, sea.power_exp) == (1, 3.0)
    assert {"threshold", "max_consecutive_cached", "retention_steps", "cache_end_steps"} <= set(vars(sea))
    root = sea_cache.SeaCacheRootHook(sea, StateManager(object), shared, lambda module, args, kwargs: None)
    assert root.fn_ref is None
    assert sea_cache.SeaCacheLeaderBlockHook(sea, root.state_manager, shared).config is sea


def test_a_rendering_that_failed_leaves_nothing_to_the_next(renderer: Renderer, demo: LoadedModel) -> None:
    cache = StepCache("taylorseer", max_skips=5)
    with sparsify(demo.pipe, dense(demo, cache)):
        wanted = renderer.render(PROMPT, 0).frames

        def fail(step: int, num_steps: int) -> None:
            if step == 4:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            renderer.render("a blue star turning over a sand background", 1, fail)
        assert np.array_equal(renderer.render(PROMPT, 0).frames, wanted)


def test_a_handle_that_is_removed_while_paused_stays_removed(renderer: Renderer, demo: LoadedModel) -> None:
    handle = sparsify(demo.pipe, dense(demo, ALWAYS["mag"]))
    with handle.paused():
        handle.remove()
    assert not hooks_of(demo.pipe.transformer)


def test_a_policy_that_is_refused_leaves_the_one_before(renderer: Renderer, demo: LoadedModel) -> None:
    before = dense(demo, ALWAYS["first_block"])
    with sparsify(demo.pipe, before) as handle:
        with pytest.raises(ModelError, match="ratios of 2 transformers"):
            handle.policy = dense(demo, StepCache("mag", 0.1, 1, ratios=RATIOS * 2))
        assert handle.policy == before
        renderer.render(PROMPT, 0)
        assert handle.stats().blocks_run < 1.0


def test_a_transformer_compiled_as_a_whole_can_t_have_a_cache(renderer: Renderer, demo: LoadedModel) -> None:
    demo.pipe.transformer.compile(backend="eager")  # nothing is compiled before it is called
    try:
        with pytest.raises(ModelError, match="compiled as a whole"):
            sparsify(demo.pipe, dense(demo, ALWAYS["mag"]))
    finally:
        demo.pipe.transformer._compiled_call_impl = None


def test_a_cache_that_a_user_replaces_under_the_policy_is_told_and_left_to_the_user(
    renderer: Renderer, demo: LoadedModel
) -> None:
    transformer = demo.pipe.transformer
    with sparsify(demo.pipe, dense(demo, ALWAYS["mag"])):
        transformer.disable_cache()
        with pytest.raises(ModelError, match="was disabled or replaced under it"):
            renderer.render(PROMPT, 0)
        transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    assert transformer.is_cache_enabled
    transformer.disable_cache()
    tidy(demo)
