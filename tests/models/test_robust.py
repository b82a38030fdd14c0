"""What people do to a pipeline before and after `sparsify`, and between two renderings."""

import copy
import io
import logging
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import accelerate
import pytest
import torch
from diffusers import FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.hooks import HookRegistry
from diffusers.hooks.group_offloading import _GROUP_OFFLOADING, _is_group_offload_enabled
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig

import sparsetune
from sparsetune.attention import interception
from sparsetune.checkpoint import Checkpoint, Manifest
from sparsetune.models.sparsify import sparsify
from tests.models import support
from tests.models.cases import drawn
from tests.models.support import HALF, policy

pytestmark = pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated")
STEPS = 2


def flux() -> Any:
    """A transformer of two blocks and no other model: prompts are given as embeddings, and latents are returned."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=64, joint_attention_dim=32,
        pooled_projection_dim=32, axes_dims_rope=(8, 28, 28),
    )  # fmt: skip
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, transformer.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def render(pipe: Any) -> torch.Tensor:
    with torch.inference_mode():
        return pipe(
            prompt_embeds=drawn(1, 32, 32), pooled_prompt_embeds=drawn(1, 32), height=256, width=256,
            num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0), output_type="latent",
        )[0]  # fmt: skip


@pytest.fixture
def pipe() -> Any:
    return flux()


def dicts(pipe: Any) -> dict[str, set[str]]:
    return {name: set(module.__dict__) for name, module in pipe.transformer.named_modules()}


def checkpoint(pipe: Any) -> Checkpoint:
    return Checkpoint(policy(pipe, HALF), Manifest(tuner="manual", num_inference_steps=30, height=512, width=512))


def test_a_checkpoint_warns_once_of_other_settings_and_leaves_no_hook(
    pipe: Any, caplog: pytest.LogCaptureFixture
) -> None:
    dense = render(pipe)
    before = dicts(pipe)
    handle = sparsetune.sparsify(pipe, checkpoint(pipe), "reference")
    render(pipe)
    (message,) = caplog.messages
    assert "tuned for num_inference_steps 30 and renders 2, height 512 and renders 256, width 512" in message
    render(pipe)
    handle.remove()
    assert dicts(pipe) == before
    assert torch.equal(render(pipe), dense)
    sparsetune.sparsify(pipe, checkpoint(pipe), "reference").remove()  # before anything was rendered
    render(pipe)
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("missing", ["transformer", "transformer_2"])
def test_a_checkpoint_on_a_pipeline_without_one_of_two_transformers(missing: str) -> None:
    pipe = flux()
    pipe.transformer_2 = pipe.transformer
    setattr(pipe, missing, None)
    family = sparsetune.models.families.family_of(pipe)
    assert family.name == "flux"
    if missing == "transformer_2":
        sparsetune.sparsify(pipe, checkpoint(pipe), "reference").remove()


def test_a_failure_on_the_way_takes_everything_off(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before, made = dicts(pipe), []
    whole = interception.AttentionCallMode

    def failing(*args: Any) -> Any:
        made.append(args)
        if len(made) == 2:
            raise RuntimeError("stop")
        return whole(*args)

    monkeypatch.setattr(interception, "AttentionCallMode", failing)
    with pytest.raises(RuntimeError, match="stop"):
        sparsify(pipe, policy(pipe, HALF), "reference")
    assert dicts(pipe) == before


@pytest.mark.filterwarnings("ignore")  # of torch.compile
def test_a_whole_transformer_compiles_after_a_checkpoint_is_installed(
    pipe: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with sparsify(pipe, policy(pipe, HALF), "reference"):
        eager = render(pipe)
    torch._dynamo.reset()
    try:
        with sparsetune.sparsify(pipe, checkpoint(pipe), "reference") as handle, caplog.at_level(logging.WARNING):
            pipe.transformer.compile(fullgraph=True, backend="eager")
            found = render(pipe)
            assert handle.stats().num_calls["sparse"] == 4
    finally:
        torch._dynamo.reset()
    assert "tuned for num_inference_steps 30 and renders 2" in caplog.text
    torch.testing.assert_close(found, eager, atol=1e-3, rtol=1e-3)


def pickled(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


def saved(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_a_copy_of_a_sparse_transformer_is_dense_and_says_so(
    pipe: Any, copied: Callable[[Any], Any], caplog: pytest.LogCaptureFixture
) -> None:
    dense = render(pipe)
    handle = sparsify(pipe, policy(pipe, HALF), "reference")
    sparse = render(pipe)
    other = flux()
    other.transformer = copied(pipe.transformer)
    twice = copied(other.transformer)
    assert [message for message in caplog.messages if "a copy of a sparse transformer is dense" in message]
    assert torch.equal(render(pipe), sparse)
    handle.remove()
    with torch.no_grad():
        for weight in pipe.transformer.parameters():
            weight.zero_()
    assert torch.equal(render(other), dense)
    with sparsify(other, policy(other, HALF), "reference"):
        assert torch.equal(render(other), sparse)
    assert torch.equal(render(other), dense)
    other.transformer = twice
    assert torch.equal(render(other), dense)


@pytest.mark.parametrize("offload_first", [True, False])
@pytest.mark.filterwarnings("ignore")  # accelerate's own
def test_sparsity_stays_when_a_cache_that_was_there_before_is_disabled(pipe: Any, offload_first: bool) -> None:
    dense = render(pipe)
    with sparsify(pipe, policy(pipe, HALF), "reference"):
        sparse = render(pipe)
    hook = accelerate.hooks.ModelHook()
    if offload_first:
        accelerate.hooks.add_hook_to_module(pipe.transformer, hook)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e-9))
    if not offload_first:
        accelerate.hooks.add_hook_to_module(pipe.transformer, hook)
    with sparsify(pipe, policy(pipe, HALF), "reference") as handle:
        assert torch.equal(render(pipe), sparse)
        pipe.transformer.disable_cache()
        handle.reset()
        assert torch.equal(render(pipe), sparse)
        assert handle.stats().num_calls == {"sparse": 4, "dense": 0, "fallback": 0}
    assert torch.equal(render(pipe), dense)


def test_a_processor_that_always_calls_pytorch_may_come_later() -> None:
    """As `set_attn_processor` with one of diffusers' older classes, which have no choice of kernels."""
    case = next(case for case in support_cases() if case.pipeline == "CogVideoXPipeline")
    pipe = support.build(case)
    attention = pipe.transformer.transformer_blocks[0].attn1
    before = attention.processor

    class WithChoice(type(before)):  # type: ignore[misc]
        _attention_backend = None

    attention.set_processor(WithChoice())
    wanted = None
    with sparsify(pipe, policy(pipe, HALF), "reference") as handle:
        wanted = support.rendered(pipe, case)
        attention.set_processor(before)
        assert torch.equal(support.rendered(pipe, case), wanted)
        assert handle.stats().num_calls["fallback"] == 0
    assert isinstance(before, AttnProcessor2_0) or not hasattr(before, "_attention_backend")


def support_cases() -> Any:
    from tests.models.cases import CASES

    return CASES


@dataclass
class World:
    """A pipeline with what was done to it; `expected` says which rendering it must give."""

    pipe: Any = field(default_factory=flux)
    handle: Any = None
    lora: bool = False
    done: list[str] = field(default_factory=list)

    @property
    def expected(self) -> tuple[bool, bool]:
        return self.handle is not None, self.lora


def toggle_policy(world: World) -> None:
    if world.handle is None:
        world.handle = sparsify(world.pipe, policy(world.pipe, HALF), "reference")
    else:
        world.handle.remove()
        world.handle = None


def toggle_lora(world: World) -> None:
    transformer = world.pipe.transformer
    if transformer.transformer_blocks[0].attn.fused_projections:
        return  # the fused weights are others
    if world.lora:
        world.pipe.unload_lora_weights()
    else:
        torch.manual_seed(1)
        transformer.add_adapter(LoraConfig(r=4, lora_alpha=32, init_lora_weights=False, target_modules=["to_q"]))
    world.lora = not world.lora


def toggle_cache(world: World) -> None:
    transformer = world.pipe.transformer
    if transformer.is_cache_enabled:
        transformer.disable_cache()
    else:
        transformer.enable_cache(FirstBlockCacheConfig(threshold=1e-9))


def hooks_of(pipe: Any) -> list[Any]:
    """accelerate's, once offloading was enabled."""
    return pipe.__dict__.get("_all_hooks", [])


def toggle_offload(world: World) -> None:
    if hooks_of(world.pipe):
        world.pipe.remove_all_hooks()
    elif not is_group_offloaded(world):  # diffusers refuses both
        world.pipe.enable_model_cpu_offload(device="cpu")


def is_group_offloaded(world: World) -> bool:
    return _is_group_offload_enabled(world.pipe.transformer)


def toggle_group_offload(world: World) -> None:
    transformer, cpu = world.pipe.transformer, torch.device("cpu")
    if is_group_offloaded(world):
        HookRegistry.check_if_exists_or_initialize(transformer).remove_hook(_GROUP_OFFLOADING)
    elif not hasattr(transformer, "_hf_hook"):  # nor accelerate's hook, also of a pipeline that this one was made from
        transformer.enable_group_offload(cpu, cpu, offload_type="block_level", num_blocks_per_group=1)


def toggle_compile(world: World) -> None:
    _toggle_compiled([world.pipe.transformer])


def toggle_compiled_blocks(world: World) -> None:
    """As `compile_repeated_blocks`."""
    transformer = world.pipe.transformer
    _toggle_compiled([*transformer.transformer_blocks, *transformer.single_transformer_blocks])


def _toggle_compiled(modules: list[Any]) -> None:
    torch._dynamo.reset()
    for module in modules:
        if module._compiled_call_impl is None:
            module.compile(backend="eager")
        else:
            module._compiled_call_impl = None


def toggle_kernel(world: World) -> None:
    transformer = world.pipe.transformer
    if transformer.transformer_blocks[0].attn.processor._attention_backend is None:
        transformer.set_attention_backend("_native_math")
    else:
        transformer.reset_attention_backend()


def toggle_fused(world: World) -> None:
    attention = world.pipe.transformer.transformer_blocks[0].attn
    if attention.fused_projections:
        attention.unfuse_projections()
    elif not world.lora:
        attention.fuse_projections()


def swap_processor(world: World) -> None:
    attention = world.pipe.transformer.transformer_blocks[0].attn
    attention.set_processor(type(attention.processor)())


def other_pipeline(world: World) -> None:
    world.pipe = FluxPipeline.from_pipe(world.pipe)
    world.pipe.set_progress_bar_config(disable=True)


def move(world: World) -> None:
    if not hooks_of(world.pipe):
        world.pipe.to("cpu")


def swap_copy(world: World) -> None:
    """A copy is dense: the policy is removed from the original, and installed on it if it was."""
    sparse = world.handle is not None
    if hooks_of(world.pipe) or world.pipe.transformer.is_cache_enabled or is_group_offloaded(world):
        return  # hooks of accelerate and diffusers keep the original in their closures
    copied = copy.deepcopy(world.pipe.transformer)
    if sparse:
        toggle_policy(world)
    world.pipe.transformer = copied
    if sparse:
        toggle_policy(world)


ACTIONS: tuple[Callable[[World], None], ...] = (
    toggle_policy, toggle_policy, toggle_lora, toggle_cache, toggle_offload, toggle_group_offload, toggle_kernel,
    toggle_fused, swap_processor, other_pipeline, move, swap_copy,
)  # fmt: skip
COMPILING: tuple[Callable[[World], None], ...] = (toggle_compile, toggle_compiled_blocks)


@pytest.fixture(scope="module")
def wanted() -> dict[tuple[bool, bool], torch.Tensor]:
    """The rendering with and without a policy and a LoRA, each of a new pipeline."""
    found = {}
    for sparse in (False, True):
        for lora in (False, True):
            world = World()
            if lora:
                toggle_lora(world)
            if sparse:
                toggle_policy(world)
            found[sparse, lora] = render(world.pipe)
    return found


SEEDS = [pytest.param(seed, marks=() if seed < 6 else pytest.mark.slow) for seed in range(70)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.filterwarnings("ignore")  # of peft, accelerate and torch.compile
def test_any_sequence_of_calls(seed: int, wanted: dict[tuple[bool, bool], torch.Tensor]) -> None:
    """Sparsity is at work while a policy is installed, and after its removal nothing of it is left."""
    chance, world = random.Random(seed), World()
    actions = ACTIONS if seed < 60 else ACTIONS + COMPILING * 2  # compiling takes seconds
    for _ in range(8):
        action = chance.choice(actions)
        action(world)
        world.done.append(action.__name__)
        if chance.random() < 0.5:
            found = render(world.pipe)
            world.done.append("render")
            torch.testing.assert_close(found, wanted[world.expected], atol=1e-4, rtol=1e-4, msg=str(world.done))
            if world.handle is not None:
                calls = world.handle.stats().num_calls
                assert calls["sparse"] and not calls["dense"] and not calls["fallback"], world.done
                world.handle.reset()
    if world.handle is not None:
        toggle_policy(world)
    before = render(world.pipe)
    torch.testing.assert_close(before, wanted[world.expected], atol=1e-4, rtol=1e-4, msg=str(world.done))
    with sparsify(world.pipe, policy(world.pipe, HALF), "reference"):
        render(world.pipe)
    assert torch.equal(render(world.pipe), before), world.done
    held = [value for module in world.pipe.transformer.modules() for value in module.__dict__.values()]
    holders = {getattr(getattr(value, "__self__", None), "interception", None) for value in held}
    assert holders <= {None, interception._NONE}  # the latter stays in a copy
