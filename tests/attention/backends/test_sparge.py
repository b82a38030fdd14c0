"""The adapter for spas_sage_attn, tested against the package's signature without a GPU."""

import inspect
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sparsetune.attention.backends.sparge import SpargeBackend, sparge_under_map
from sparsetune.attention.blockmap import SPARGE_BLOCKS, SPARGE_BLOCKS_SM90, block_map
from sparsetune.attention.thresholds import HeadThresholds, LayerThresholds
from tests.attention.conftest import structured

SIGNATURE = (
    "q, k, v, mask_id=None, dropout_p=0.0, scale=None, smooth_k=True, pvthreshd=50, attention_sink=False, "
    "tensor_layout='HND', output_dtype=torch.float16, return_sparsity=False"
)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """A package with SpargeAttn's signature (its commit bfd980b) that records its calls, and returns zeros."""
    calls: list[dict] = []
    module = ModuleType("spas_sage_attn")
    module.__spec__ = ModuleSpec("spas_sage_attn", None)
    signature = inspect.signature(eval(f"lambda {SIGNATURE}: None"))

    def kernel(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        calls.append(dict(bound.arguments))
        half = torch.bfloat16 if bound.arguments["q"].dtype == torch.bfloat16 else torch.float16
        return torch.zeros_like(bound.arguments["q"], dtype=half)  # what the kernel gives for float32 is float16

    module.block_sparse_sage2_attn_cuda = kernel
    monkeypatch.setitem(sys.modules, "spas_sage_attn", module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return calls


def attend(head: HeadThresholds, keep: range, dtype: torch.dtype = torch.bfloat16, select_partial: bool = False):
    q, k, v = (x.to(dtype) for x in structured(heads=2, tokens=1000))
    layer = LayerThresholds("layer", (head, head)).tensors(torch.device("cpu"), select_partial=select_partial)
    return (q, k, v, layer), SpargeBackend(torch.device("cuda")).attend(q, k, v, layer, scale=0.125, keep=keep)


@pytest.mark.parametrize("head", [HeadThresholds(0.1, cdfthreshd=0.9), HeadThresholds(-0.1, topk=0.4)], ids=str)
@pytest.mark.parametrize("keep", [range(0), range(1), range(3)])
@pytest.mark.parametrize("select_partial", [False, True])
def test_the_kernel_runs_our_map(package: list, head: HeadThresholds, keep: range, select_partial: bool) -> None:
    (q, k, v, layer), attended = attend(head, keep, select_partial=select_partial)
    (call,) = package
    wanted = block_map(q, k, layer, SPARGE_BLOCKS_SM90, keep)
    assert torch.equal(call["mask_id"], wanted)
    assert torch.equal(call["pvthreshd"], layer.pvthreshd)
    assert (call["scale"], call["tensor_layout"]) == (0.125, "HND")
    assert all(torch.equal(call[name], x) for name, x in zip("qkv", (q, k, v), strict=True))
    assert not {"attention_sink", "return_sparsity"} & set(call)  # the sink is in the map; a sparsity would wait
    assert attended.computed.tolist() == wanted.sum(dim=(0, 2, 3)).tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gradients", [False, True])
def test_the_output_has_the_inputs_dtype_and_shape(package: list, dtype: torch.dtype, gradients: bool) -> None:
    with torch.set_grad_enabled(gradients):
        (q, *_), attended = attend(HeadThresholds(0.1, cdfthreshd=0.9), range(1), dtype)
    assert (attended.output.dtype, attended.output.shape) == (dtype, q.shape)


def test_a_compiled_function_holds_the_kernel_as_one_operator(package: list) -> None:
    q, k, v = (x.to(torch.bfloat16) for x in structured(heads=2, tokens=256))
    used = torch.ones(2, 2, 4, 2, dtype=torch.bool)
    off = torch.full((2,), 50.0)

    def attend(q, k, v):
        return sparge_under_map(q, k, v, used, off, 0.125) + 1

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)(q, k, v)
    assert torch.equal(compiled, torch.ones_like(q))
    assert len(package) == 1


def test_the_operator_keeps_its_contract(package: list) -> None:
    q, k, v = (x.to(torch.float16) for x in structured(heads=1, tokens=256, batch=1))
    used = torch.ones(1, 1, 4, 2, dtype=torch.bool)
    torch.library.opcheck(
        sparge_under_map, (q.transpose(1, 2).contiguous().transpose(1, 2), k, v, used, torch.ones(1), 0.1)
    )


@pytest.mark.parametrize(("capability", "blocks"), [((9, 0), SPARGE_BLOCKS_SM90), ((8, 9), SPARGE_BLOCKS)])
def test_hopper_has_its_own_block_shape(package: list, monkeypatch: pytest.MonkeyPatch, capability, blocks) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert SpargeBackend(torch.device("cuda")).blocks == blocks


@pytest.mark.parametrize(
    ("tokens", "dim", "dtype", "reason"),
    [
        (1000, 96, torch.bfloat16, "head_dim 96 isn't 64 or 128"),
        (1000, 64, torch.float64, "dtype torch.float64 isn't float16, bfloat16 or float32"),
        (1000, 64, torch.float32, None),
        (127, 64, torch.float16, "fewer than 128 tokens"),
        (1000, 64, torch.float16, None),
    ],
)
def test_what_the_kernels_cant_do_is_refused(package: list, tokens: int, dim: int, dtype, reason: str | None) -> None:
    q, k, v = (x.to(dtype) for x in structured(heads=1, tokens=tokens, dim=dim))
    assert SpargeBackend(torch.device("cuda")).refusal(q, k, v) == reason


def test_a_package_that_cant_be_imported_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "spas_sage_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    reason = SpargeBackend.missing(torch.device("cuda"))
    assert reason == "spas_sage_attn can't be imported (undefined symbol: _ZN3c10)"
