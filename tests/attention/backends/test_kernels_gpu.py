"""The real kernels against the reference with the same map; docs/benchmarks.md has the results on an H100."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetune.attention.backends import (
    BACKENDS,
    Backend,
    FlexBackend,
    ReferenceBackend,
    SpargeBackend,
    backend_choice,
    missing_backends,
)
from sparsetune.attention.backends.flex import flex_under_map
from sparsetune.attention.backends.reference import masked_attention
from sparsetune.attention.backends.sparge import sparge_under_map
from sparsetune.attention.blockmap import SPARGE_BLOCKS, SPARGE_BLOCKS_SM90, BlockShape, block_map
from sparsetune.attention.ordering import TokenLayout
from sparsetune.attention.thresholds import PVTHRESHD_OFF, HeadThresholds, LayerThresholds, ThresholdTensors
from sparsetune.bench.latency import video_like

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
LAYOUTS = {
    "whole blocks": TokenLayout((4, 16, 14), range(128)),  # 1024
    "partial blocks": TokenLayout((5, 17, 15), range(37)),  # 1312
    "no text": TokenLayout((7, 13, 11), range(0)),  # 1001
    "long": TokenLayout((13, 30, 45), range(226)),  # 17776
}
HEADS = {
    "cdf": HeadThresholds(-1.0, cdfthreshd=0.9),
    "cdf, similar": HeadThresholds(0.3, cdfthreshd=0.8),
    "topk": HeadThresholds(-1.0, topk=0.3),
}
EVERYTHING = HeadThresholds(1.0, cdfthreshd=1.0)


@pytest.fixture(scope="module")
def sparge() -> Backend:
    pytest.importorskip("spas_sage_attn", reason="SpargeAttn's package isn't installed")
    return SpargeBackend(CUDA)


@functools.cache
def drawn(layout: str, heads: int, batch: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = video_like(LAYOUTS[layout], heads=heads, head_dim=dim, batch=batch, seed=len(layout))
    return q.to(CUDA, dtype), k.to(CUDA, dtype), v.to(CUDA, dtype)


def thresholds(heads: int, head: HeadThresholds, *, select_partial: bool = False) -> ThresholdTensors:
    return LayerThresholds.uniform("layer", heads, head).tensors(CUDA, select_partial=select_partial)


def exact(q: Tensor, k: Tensor, v: Tensor, used: Tensor, blocks: BlockShape) -> Tensor:
    """The reference with a block map, in float32."""
    return masked_attention(q.float(), k.float(), v.float(), used, blocks, q.shape[-1] ** -0.5)


def l1(found: Tensor, wanted: Tensor) -> Tensor:
    """Relative L1 error of each head."""
    return (found.float() - wanted.float()).abs().sum((0, 2, 3)) / wanted.float().abs().sum((0, 2, 3))


def floor(backend: Backend, q: Tensor, k: Tensor, v: Tensor) -> float:
    """The kernel's rounding error at sparsity 0: the largest over the heads of the mean over queries."""
    scale = q.shape[-1] ** -0.5
    attended = backend.attend(q, k, v, thresholds(q.shape[1], EVERYTHING), scale=scale, keep=range(0))
    return float(l1(attended.output, F.scaled_dot_product_attention(q.float(), k.float(), v.float())).max())


@pytest.mark.parametrize("select_partial", [False, True], ids=["partial computed", "partial chosen"])
@pytest.mark.parametrize("head", list(HEADS))
@pytest.mark.parametrize(
    ("layout", "heads", "batch", "dim", "dtype"),
    [
        ("whole blocks", 3, 2, 64, torch.bfloat16),
        ("partial blocks", 3, 2, 64, torch.bfloat16),
        ("partial blocks", 3, 2, 64, torch.float16),
        ("partial blocks", 1, 1, 128, torch.bfloat16),
        ("no text", 4, 2, 64, torch.float32),
        ("long", 2, 2, 64, torch.bfloat16),
    ],
)
def test_sparge_is_the_reference_within_its_rounding(
    sparge: Backend, layout: str, heads: int, batch: int, dim: int, dtype: torch.dtype, head: str, select_partial: bool
) -> None:
    q, k, v = drawn(layout, heads, batch, dim, dtype)
    keep, scale = range(1), dim**-0.5
    given = thresholds(heads, HEADS[head], select_partial=select_partial)
    attended = sparge.attend(q, k, v, given, scale=scale, keep=keep)
    reference = ReferenceBackend(sparge.blocks).attend(q, k, v, given, scale=scale, keep=keep)
    assert torch.equal(attended.computed, reference.computed)
    assert (attended.output.dtype, attended.output.shape) == (dtype, q.shape)
    used = block_map(q, k, given, sparge.blocks, keep)
    assert float(l1(attended.output, exact(q, k, v, used, sparge.blocks)).max()) <= 1.5 * floor(sparge, q, k, v)


@pytest.mark.parametrize("name", ["sparge", "flex 128x64", "flex 128x128", "flex 64x128"])
def test_maps_without_the_partial_last_block(request: pytest.FixtureRequest, name: str) -> None:
    q, k, v = drawn("partial blocks", 3, 2, 64, torch.bfloat16)
    if name == "sparge":
        blocks, bound = (
            request.getfixturevalue("sparge").blocks,
            1.5 * floor(request.getfixturevalue("sparge"), q, k, v),
        )
    else:
        blocks, bound = BlockShape(*(int(side) for side in name.split()[1].split("x"))), 0.003
    num_q, num_k = blocks.counts(q.shape[-2], k.shape[-2])
    used = torch.rand(2, 3, num_q, num_k, device=CUDA, generator=torch.Generator(CUDA).manual_seed(0)) < 0.4
    used[..., 0] = True
    used[..., ::2, -1] = False  # every other row leaves the partial key block out
    used[..., -1, :] = False  # the partial query block sees one whole key block,
    used[:, :2, -1, 3] = True
    used[:, 2, -1, -1] = True  # or the partial one alone
    if name == "sparge":
        found = sparge_under_map(q, k, v, used, torch.full((3,), PVTHRESHD_OFF, device=CUDA), 0.125)
    else:
        found = flex_under_map(q, k, v, used, blocks, 0.125)
    wanted = exact(q, k, v, used, blocks)
    assert float(l1(found, wanted).max()) <= bound
    tail = (num_q - 1) * blocks.q
    assert float(l1(found[..., tail:, :], wanted[..., tail:, :]).max()) <= 3 * bound


@pytest.mark.parametrize("layout", ["partial blocks", "long"])
@pytest.mark.parametrize("head", list(HEADS))
def test_sparge_is_spargeattns_own_call(sparge: Backend, layout: str, head: str) -> None:
    import spas_sage_attn

    q, k, v = drawn(layout, 3 if layout == "partial blocks" else 2, 2, 64, torch.bfloat16)
    given = thresholds(q.shape[1], HEADS[head])
    shared = {
        "simthreshd1": given.simthreshd1,
        "pvthreshd": given.pvthreshd,
        "attention_sink": True,
        "is_causal": False,
    }
    if given.rule == "cdf":
        call = functools.partial(spas_sage_attn.spas_sage2_attn_meansim_cuda, cdfthreshd=given.select)
    else:
        call = functools.partial(spas_sage_attn.spas_sage2_attn_meansim_topk_cuda, topk=given.select)
    theirs, sparsity = call(q, k, v, return_sparsity=True, **shared)
    ours = sparge.attend(q, k, v, given, scale=0.125, keep=range(1))
    num_q, num_k = sparge.blocks.counts(q.shape[-2], k.shape[-2])
    assert 1.0 - ours.computed.sum().item() / (q.shape[0] * q.shape[1] * num_q * num_k) == pytest.approx(
        sparsity, abs=1e-5
    )
    assert torch.equal(ours.output, theirs)


def test_a_low_pvthreshd_is_at_work(sparge: Backend) -> None:
    q, k, v = drawn("partial blocks", 3, 2, 64, torch.bfloat16)
    outputs = [
        sparge.attend(q, k, v, thresholds(3, HeadThresholds(-1.0, 0.9, pvthreshd=pv)), scale=0.125, keep=range(0))
        for pv in (PVTHRESHD_OFF, 0.5)
    ]
    assert torch.equal(outputs[0].computed, outputs[1].computed)
    assert not torch.equal(outputs[0].output, outputs[1].output)


@pytest.mark.parametrize("name", ["sparge", "flex"])
def test_tensors_of_any_strides_do(request: pytest.FixtureRequest, name: str) -> None:
    backend = request.getfixturevalue("sparge") if name == "sparge" else FlexBackend()
    q, k, v = drawn("partial blocks", 3, 2, 64, torch.bfloat16)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    given = thresholds(3, HEADS["cdf"])
    one = backend.attend(q, k, v, given, scale=0.125, keep=range(1))
    other = backend.attend(*strided, given, scale=0.125, keep=range(1))
    assert torch.equal(one.computed, other.computed)
    assert float(l1(other.output, one.output).max()) < 1e-3


@pytest.mark.parametrize("blocks", [SPARGE_BLOCKS, SPARGE_BLOCKS_SM90, BlockShape(128, 128)], ids=str)
@pytest.mark.parametrize("select_partial", [False, True], ids=["partial computed", "partial chosen"])
def test_flex_is_the_reference_within_bfloat16(blocks: BlockShape, select_partial: bool) -> None:
    q, k, v = drawn("partial blocks", 3, 2, 64, torch.bfloat16)
    given = thresholds(3, HEADS["cdf"], select_partial=select_partial)
    attended = FlexBackend(blocks).attend(q, k, v, given, scale=0.125, keep=range(1))
    reference = ReferenceBackend(blocks).attend(q, k, v, given, scale=0.125, keep=range(1))
    assert torch.equal(attended.computed, reference.computed)
    used = block_map(q, k, given, blocks, range(1))
    rounding = l1(F.scaled_dot_product_attention(q, k, v), exact(q, k, v, torch.ones_like(used), blocks)).max()
    assert float(l1(attended.output, exact(q, k, v, used, blocks)).max()) <= 1.5 * float(rounding)


@pytest.mark.parametrize("name", ["sparge", "flex"])
def test_a_compiled_function_keeps_one_graph(request: pytest.FixtureRequest, name: str) -> None:
    if name == "sparge":
        request.getfixturevalue("sparge")
    backend = backend_choice(name, CUDA).backend
    q, k, v = drawn("partial blocks", 3, 2, 64, torch.bfloat16)
    given = thresholds(3, HEADS["cdf"])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return backend.attend(q, k, v * 2, given, scale=0.125, keep=range(1)).output + 1

    compiled = torch.compile(attend, fullgraph=True, dynamic=False)(q, k, v)
    assert float(l1(compiled, attend(q, k, v)).max()) < 5e-3


@pytest.mark.parametrize("name", ["sparge", "flex"])
def test_a_compiled_transformer_keeps_one_graph(request: pytest.FixtureRequest, name: str) -> None:
    from sparsetune.attention.handle import SparseHandle
    from sparsetune.attention.policy import Policy
    from sparsetune.bench.step import capture_step
    from sparsetune.config import GenerationConfig, ModelConfig
    from sparsetune.models.generation import Renderer
    from sparsetune.models.loading import load_pipeline

    if name == "sparge":
        request.getfixturevalue("sparge")
    model = ModelConfig(name="tiny", source="cogvideox-2b", random_weights="tiny", device="cuda")
    loaded = load_pipeline(model)
    settings = GenerationConfig(num_frames=9, height=256, width=256)
    step = capture_step(Renderer(loaded, settings), "a red ball")
    layers = [(layer.name, layer.num_heads) for layer in step.sites.layers]
    policy = Policy.uniform(layers, HeadThresholds(-1.0, topk=0.5))
    module, args, kwargs = step.calls[0]
    with SparseHandle(step.sites, policy, backend_choice(name, CUDA).backend) as handle, torch.inference_mode():
        plain = module(*args, **kwargs)[0]
        compiled = torch.compile(module, fullgraph=True, dynamic=False)(*args, **kwargs)[0]
        stats = handle.stats()
    assert stats.num_calls == {"sparse": 2 * len(layers), "dense": 0, "fallback": 0}
    assert stats.sparsity > 0.2
    assert float((compiled.float() - plain.float()).norm() / plain.float().norm()) < 0.02


def test_auto_takes_the_fastest_that_runs(sparge: Backend) -> None:
    assert backend_choice("auto", CUDA).backend.name == "sparge"
    assert set(missing_backends(CUDA)) == set(BACKENDS) - {"auto"}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_each_tensor_runs_on_its_own_gpu(sparge: Backend) -> None:
    q, k, v = drawn("partial blocks", 3, 2, 64, torch.bfloat16)
    given = thresholds(3, HEADS["cdf"])
    one = sparge.attend(q, k, v, given, scale=0.125, keep=range(1))
    second = torch.device("cuda:1")
    moved = LayerThresholds.uniform("layer", 3, HEADS["cdf"]).tensors(second)
    there = [x.to(second) for x in (q, k, v)]
    other = SpargeBackend(second).attend(*there, moved, scale=0.125, keep=range(1))
    assert other.output.device == second
    assert torch.cuda.current_device() == 0
    assert torch.equal(other.output.cpu(), one.output.cpu())
