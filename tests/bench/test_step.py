"""One step of the real demo model: captured, timed, and run with a break-even table."""

from pathlib import Path

import pytest
import torch

from sparsetune.attention.backends import ReferenceBackend
from sparsetune.attention.breakeven import BreakEvenTable, ShapeTimes, SparseTime, save_table
from sparsetune.attention.device import device_name
from sparsetune.attention.ordering import TokenLayout
from sparsetune.attention.policy import Policy
from sparsetune.attention.thresholds import HeadThresholds
from sparsetune.bench.break_even import backends_to_time, time_table
from sparsetune.bench.step import CallShape, Step, capture_step
from sparsetune.bench.step_time import time_step
from sparsetune.config import GenerationConfig
from sparsetune.errors import BackendError
from sparsetune.models.families import attention_sites
from sparsetune.models.generation import Renderer
from sparsetune.models.loading import LoadedModel
from sparsetune.models.sparsify import sparsify
from tests.models.conftest import PROMPT, SMALL

CPU = torch.device("cpu")
LAYOUT = TokenLayout((3, 16, 16), range(32))


@pytest.fixture
def step(renderer: Renderer) -> Step:
    return capture_step(renderer, PROMPT)


def test_the_step_is_what_the_pipeline_calls_first(demo: LoadedModel, step: Step) -> None:
    ((module, _, kwargs),) = step.calls
    assert module is demo.pipe.transformer
    assert kwargs["hidden_states"].shape == (1, 3, 8, 16, 16)
    assert step.shapes() == {CallShape((1, 3, 800, 64), torch.float32, LAYOUT): 8}


def test_guidance_is_part_of_the_step(demo: LoadedModel) -> None:
    guided = GenerationConfig(**SMALL.model_dump() | {"guidance_scale": 6.0})
    assert list(capture_step(Renderer(demo, guided), PROMPT).shapes()) == [
        CallShape((2, 3, 800, 64), torch.float32, LAYOUT)
    ]


@pytest.mark.slow
def test_a_step_is_timed_dense_sparse_and_without_attention(demo: LoadedModel, step: Step) -> None:
    reported = []
    times = time_step(step, ReferenceBackend(), CPU, topk=(0.25,), repeats=1, on_time=reported.append)
    assert tuple(reported) == times.rows
    assert [row.name for row in times.rows] == [
        "dense", "reference, topk 0.25", "self-attention removed", "dense, everything taken off",
    ]  # fmt: skip
    assert [row.sparsity > 0.4 for row in times.rows] == [False, True, False, False]
    assert times.ceiling == pytest.approx(1 / (1 - times.attention_share))
    assert 0 < times.attention_share < 1
    assert times.dense.peak_gib is None
    assert times.fallbacks == {}


def test_the_table_is_of_the_shapes_given() -> None:
    shapes = [CallShape((1, 2, 300, 64), torch.float32, TokenLayout((1, 1, 200), range(60), tail=40))]
    backends = backends_to_time("auto", CPU)
    assert [backend.name for backend in backends] == ["reference"]
    table = time_table(shapes, backends, CPU, repeats=1)
    assert (table.device, [shape.tokens for shape in table.shapes]) == (device_name(CPU), [300])
    assert "torch" in table.versions


def break_even(at: float) -> BreakEvenTable:
    sparse = (
        SparseTime(kernel="reference", rule="topk", sparsity=0.0, latency_ms=1.0 + at),
        SparseTime(kernel="reference", rule="topk", sparsity=1.0, latency_ms=at),
    )
    shape = ShapeTimes(
        batch=1, heads=3, tokens=800, head_dim=64, dtype="float32", dense_ms={"sdpa": 1.0}, sparse=sparse
    )
    return BreakEvenTable(device=device_name(CPU), versions={}, shapes=(shape,))


@pytest.mark.slow
def test_layers_that_would_not_gain_run_dense_and_are_counted(demo: LoadedModel, tmp_path: Path) -> None:
    layers = [(layer.name, layer.num_heads) for layer in attention_sites(demo.pipe).layers]
    policy = Policy.uniform(layers, HeadThresholds(-1.0, topk=0.5))
    save_table(break_even(0.9), tmp_path / "table.json")
    renderer = Renderer(demo, SMALL)
    with sparsify(demo.pipe, policy, "reference", tmp_path / "table.json") as handle:
        renderer.render(PROMPT, 0)
        stats = handle.stats()
    # All run sparse at the first of four steps, and have skipped less than 90 % there.
    assert stats.num_calls == {"sparse": 8, "dense": 0, "fallback": 24}
    assert stats.fallbacks == {"sparse is slower under a sparsity of 90% here": 24}
    with sparsify(demo.pipe, policy, "reference", break_even(0.1)) as handle:
        renderer.render(PROMPT, 0)
        assert handle.stats().num_calls == {"sparse": 32, "dense": 0, "fallback": 0}


def test_another_machine_s_table_is_refused(demo: LoadedModel, tmp_path: Path) -> None:
    save_table(break_even(0.5).model_copy(update={"device": "NVIDIA H100"}), tmp_path / "table.json")
    policy = Policy.uniform([(layer.name, layer.num_heads) for layer in attention_sites(demo.pipe).layers])
    with pytest.raises(BackendError, match="not on this machine's"):
        sparsify(demo.pipe, policy, "reference", tmp_path / "table.json")
