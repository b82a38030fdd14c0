"""Features combined with a sparse pipeline: LoRA, compiled blocks, offloading, casting, caches and more."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from diffusers import ContextParallelConfig, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from peft import LoraConfig, get_peft_model_state_dict

from sparsetune.attention.schedule import DenseSchedule
from sparsetune.attention.step_cache import StepCache
from sparsetune.errors import ModelError
from sparsetune.models.random_weights import blueprint, build_pipeline
from sparsetune.models.sparsify import sparsify
from tests.models import support
from tests.models.cases import CASES
from tests.models.support import HALF, policy

WAN = next(case for case in CASES if case.blueprint == "wan2.1-t2v-1.3b")
pytestmark = pytest.mark.slow


@pytest.fixture
def pipe() -> Iterator[Any]:
    yield support.build(WAN)


def sparse(pipe: Any, **rest: Any) -> tuple[torch.Tensor, Any]:
    with sparsify(pipe, policy(pipe, HALF, **rest), "reference") as handle:
        return support.rendered(pipe, WAN), handle.stats()


def test_group_offload_renders_the_same(pipe: Any) -> None:
    wanted, _ = sparse(pipe)
    cpu = torch.device("cpu")
    pipe.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    found, stats = sparse(pipe)
    assert torch.equal(found, wanted)
    assert stats.num_calls == {"sparse": 8, "dense": 0, "fallback": 0}


@pytest.mark.parametrize("before", [True, False])
def test_model_offload_renders_the_same_again_and_again(pipe: Any, before: bool) -> None:
    """Model offloading with the CPU as the execution device; each generation reinstalls the hooks."""
    dense, (wanted, _) = support.rendered(pipe, WAN), sparse(pipe)
    if before:
        pipe.enable_model_cpu_offload(device="cpu")
    with sparsify(pipe, policy(pipe, HALF), "reference") as handle:
        if not before:
            pipe.enable_model_cpu_offload(device="cpu")
        for _ in range(2):
            assert torch.equal(support.rendered(pipe, WAN), wanted)
        assert handle.stats().num_calls == {"sparse": 16, "dense": 0, "fallback": 0}
    assert torch.equal(support.rendered(pipe, WAN), dense)


@pytest.mark.filterwarnings("ignore")  # accelerate's own
def test_sequential_offload_hooks_render_the_same(pipe: Any) -> None:
    """`enable_sequential_cpu_offload` with the CPU as the execution device."""
    wanted, _ = sparse(pipe)
    accelerate.cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
    assert {weight.device.type for weight in pipe.transformer.parameters()} == {"meta"}
    for _ in range(2):
        found, stats = sparse(pipe)
        assert torch.equal(found, wanted)
        assert stats.num_calls["sparse"] == 8


def test_float8_layerwise_casting_runs_sparse(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    dense = support.rendered(pipe, WAN)
    found, stats = sparse(pipe)
    assert stats.num_calls["sparse"] == 8
    assert not torch.equal(found, dense)
    assert torch.equal(support.rendered(pipe, WAN), dense)


def test_vae_tiling_renders_the_same_latents(pipe: Any) -> None:
    wanted, _ = sparse(pipe)
    pipe.vae.enable_tiling()
    assert torch.equal(sparse(pipe)[0], wanted)


@pytest.mark.parametrize("before", [True, False])
def test_a_lora_is_at_work_dense_and_sparse(pipe: Any, before: bool, tmp_path: Path) -> None:
    """A minimally trained LoRA, saved and loaded as users do: before `sparsify` or after."""
    plain, (plain_sparse, _) = support.rendered(pipe, WAN), sparse(pipe)
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=32, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"])
    pipe.transformer.add_adapter(config)
    pipe.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    pipe.unload_lora_weights()
    assert torch.equal(support.rendered(pipe, WAN), plain)
    if before:
        pipe.load_lora_weights(tmp_path)
        found, stats = sparse(pipe)
    else:
        with sparsify(pipe, policy(pipe, HALF), "reference") as handle:
            pipe.load_lora_weights(tmp_path)
            found, stats = support.rendered(pipe, WAN), handle.stats()
    assert stats.num_calls == {"sparse": 8, "dense": 0, "fallback": 0}
    assert not torch.allclose(found, plain_sparse, atol=1e-3)
    dense = support.rendered(pipe, WAN)
    assert not torch.allclose(dense, found, atol=1e-3)
    with sparsify(pipe, policy(pipe, support.DENSE), "reference"):
        assert torch.equal(support.rendered(pipe, WAN), dense)
    pipe.unload_lora_weights()
    assert torch.equal(support.rendered(pipe, WAN), plain)
    assert torch.equal(sparse(pipe)[0], plain_sparse)


@pytest.mark.parametrize("first", ["sparsify", "compile"])
@pytest.mark.filterwarnings("ignore")  # of torch.compile about the model's own code
def test_blocks_compiled_one_by_one_are_one_graph(first: str) -> None:
    """`compile_repeated_blocks` with more blocks than PyTorch's recompile limit: none is recompiled."""
    plan = blueprint(WAN.blueprint)
    parts = copy.deepcopy(plan.components)
    parts["transformer"]["tiny"]["num_layers"] = 10
    pipe = build_pipeline(replace(plan, components=parts), "tiny")
    pipe.set_progress_bar_config(disable=True)
    eager, _ = sparse(pipe)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        if first == "compile":
            pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
        with sparsify(pipe, policy(pipe, HALF), "reference") as handle:
            if first == "sparsify":
                pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
            found, stats = support.rendered(pipe, WAN), handle.stats()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    finally:
        torch._dynamo.reset()
    assert stats.num_calls == {"sparse": 40, "dense": 0, "fallback": 0}
    torch.testing.assert_close(found, eager, atol=1e-3, rtol=1e-3)


@pytest.mark.filterwarnings("ignore")  # of torch.compile about the model's own code
def test_a_whole_compiled_transformer_is_one_graph(pipe: Any) -> None:
    eager, _ = sparse(pipe)
    torch._dynamo.reset()
    try:
        with sparsify(pipe, policy(pipe, HALF), "reference") as handle:
            pipe.transformer.compile(fullgraph=True, backend="eager")
            found, stats = support.rendered(pipe, WAN), handle.stats()
    finally:
        torch._dynamo.reset()
    assert stats.num_calls == {"sparse": 8, "dense": 0, "fallback": 0}
    torch.testing.assert_close(found, eager, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("before", [True, False])
def test_a_first_block_cache_skips_layers_and_the_rest_is_counted(pipe: Any, before: bool) -> None:
    config = FirstBlockCacheConfig(threshold=10.0)  # so high that every step after the first is taken from the cache
    if before:
        pipe.transformer.enable_cache(config)
        _, stats = sparse(pipe)
    else:
        with sparsify(pipe, policy(pipe, HALF), "reference") as handle:
            pipe.transformer.enable_cache(config)
            support.rendered(pipe, WAN)
            stats = handle.stats()
    assert stats.num_calls == {"sparse": 6, "dense": 0, "fallback": 0, "skipped": 2}


CACHES = (
    StepCache("first_block", 1e3),
    StepCache("mag", 1e3, 5, ratios=((1.0,) * 2, (1.0,) * 4)),
    StepCache("taylorseer", max_skips=5),
    StepCache("sea", 1e3, 5),
)


@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: cache.kind)
def test_a_policy_s_cache_works_on_two_transformers_with_guidance_by_two_calls(
    cache: StepCache, offloaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(support, "STEPS", 6)
    case = next(case for case in CASES if case.blueprint == "wan2.2-t2v-a14b")
    pipe = support.build(case)
    plain = support.rendered(pipe, case)
    if offloaded:
        pipe.enable_model_cpu_offload(device="cpu")
    with sparsify(pipe, replace(policy(pipe, HALF), cache=cache), "reference") as handle:
        cached = support.rendered(pipe, case)
        stats = handle.stats()
        assert torch.equal(support.rendered(pipe, case), cached)
    first, second = {  # the first transformer runs two steps, the second four
        "first_block": ((1.0, 0.5), (1.0, 0.5, 0.5, 0.5)),
        "mag": ((1.0, 0.0), (1.0, 0.0, 0.0, 0.0)),
        "taylorseer": ((1.0, 1.0), (1.0, 1.0, 0.0, 1.0)),
        "sea": ((1.0, 0.0), (1.0, 0.0, 0.0, 0.0)),
    }[cache.kind]
    assert stats.blocks_run_by_step == (*first, *second)
    assert sum(stats.num_calls.values()) == 6 * 2 * 2  # steps, calls for guidance, layers
    assert torch.equal(support.rendered(pipe, case), plain)


def test_a_cache_that_a_transformer_doesn_t_support_is_refused_and_nothing_is_installed() -> None:
    case = next(case for case in CASES if case.blueprint == "ltx-2")
    pipe = support.build(case)
    before = {name: set(module.__dict__) for name, module in pipe.transformer.named_modules() if name}
    with pytest.raises(ModelError, match="LTX2VideoTransformer3DModel doesn't support the cache first_block"):
        sparsify(pipe, replace(policy(pipe, HALF), cache=CACHES[0]), "reference")
    assert {name: set(module.__dict__) for name, module in pipe.transformer.named_modules() if name} == before
    sparsify(pipe, policy(pipe, HALF), "reference").remove()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a scheduler of diffusers
def test_a_pipeline_that_names_no_calls_can_t_have_a_cache() -> None:
    case = next(case for case in CASES if case.blueprint == "allegro")
    pipe = support.build(case)
    with (
        sparsify(pipe, replace(policy(pipe, HALF), cache=CACHES[2]), "reference"),
        pytest.raises(ModelError, match="doesn't name its transformer calls"),
    ):
        support.rendered(pipe, case)


def test_pyramid_attention_broadcast_skips_calls_and_the_rest_is_counted(pipe: Any) -> None:
    pipe.transformer.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 1001),
            current_timestep_callback=lambda: pipe.current_timestep,
            spatial_attention_block_identifiers=("blocks",),
        )
    )
    _, stats = sparse(pipe)
    assert 0 < stats.num_calls["sparse"] < 8
    assert stats.num_calls["sparse"] + stats.num_calls["skipped"] == 8


@pytest.mark.parametrize("kernel", ["_native_math", "flex"])
@pytest.mark.filterwarnings("ignore")  # flex_attention warns that it isn't compiled
def test_another_attention_backend_runs_the_dense_calls(pipe: Any, kernel: str) -> None:
    plain = support.rendered(pipe, WAN)
    wanted, _ = sparse(pipe)
    pipe.transformer.set_attention_backend(kernel)
    processors = [block.attn1.processor._attention_backend for block in pipe.transformer.blocks]
    dense = support.rendered(pipe, WAN)
    found, stats = sparse(pipe)
    assert stats.num_calls == {"sparse": 8, "dense": 0, "fallback": 0}
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)
    all_dense, _ = sparse(pipe, schedule=DenseSchedule(1.0))
    assert torch.equal(all_dense, dense)
    assert not np.array_equal(plain, dense)
    assert [block.attn1.processor._attention_backend for block in pipe.transformer.blocks] == processors


def test_context_parallel_is_refused_with_the_reason(pipe: Any) -> None:
    pipe.transformer._parallel_config = ContextParallelConfig(ulysses_degree=2)
    with pytest.raises(ModelError, match="runs context-parallel, which sparse attention doesn't support"):
        sparsify(pipe, policy(pipe, HALF))
    pipe.transformer._parallel_config = None
    sparsify(pipe, policy(pipe, HALF)).remove()


def test_a_pipeline_without_self_attention_is_refused(pipe: Any) -> None:
    wanted = policy(pipe, HALF)
    pipe.transformer.blocks = torch.nn.ModuleList()
    with pytest.raises(ModelError, match="found no self-attention modules"):
        sparsify(pipe, wanted)
