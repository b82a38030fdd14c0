"""SpargeAttn's own search, the real one, on a tiny CogVideoX with random weights."""

import inspect
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsetune.checkpoint import read_sparge_pt
from sparsetune.config import Config
from sparsetune.evaluation.baseline import BaselineCache
from sparsetune.executor import LocalExecutor, ModelSession
from sparsetune.metrics import Gate
from sparsetune.models import loading
from sparsetune.models.generation import Renderer
from sparsetune.models.random_weights import blueprint
from sparsetune.models.runtime import describe
from sparsetune.tuning.context import TuningContext
from sparsetune.tuning.sparge_builtin import COLUMNS, checkpoint_file, run_builtin
from tests.tuning.sparge_package import RECORDED

# Ignore warnings from SpargeAttn's package.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

TINY = {
    "model": {
        "name": "tiny",
        "source": "cogvideox-2b",
        "random_weights": "tiny",
        "dtype": "bfloat16",
        "device": "cuda",
    },
    # 3 latent frames of 16 x 24 tokens and 32 of text.
    "generation": {"num_frames": 9, "height": 256, "width": 384, "num_inference_steps": 2},
}


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> TuningContext:
    pytest.importorskip("spas_sage_attn", reason="SpargeAttn's package isn't installed")
    if request.param and torch.cuda.device_count() < 2:
        pytest.skip("searching in parallel needs two GPUs")
    return make_context(tmp_path, monkeypatch, parallel=request.param)


def make_context(folder: Path, monkeypatch: pytest.MonkeyPatch, parallel: bool) -> TuningContext:
    plan = blueprint("cogvideox-2b")
    transformer = plan.components["transformer"]
    wider = transformer | {"tiny": transformer["tiny"] | {"num_attention_heads": 4}}
    wider_plan = replace(plan, components=plan.components | {"transformer": wider})
    monkeypatch.setattr(loading, "blueprint", lambda name: wider_plan)
    config = Config.model_validate(TINY | {"tune": {"l1": 0.06, "pv_l1": 0.065, "parallel_tune": parallel}})
    loaded = loading.load_pipeline(config.model)
    assert [(heads, dim) for _, heads, dim in loaded.identity.layers] == [(4, 64)] * 2
    renderer = Renderer(loaded, config.generation)
    return TuningContext(
        config=config,
        executor=LocalExecutor(ModelSession(renderer)),
        runtime=describe(renderer, "sparge"),
        prompts=("a red ball",),
        eval_prompts=("a blue box",),
        cache=BaselineCache(folder / "cache", 1.0),
        gate=Gate(),
        listeners=(),
        output_dir=folder / "results",
        started=time.perf_counter(),
    )


@pytest.mark.parametrize("context", [False, True], ids=["sequential", "parallel"], indirect=True)
def test_its_file_loads_in_both_loaders_with_equal_thresholds(context: TuningContext) -> None:
    from spas_sage_attn import autotune

    policy = run_builtin(context)
    path = checkpoint_file(context)
    assert read_sparge_pt(path) == policy
    assert (policy.order, policy.keep_text) == ("raster", False)
    transformer = context.renderer.loaded.pipe.transformer
    for block in transformer.transformer_blocks:
        block.attn1.inner_attention = autotune.SparseAttentionMeansim(l1=0.06, pv_l1=0.065)
    tensors = torch.load(path, weights_only=True)
    autotune.load_sparse_attention_state_dict(transformer, tensors)
    assert len(tensors) == 2 * len(COLUMNS)
    for block, layer in zip(transformer.transformer_blocks, policy.layers, strict=True):
        held = block.attn1.inner_attention
        for name in ("is_sparse", "simthreshd1", "cdfthreshd", "pvthreshd"):
            ours = torch.tensor([float(getattr(head, name)) for head in layer.heads], device="cuda")
            # Its loader casts to the model's dtype.
            assert torch.equal(getattr(held, name).float(), ours.to(torch.bfloat16).float()), name
        searched = [head for head in layer.heads if head.is_sparse]
        assert all(-1.0 <= head.simthreshd1 < 1.0 and 0.0 < head.pvthreshd < 50.0 for head in searched)


def test_on_several_gpus_it_finds_what_it_finds_on_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("spas_sage_attn", reason="SpargeAttn's package isn't installed")
    if torch.cuda.device_count() < 2:
        pytest.skip("searching in parallel needs two GPUs")
    one = run_builtin(make_context(tmp_path / "one", monkeypatch, parallel=False))
    free_before = [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]
    several = run_builtin(make_context(tmp_path / "several", monkeypatch, parallel=True))
    for index, before in enumerate(free_before[1:], start=1):
        assert torch.cuda.mem_get_info(index)[0] >= before - 2**28, f"GPU {index} still holds a process's memory"
    # Both ways merge the second step with the first; each kernel returns the same on equal GPUs.
    assert several == one


def test_its_signatures_are_those_recorded() -> None:
    autotune = pytest.importorskip("spas_sage_attn.autotune", reason="SpargeAttn's package isn't installed")
    for name, recorded in RECORDED.items():
        found = autotune
        for part in name.split("."):
            found = getattr(found, part)
        assert list(inspect.signature(found).parameters) == [part.partition("=")[0] for part in recorded.split(", ")]
