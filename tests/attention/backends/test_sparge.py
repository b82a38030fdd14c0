"""The adapter over spas_sage_attn, held against the package's contract without a GPU."""

import inspect
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sparsetune.attention.backends import choose_backend
from sparsetune.attention.backends.sparge import SpargeBackend
from sparsetune.attention.blockmap import SPARGE_BLOCKS, SPARGE_BLOCKS_SM90, block_map
from sparsetune.attention.thresholds import HeadThresholds, LayerThresholds
from sparsetune.errors import BackendError
from tests.attention.conftest import structured

MEANSIM, TOPK, MAP = "spas_sage2_attn_meansim_cuda", "spas_sage2_attn_meansim_topk_cuda", "block_sparse_sage2_attn_cuda"
COMMON = (
    "q, k, v, {} dropout_p=0.0, {} scale=None, smooth_k=True, {} pvthreshd=50, attention_sink=False, "
    "tensor_layout='HND', output_dtype=None, return_sparsity=False"
)
SIGNATURES = {
    MEANSIM: COMMON.format("attn_mask=None,", "is_causal=False,", "simthreshd1=0.6, cdfthreshd=0.98,"),
    TOPK: COMMON.format("attn_mask=None,", "is_causal=False,", "simthreshd1=-0.1, cdfthreshd=None, topk=0.5,"),
    MAP: COMMON.format("mask_id=None,", "", ""),
}


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict]]:
    """A package with SpargeAttn's signatures (its commit bfd980b) that records its calls."""
    calls: dict[str, list[dict]] = {name: [] for name in SIGNATURES}
    module = ModuleType("spas_sage_attn")
    module.__spec__ = ModuleSpec("spas_sage_attn", None)
    for name, parameters in SIGNATURES.items():
        signature = inspect.signature(eval(f"lambda {parameters}: None"))

        def kernel(*args, _name=name, _signature=signature, **kwargs):
            bound = _signature.bind(*args, **kwargs)
            calls[_name].append(dict(bound.arguments))
            output = torch.zeros_like(bound.arguments["q"])
            return (output, 0.25) if bound.arguments.get("return_sparsity") else output

        setattr(module, name, kernel)
    monkeypatch.setitem(sys.modules, "spas_sage_attn", module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return calls


def attend(backend: SpargeBackend, head: HeadThresholds, keep: range):
    q, k, v = (x.to(torch.bfloat16) for x in structured(heads=2, tokens=1000))
    layer = LayerThresholds("layer", (head, head)).tensors(torch.device("cpu"))
    return (q, k, v, layer), backend.attend(q, k, v, layer, scale=0.125, keep=keep)


@pytest.mark.parametrize(("keep", "sink"), [(range(0), False), (range(0, 1), True)])
def test_the_cdf_rule_is_sparges_meansim_call(package: dict, keep: range, sink: bool) -> None:
    (_, _, _, layer), attended = attend(SpargeBackend(torch.device("cuda")), HeadThresholds(0.1, cdfthreshd=0.9), keep)
    (call,) = package[MEANSIM]
    assert call["simthreshd1"] is layer.simthreshd1
    assert call["cdfthreshd"] is layer.select
    assert call["pvthreshd"] is layer.pvthreshd
    assert call["attention_sink"] is sink
    assert call["scale"] == 0.125
    assert attended.output.dtype == torch.bfloat16
    assert attended.computed.item() == round(0.75 * 2 * 2 * 16 * 8)


def test_the_topk_rule_is_sparges_topk_call(package: dict) -> None:
    (_, _, _, layer), _ = attend(SpargeBackend(torch.device("cuda")), HeadThresholds(-0.1, topk=0.4), range(0, 1))
    assert package[TOPK][0]["topk"] is layer.select
    assert "cdfthreshd" not in package[TOPK][0]


def test_other_kept_blocks_run_under_our_own_map(package: dict) -> None:
    backend = SpargeBackend(torch.device("cuda"))
    (q, k, _, layer), attended = attend(backend, HeadThresholds(-1.0, cdfthreshd=0.5), range(0, 3))
    (call,) = package[MAP]
    wanted = block_map(q, k, layer, SPARGE_BLOCKS_SM90, range(0, 3))
    assert torch.equal(call["mask_id"], wanted)
    assert attended.computed.tolist() == wanted.sum(dim=(0, 2, 3)).tolist()


@pytest.mark.parametrize(("capability", "blocks"), [((9, 0), SPARGE_BLOCKS_SM90), ((8, 9), SPARGE_BLOCKS)])
def test_hopper_has_its_own_block_shape(package: dict, monkeypatch: pytest.MonkeyPatch, capability, blocks) -> None:
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
def test_what_the_kernels_cant_do_is_refused(package: dict, tokens: int, dim: int, dtype, reason: str | None) -> None:
    q, k, v = (x.to(dtype) for x in structured(heads=1, tokens=tokens, dim=dim))
    assert SpargeBackend(torch.device("cuda")).refusal(q, k, v) == reason


def test_auto_takes_the_kernels_where_they_load(package: dict) -> None:
    assert choose_backend("auto", torch.device("cuda")).name == "sparge"


def test_a_package_that_cant_be_imported_is_said_and_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "spas_sage_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    assert choose_backend("auto", torch.device("cuda")).name == "reference"
    assert "spas_sage_attn can't be imported (undefined symbol: _ZN3c10)" in caplog.text
    with pytest.raises(BackendError, match="can't be imported"):
        choose_backend("sparge", torch.device("cuda"))


def test_a_missing_package_or_gpu_is_said() -> None:
    with pytest.raises(
        BackendError, match="backend sparge must have spas_sage_attn and a CUDA GPU, but the model is on cpu"
    ):
        choose_backend("sparge", torch.device("cpu"))
    assert choose_backend("auto", torch.device("cpu")).name == "reference"
    with pytest.raises(BackendError, match="backend must be one of"):
        choose_backend("magic", torch.device("cpu"))
