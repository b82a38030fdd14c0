"""The model with compiled blocks (`model.compile`), dense and sparse."""

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from sparsetune.attention.policy import Policy
from sparsetune.attention.sites import LayerSite, TransformerSite
from sparsetune.attention.thresholds import HeadThresholds
from sparsetune.bench.step import capture_step
from sparsetune.bench.step_time import time_step
from sparsetune.config import GenerationConfig, ModelConfig
from sparsetune.errors import GenerationError, ModelError
from sparsetune.evaluation.conditions import baseline_key
from sparsetune.models import loading
from sparsetune.models.families import attention_sites
from sparsetune.models.generation import Renderer
from sparsetune.models.loading import LoadedModel, load_pipeline
from sparsetune.models.runtime import describe
from sparsetune.models.sparsify import sparsify
from tests.models.conftest import PROMPT

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch.compile
SETTINGS = GenerationConfig(num_frames=9, height=64, width=64, num_inference_steps=2, guidance_scale=1.0)
COMPILED = ModelConfig(device="cpu", dtype="float32", compile=True)


def compile_with(monkeypatch: pytest.MonkeyPatch, backend: object) -> None:
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(compile_module, backend=backend))


@pytest.fixture
def no_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def compiled(no_graphs: None, monkeypatch: pytest.MonkeyPatch) -> Renderer:
    compile_with(monkeypatch, "eager")  # graphs are traced, and run without a compiler
    return Renderer(load_pipeline(COMPILED), SETTINGS)


def policies(loaded: LoadedModel) -> tuple[Policy, Policy]:
    layers = [(layer.name, layer.num_heads) for layer in attention_sites(loaded.pipe).layers]
    head = HeadThresholds(-1.0, cdfthreshd=0.5)
    return Policy.uniform(layers), Policy.uniform(layers, head, order="hilbert")


Outputs = tuple[list[np.ndarray], list[float], list[dict[str, int]]]


def outputs(loaded: LoadedModel, run: Callable[[], np.ndarray]) -> Outputs:
    """Run dense, under each of two policies in one handle, and dense again; with sparsity and calls under each."""
    first, second = policies(loaded)
    found, sparsities, calls = [run()], [], []
    with sparsify(loaded.pipe, first, "reference") as handle:
        for policy in (first, second):
            handle.policy = policy
            found.append(run())
            sparsities.append(handle.stats().sparsity)
            calls.append(handle.stats().num_calls)
    found.append(run())
    return found, sparsities, calls


def steps(renderer: Renderer) -> Callable[[], Outputs]:
    """Return a function for the outputs of a denoising step."""
    ((module, args, kwargs),) = capture_step(renderer, PROMPT).calls

    def run() -> np.ndarray:
        with torch.inference_mode():
            return module(*args, **kwargs)[0].numpy()

    return lambda: outputs(renderer.loaded, run)


def test_installing_and_removing_policies_compiles_nothing_again(demo: LoadedModel, compiled: Renderer) -> None:
    expected, run_compiled = steps(Renderer(demo, SETTINGS))(), steps(compiled)
    for _ in range(3):
        found = run_compiled()
        assert found[1:] == expected[1:]
        assert all(np.array_equal(one, other) for one, other in zip(found[0], expected[0], strict=True))
        # Dense: the first block, whose input has other strides, and the rest. Sparse: one graph for both.
        assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]
    assert not np.allclose(expected[0][0], expected[0][2], atol=1e-2)


@pytest.mark.slow
def test_steps_are_timed_compiled(compiled: Renderer) -> None:
    step = capture_step(compiled, PROMPT)
    handle = sparsify(compiled.loaded.pipe, policies(compiled.loaded)[0], "reference")
    handle.remove()
    times = time_step(step, handle.backend, compiled.loaded.device, topk=(0.3,), repeats=1)
    assert times.sparse[0].sparsity > 0.3 and not times.fallbacks
    assert counters["stats"]["unique_graphs"] <= 4


@pytest.mark.slow
def test_inductors_videos_are_the_same_to_rounding(demo: LoadedModel, no_graphs: None) -> None:
    def videos(renderer: Renderer) -> Outputs:
        return outputs(renderer.loaded, lambda: renderer.render(PROMPT, 1).frames)

    expected, found = videos(Renderer(demo, SETTINGS)), videos(Renderer(load_pipeline(COMPILED), SETTINGS))
    assert found[2] == expected[2]
    assert found[1] == pytest.approx(expected[1], abs=1e-3)
    for one, other in zip(found[0], expected[0], strict=True):
        assert np.abs(one.astype(int) - other).mean() < 1e-3


def test_it_is_in_the_baselines_key_and_the_description(demo: LoadedModel, compiled: Renderer) -> None:
    plain = Renderer(demo, SETTINGS)
    keys = [baseline_key(renderer, PROMPT, 1) for renderer in (plain, compiled)]
    assert [key.compiled for key in keys] == [False, True]
    assert keys[0].digest != keys[1].digest
    assert [describe(renderer, "reference").compiled for renderer in (plain, compiled)] == [False, True]


def test_both_transformers_are_compiled() -> None:
    model = ModelConfig(source="wan2.2-t2v-a14b", random_weights="tiny", device="cpu", compile=True)
    pipe = load_pipeline(model).pipe
    blocks = [block for part in (pipe.transformer, pipe.transformer_2) for block in part.blocks]
    assert len(blocks) >= 4 and all(block._compiled_call_impl is not None for block in blocks)


def test_a_compiler_that_fails_is_named(no_graphs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(graph: object, inputs: object) -> None:
        raise RuntimeError("no C++ compiler")

    compile_with(monkeypatch, fail)
    renderer = Renderer(load_pipeline(COMPILED), SETTINGS)
    with pytest.raises(GenerationError, match=r"torch.compile failed: .*no C\+\+ compiler.*; leave out --compile"):
        renderer.render(PROMPT, 1)


class Plain(nn.Module):
    """A transformer with attention in a list of its own: there is no block around it."""

    _repeated_blocks: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([nn.Identity()])

    def compile_repeated_blocks(self) -> None:
        raise ValueError("Regional compilation failed because ('Block',) classes are not found in the model.")


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ((), "cannot compile Plain: it has no repeated blocks; leave out --compile"),
        (("Block",), r"cannot compile transformer: .* classes are not found in the model\.; leave out --compile"),
    ],
)
def test_a_transformer_without_repeated_blocks_is_refused(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], reason: str
) -> None:
    module = Plain()
    module._repeated_blocks = names
    layer = LayerSite("transformer.attentions.0", module.attentions[0], 1, 64)
    site = TransformerSite("transformer", module, (layer,), lambda *_: None)  # type: ignore[arg-type,return-value]
    monkeypatch.setattr(loading, "attention_sites", lambda pipe: SimpleNamespace(transformers=(site,)))
    with pytest.raises(ModelError, match=reason):
        loading._compile_blocks(None, COMPILED)


def test_sequential_offloading_is_refused() -> None:
    with pytest.raises(ModelError, match="--compile doesn't work with --offload sequential; use --offload model"):
        loading._compile_blocks(None, ModelConfig(offload="sequential", compile=True))
