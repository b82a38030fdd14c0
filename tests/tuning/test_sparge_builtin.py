"""SpargeAttn's own search in our interception, with a stand-in for its package."""

import ast
import contextlib
import copy
import functools
import importlib.util
import io
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from sparsetune.attention.interception import AttentionCall
from sparsetune.attention.policy import Policy
from sparsetune.attention.schedule import DenseSchedule
from sparsetune.checkpoint import load_checkpoint
from sparsetune.config import Config
from sparsetune.errors import TuningError
from sparsetune.evaluation.baseline import BaselineCache
from sparsetune.evaluation.conditions import baseline_key
from sparsetune.executor import LocalExecutor, ModelSession, StepDone
from sparsetune.metrics import Gate
from sparsetune.models.generation import Renderer
from sparsetune.models.loading import LoadedModel, load_pipeline
from sparsetune.models.pipelines import demo_config
from sparsetune.models.runtime import describe
from sparsetune.tuning import sparge_builtin as builtin
from sparsetune.tuning.context import TuningContext
from sparsetune.tuning.events import TuningListener
from sparsetune.tuning.sparge_builtin import CONTRACT, KeepingPool, check_builtin, checkpoint_file, run_builtin
from tests.tuning import sparge_package

SMALL = {"generation.num_frames": 9, "generation.num_inference_steps": 2, "model.device": "cpu", "tune.num_prompts": 2}


class Steps(TuningListener):
    def __init__(self) -> None:
        self.reported: list[StepDone] = []

    def on_step(self, event: StepDone) -> None:
        self.reported.append(event)


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_pipeline(demo_config(SMALL).model)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return sparge_package.install(monkeypatch)


MakeContext = Callable[..., TuningContext]


@pytest.fixture
def make_context(demo: LoadedModel, tmp_path: Path) -> MakeContext:
    return context_maker(demo, tmp_path)


def context_maker(demo: LoadedModel, folder: Path) -> MakeContext:
    def make(*listeners: TuningListener, **overrides: object) -> TuningContext:
        config: Config = demo_config(SMALL | {key.replace("__", "."): value for key, value in overrides.items()})
        renderer = Renderer(demo, config.generation)
        return TuningContext(
            config=config,
            executor=LocalExecutor(ModelSession(renderer)),
            runtime=describe(renderer, "reference"),
            prompts=("a red ball", "a blue box")[: config.tune.num_prompts],
            eval_prompts=("a green cone",),
            cache=BaselineCache(folder / "cache", 1.0),
            gate=Gate(),
            listeners=listeners,
            output_dir=folder / "results",
            started=time.perf_counter(),
        )

    return make


@dataclass(frozen=True)
class Searched:
    context: TuningContext
    policy: Policy
    steps: list[StepDone]
    printed: str
    made: tuple[sparge_package.SparseAttentionMeansim, ...]


@pytest.fixture(scope="module")
def searched(demo: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """A sequential search over two prompts, by a user who has set SpargeAttn's variable."""
    steps, printed = Steps(), io.StringIO()
    context = context_maker(demo, tmp_path_factory.mktemp("builtin"))(steps)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("PARALLEL_TUNE", "mine")
        made = watch(patch, sparge_package.install(patch))
        policy = run_builtin(context)
        assert os.environ["PARALLEL_TUNE"] == "mine"
    return Searched(context, policy, steps.reported, printed.getvalue(), tuple(made))


def watch(patch: pytest.MonkeyPatch, package: ModuleType) -> list[sparge_package.SparseAttentionMeansim]:
    """Collect the modules that are created."""
    made, begin = [], package.SparseAttentionMeansim.__init__

    @functools.wraps(begin)
    def collected(self: sparge_package.SparseAttentionMeansim, *args: object, **kwargs: object) -> None:
        begin(self, *args, **kwargs)
        made.append(self)

    patch.setattr(package.SparseAttentionMeansim, "__init__", collected)
    return made


def test_the_search_ends_in_a_policy_and_its_own_file(searched: Searched) -> None:
    path = searched.context.output_dir / "demo_0.06_0.065.pt"
    assert path == checkpoint_file(searched.context)
    assert load_checkpoint(path).policy == searched.policy
    assert (searched.policy.order, searched.policy.keep_text) == ("raster", False)
    assert searched.policy.schedule == DenseSchedule()
    assert len(searched.policy.layers) == len(searched.context.renderer.loaded.identity.layers)
    for layer in searched.policy.layers:
        assert [head.is_sparse for head in layer.heads] == [True, False, True]
        assert [head.simthreshd1 for head in layer.heads] == [-0.5, 1.0, -0.375]
        assert 0.1 < layer.heads[0].cdfthreshd < 1.0 and layer.heads[1].cdfthreshd == 1.0


def test_every_call_of_every_layer_was_searched(searched: Searched) -> None:
    assert searched.steps == [
        StepDone("calibration", "dense", step, 2, prompt, 2) for prompt in (0, 1) for step in (1, 2)
    ]
    assert {(module.l1, module.pv_l1) for module in searched.made} == {(0.06, 0.065)}
    assert {module.num_data_passed for module in searched.made} == {4}
    assert not any(any(module.parallel) for module in searched.made)


def test_the_videos_are_dense_and_kept(searched: Searched) -> None:
    context = searched.context
    dense = context.renderer.render("a blue box", context.config.tune.seed)
    kept = context.cache.get(baseline_key(context.renderer, "a blue box", context.config.tune.seed))
    assert kept is not None
    assert np.array_equal(kept.frames, dense.frames)


def test_nothing_stays_behind(searched: Searched, demo: LoadedModel) -> None:
    assert not any("inner_attention" in name for name, _ in demo.pipe.transformer.named_modules())
    assert not any("forward" in vars(module) for module in demo.pipe.transformer.modules())
    assert searched.printed == ""


def test_the_file_loads_in_spargeattns_own_loader(searched: Searched) -> None:
    keys = torch.load(checkpoint_file(searched.context), weights_only=True)
    assert list(keys)[:5] == [f"transformer_blocks.0.attn1.inner_attention.{column}" for column in builtin.COLUMNS]
    model = copy.deepcopy(searched.context.renderer.loaded.pipe.transformer)
    for block in model.transformer_blocks:
        block.attn1.inner_attention = sparge_package.SparseAttentionMeansim()
    sparge_package.load_sparse_attention_state_dict(model, keys)
    for block, layer in zip(model.transformer_blocks, searched.policy.layers, strict=True):
        held = block.attn1.inner_attention
        for name in ("is_sparse", "simthreshd1", "cdfthreshd", "pvthreshd"):
            expected = torch.tensor([getattr(head, name) for head in layer.heads], dtype=torch.float32)
            assert torch.equal(getattr(held, name), expected)


def test_all_gpus_are_used_where_that_is_asked_and_their_processes_end(
    package: ModuleType, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch, searched: Searched
) -> None:
    monkeypatch.delenv("PARALLEL_TUNE", raising=False)
    made, before = watch(monkeypatch, package), package.executor
    policy = run_builtin(make_context(tune__parallel_tune=True))
    assert {used for module in made for used in module.parallel} == {True}
    assert "PARALLEL_TUNE" not in os.environ
    assert (before.open, package.executor.open) == (False, True)
    assert policy == searched.policy


def test_spargeattns_own_processes_forget_all_calls_but_the_last(package: ModuleType, monkeypatch) -> None:
    """Why heads use our own pool."""
    monkeypatch.setenv("PARALLEL_TUNE", "1")
    inputs = [torch.full((1, 1, 4, 2), 0.5).cumsum(2) * scale for scale in (3.0, 1.0)]
    found = {}
    for name, executor in (("its own", package.executor), ("ours", KeepingPool(package.executor))):
        monkeypatch.setattr(package, "executor", executor)
        module = package.SparseAttentionMeansim(l1=0.06, pv_l1=0.065)
        for x in inputs:
            module(x, x, x, tune_mode=True)
        found[name] = module.pvthreshd.item() - 10
    spreads = [x.std().item() for x in inputs]
    assert found == pytest.approx({"its own": spreads[1], "ours": max(spreads)})
    assert module.hyperparams_cache == {0: pytest.approx(spreads[::-1])}


@pytest.mark.parametrize(
    ("capabilities", "visible", "message"),
    [
        ([(9, 0)], "3", r"this host has 1 \(CUDA_VISIBLE_DEVICES is '3'\); run without it"),
        ([(9, 0)], None, "this host has 1; run without it"),
        ([(9, 0), (8, 0)], None, "GPUs of one kind, .* but this host has GPU with 8.0 and GPU with 9.0; select one"),
    ],
)
def test_gpus_that_heads_cant_be_shared_among_are_said_at_the_start(
    package: ModuleType, monkeypatch: pytest.MonkeyPatch, capabilities, visible: str | None, message: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capabilities[device or 0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU with {}.{}".format(*capabilities[device]))
    check_builtin()
    with pytest.raises(TuningError, match=message):
        check_builtin(parallel=True)


def test_when_time_is_over_every_layer_still_has_thresholds(package: ModuleType, make_context: MakeContext) -> None:
    steps = Steps()
    context = make_context(steps, tune__max_minutes=1.0, generation__num_inference_steps=1)
    policy = run_builtin(replace(context, started=time.perf_counter() - 61.0))
    assert len(policy.layers) == 8
    assert {event.index for event in steps.reported} == {0}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (lambda call: replace(call, scale=0.2), r"its softmax scale 0.2 isn't head_dim\^-0.5"),
        (lambda call: replace(call, is_causal=True), "the call is causal"),
        (
            lambda call: replace(call, q=call.q.double(), k=call.k.double(), v=call.v.double()),
            "dtype torch.float64 isn't float16",
        ),
    ],
)
def test_a_layer_that_it_cant_search_is_said_after_the_first_step(
    package: ModuleType, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch, changed, reason: str
) -> None:
    attend = builtin._Search.attend

    def altered(self: builtin._Search, call: AttentionCall) -> torch.Tensor:
        if call.layer.name.endswith("blocks.3.attn1"):
            attend(self, changed(call))
            return call.original()
        return attend(self, call)

    monkeypatch.setattr(builtin._Search, "attend", altered)
    steps = Steps()
    with pytest.raises(TuningError, match=rf"attention layer transformer.transformer_blocks.3.attn1: {reason}"):
        run_builtin(make_context(steps))
    assert steps.reported == []


@pytest.mark.parametrize(
    ("is_there", "has_gpu", "reason"),
    [
        (False, False, "spas_sage_attn is not installed and there is no CUDA GPU"),
        (False, True, "spas_sage_attn is not installed"),
        (True, False, "there is no CUDA GPU"),
    ],
)
def test_what_is_missing_is_said_in_one_line(
    package: ModuleType, monkeypatch: pytest.MonkeyPatch, is_there: bool, has_gpu: bool, reason: str
) -> None:
    if not is_there:
        monkeypatch.delitem(sys.modules, "spas_sage_attn")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    with pytest.raises(TuningError) as raised:
        check_builtin()
    assert str(raised.value) == (
        f"--tuner builtin needs SpargeAttn's package and a CUDA GPU, but {reason}; "
        "use --tuner calibrate, which needs neither"
    )


def test_a_model_on_the_cpu_is_refused(package: ModuleType, make_context: MakeContext, monkeypatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(TuningError, match="but the model is on cpu; use --tuner calibrate"):
        run_builtin(make_context())


def test_a_tuner_that_cant_be_imported_leaves_logging_alone(
    tmp_path: Path, package: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("spas_sage_attn", "spas_sage_attn.autotune"):
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "spas_sage_attn").mkdir()
    (tmp_path / "spas_sage_attn" / "__init__.py").write_text("")
    (tmp_path / "spas_sage_attn" / "autotune.py").write_text(
        "import logging\nlogging.getLogger().addHandler(logging.NullHandler())\nfrom tools.gpu_process import nothing\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    before = list(logging.getLogger().handlers)
    with pytest.raises(TuningError, match=r"spas_sage_attn.autotune can't be imported \(No module named 'tools"):
        check_builtin()
    assert logging.getLogger().handlers == before
    sys.modules.pop("spas_sage_attn", None)


@pytest.mark.parametrize("regular", [True, False], ids=["a package", "a folder"])
def test_a_checkouts_own_tools_hide_none_of_spargeattns(tmp_path: Path, regular: bool) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "gpu_process.py").write_text("found = True")
    if regular:
        (tmp_path / "tools" / "__init__.py").write_text("")
    root = Path(__file__).parents[2]
    assert (root / "tools").is_dir()
    script = "from tools.gpu_process import found\nprint(found)"
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{tmp_path}"}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == "True", ran.stderr


def test_an_upstream_change_is_named(package: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package.SparseAttentionMeansim, "forward", lambda self, q, k, v: None)
    monkeypatch.delattr(package, "extract_sparse_attention_state_dict")
    changed = "its SparseAttentionMeansim.forward, extract_sparse_attention_state_dict isn't as in SpargeAttn's commit"
    with pytest.raises(TuningError, match=changed):
        check_builtin()


def test_the_signatures_are_those_recorded() -> None:
    found = {name: signature for file in sources() for name, signature in signatures(file).items()}
    assert {name: found.get(name) for name in sparge_package.RECORDED} == sparge_package.RECORDED


def test_what_is_used_is_part_of_what_is_recorded() -> None:
    recorded = {name.removesuffix(".__init__"): text for name, text in sparge_package.RECORDED.items()}
    for name, given in CONTRACT.items():
        if not name.startswith("executor."):  # Python's own methods
            assert set(given) <= {part.partition("=")[0] for part in recorded[name].split(", ")}


def sources() -> list[Path]:
    """SpargeAttn's files if it is installed (only parsed, never imported), otherwise the stand-in's."""
    spec = importlib.util.find_spec("spas_sage_attn")
    if spec is None or spec.origin is None:
        return [Path(sparge_package.__file__)]
    package = Path(spec.origin).parent
    return [package / "autotune.py", package.parent / "tools" / "gpu_process.py"]


def signatures(file: Path) -> dict[str, str]:
    """The parameters of a file's functions and methods."""
    functions = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            functions[node.name] = ast.unparse(node.args)
        elif isinstance(node, ast.ClassDef):
            methods = (part for part in node.body if isinstance(part, ast.FunctionDef))
            functions |= {f"{node.name}.{method.name}": ast.unparse(method.args) for method in methods}
    return functions
