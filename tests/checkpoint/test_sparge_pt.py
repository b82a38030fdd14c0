import io
import pickle
import subprocess
import sys
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsetune.attention.policy import Policy
from sparsetune.attention.schedule import DenseSchedule
from sparsetune.attention.thresholds import HeadThresholds, LayerThresholds
from sparsetune.checkpoint import load_checkpoint, read_sparge_pt, write_sparge_pt
from sparsetune.errors import CheckpointError

MODULE = "transformer_blocks.{}.attn1"
COLUMNS = ["is_sparse", "cdfthreshd", "simthreshd1", "simthreshd2", "pvthreshd"]


def sparge_layer(module: str, num_heads: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """What SpargeAttn saves for a layer, its second head dense."""
    random = torch.Generator().manual_seed(seed)
    is_sparse = torch.ones(num_heads, dtype=torch.bool)
    is_sparse[1] = False
    values = {
        "is_sparse": is_sparse,
        "cdfthreshd": torch.rand(num_heads, generator=random).masked_fill(~is_sparse, 1),
        "simthreshd1": (2 * torch.rand(num_heads, generator=random) - 1).masked_fill(~is_sparse, 1),
        "simthreshd2": torch.zeros(num_heads),
        "pvthreshd": 50 * torch.rand(num_heads, generator=random),
    }
    return {f"{module}.inner_attention.{name}": value for name, value in values.items()}


def saved(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def test_a_file_of_spargeattn_is_read_and_written_again_equal(tmp_path: Path) -> None:
    original = {key: value for i in range(12) for key, value in sparge_layer(MODULE.format(i), seed=i).items()}
    policy = read_sparge_pt(saved(tmp_path / "a.pt", original))
    assert [layer.name for layer in policy.layers] == [f"transformer.transformer_blocks.{i}.attn1" for i in range(12)]
    assert not policy.keep_text and policy.order == "raster" and policy.schedule.dense_fraction == 0
    write_sparge_pt(policy, tmp_path / "b.pt")
    written = torch.load(tmp_path / "b.pt", weights_only=True)
    assert list(written) == list(original)
    for key, value in original.items():
        assert written[key].dtype == value.dtype
        assert torch.equal(written[key], value)


@pytest.mark.parametrize("wrapped", ["_orig_mod.{}", "module.{}", "module._orig_mod.{}"])
def test_names_of_compiled_and_wrapped_models_are_read(tmp_path: Path, wrapped: str) -> None:
    of_compiled_blocks = MODULE.format("1._orig_mod")
    values = sparge_layer(wrapped.format(MODULE.format(0))) | sparge_layer(wrapped.format(of_compiled_blocks))
    policy = read_sparge_pt(saved(tmp_path / "a.pt", values))
    assert [layer.name for layer in policy.layers] == [f"transformer.{MODULE.format(i)}" for i in range(2)]


def test_dense_heads_are_dense_for_our_kernels(tmp_path: Path) -> None:
    layer = read_sparge_pt(saved(tmp_path / "a.pt", sparge_layer("blocks.0.self_attn"))).layers[0]
    tensors = layer.tensors(torch.device("cpu"))
    assert not layer.heads[1].is_sparse
    assert [tensors.simthreshd1[1], tensors.select[1], tensors.pvthreshd[1]] == [2, 1, 50]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_files_cast_to_the_models_dtype_are_read_rounded_to_it(tmp_path: Path, dtype: torch.dtype) -> None:
    cast = {key: value.to(dtype) for key, value in sparge_layer(MODULE.format(0)).items()}
    layer = read_sparge_pt(saved(tmp_path / "a.pt", cast)).layers[0]
    tensors = layer.tensors(torch.device("cpu"))
    assert [head.is_sparse for head in layer.heads] == [True, False, True, True]
    assert torch.equal(tensors.select, cast[f"{MODULE.format(0)}.inner_attention.cdfthreshd"].float())


def test_parameters_are_read_as_tensors(tmp_path: Path) -> None:
    values = {
        key: torch.nn.Parameter(value, requires_grad=False) for key, value in sparge_layer(MODULE.format(0)).items()
    }
    assert len(read_sparge_pt(saved(tmp_path / "a.pt", values)).layers) == 1


def test_module_paths_are_compared_whole(tmp_path: Path) -> None:
    both = sparge_layer("single_transformer_blocks.1.attn", seed=1) | sparge_layer("transformer_blocks.1.attn", seed=2)
    both |= sparge_layer("transformer_blocks.11.attn", seed=3)
    policy = read_sparge_pt(saved(tmp_path / "a.pt", both), root="transformer_2")
    assert [layer.name.removeprefix("transformer_2.") for layer in policy.layers] == [
        "single_transformer_blocks.1.attn",
        "transformer_blocks.1.attn",
        "transformer_blocks.11.attn",
    ]
    assert len({layer.heads for layer in policy.layers}) == 3


def test_a_file_without_its_unused_threshold_is_read(tmp_path: Path) -> None:
    values = sparge_layer(MODULE.format(0))
    del values[f"{MODULE.format(0)}.inner_attention.simthreshd2"]
    assert load_checkpoint(saved(tmp_path / "a.pt", values)).manifest.tuner == "builtin"


def test_a_file_is_read_without_pytorch(tmp_path: Path) -> None:
    saved(tmp_path / "a.pt", sparge_layer(MODULE.format(0)))
    program = "import sys; from sparsetune.checkpoint import read_sparge_pt; read_sparge_pt(sys.argv[1])"
    program += "; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "a.pt")], check=True)


def test_views_are_read_by_their_strides_and_never_beyond_their_storage(tmp_path: Path) -> None:
    values = sparge_layer(MODULE.format(0))
    name = f"{MODULE.format(0)}.inner_attention.cdfthreshd"
    expected = [head.cdfthreshd for head in read_sparge_pt(saved(tmp_path / "a.pt", values)).layers[0].heads]
    strided = torch.zeros(9)
    strided[1::2] = values[name]
    read = read_sparge_pt(saved(tmp_path / "b.pt", values | {name: strided[1::2]}))
    assert [head.cdfthreshd for head in read.layers[0].heads] == expected
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        content = {entry: archive.read(entry) for entry in archive.namelist()}
    key = next(entry for entry in content if "/data/" in entry)
    with zipfile.ZipFile(tmp_path / "short.pt", "w") as archive:
        for entry, data in content.items():
            archive.writestr(entry, data[:1] if entry == key else data)
    with pytest.raises(CheckpointError, match=r"cannot load .* as tensors"):
        read_sparge_pt(tmp_path / "short.pt")


class Storage:
    """A tensor's storage as a pickle refers to it."""

    def __init__(self, key: str) -> None:
        self.pid = ("storage", torch.FloatStorage, key, "cpu", 4)


class Rebuilt:
    """A tensor of whatever storage, shape and strides."""

    def __init__(self, storage: object, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.parts = (storage, 0, shape, strides, False, OrderedDict())

    def __reduce__(self) -> tuple[Any, ...]:
        return (torch._utils._rebuild_tensor_v2, self.parts)


class Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.pid if isinstance(value, Storage) else None


def crafted(path: Path, value: object, content: bytes = bytes(16)) -> Path:
    """Write a file as `torch.save` would, but with tensors that PyTorch wouldn't make."""
    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(value)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", buffer.getvalue())
        archive.writestr("archive/data/0", content)
    return path


@pytest.mark.parametrize(
    "tensor",
    [
        Rebuilt(Storage("0"), (5,), (1,)),
        Rebuilt(Storage("0"), (4,), (-1,)),
        Rebuilt(Rebuilt(Storage("0"), (4096,), (0,)), (4096,), (1,)),  # a view's size isn't that of its storage
        Rebuilt(Rebuilt(Storage("0"), (10**9, 0), (0, 0)), (4096,), (1,)),
    ],
)
def test_no_tensor_reads_beyond_its_storage(tmp_path: Path, tensor: Rebuilt) -> None:
    with pytest.raises(CheckpointError, match=r"cannot load .* as tensors"):
        read_sparge_pt(crafted(tmp_path / "a.pt", {"a.inner_attention.cdfthreshd": tensor}))


def test_an_archive_that_needs_a_newer_reader_is_refused_in_one_line(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", sparge_layer(MODULE.format(0)))
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 6] = 148  # the version that its first entry needs, ten times
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cannot read .*: zip file version 14\.8"):
        read_sparge_pt(path)


def test_a_storage_that_many_tensors_name_is_read_once(tmp_path: Path) -> None:
    tensors = {f"a.inner_attention.{index}": Rebuilt(Storage("0"), (4,), (1,)) for index in range(2000)}
    path = crafted(tmp_path / "a.pt", tensors, bytes(4 * 10**6))
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="is not MODULE"):
        read_sparge_pt(path)
    assert tracemalloc.get_traced_memory()[1] < 10**8  # 8 GB if each had its own
    tracemalloc.stop()


def test_a_pickle_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}r\xff\xff\xff\xff.")
    with pytest.raises(CheckpointError, match=r"cannot load .* as tensors"):
        read_sparge_pt(tmp_path / "a.pt")


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("ran",))


class State:
    def __reduce__(self) -> tuple[Any, ...]:
        return (OrderedDict, (), {"a": 1})


@pytest.mark.parametrize("value", [{"a": Code()}, {"a": State()}, torch.nn.Linear(1, 1)])
def test_code_in_a_file_is_refused_and_never_run(
    tmp_path: Path, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CheckpointError, match=r"cannot load .* as tensors") as raised:
        read_sparge_pt(saved(tmp_path / "a.pt", value))
    assert "\n" not in str(raised.value)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 truncated", pickle.dumps({"a": Code()})])
def test_what_is_no_torch_file_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cannot load .* as tensors") as raised:
        read_sparge_pt(tmp_path / "a.pt")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([torch.ones(1)], "must hold a dict of tensors, got list"),
        ({}, "holds no thresholds"),
        ({"epoch": 3}, "must hold only tensors by name, but 'epoch' is a int"),
        ({"a.inner_attention.is_sparse.extra": torch.ones(1)}, r"key 'a\.inner_attention\.is_sparse\.extra' is not"),
        ({"a.other.cdfthreshd": torch.ones(1)}, r"is not MODULE\.inner_attention\.THRESHOLD"),
        ({"a.inner_attention.cdfthreshd": torch.ones(1)}, "lacks is_sparse, simthreshd1, pvthreshd"),
    ],
)
def test_other_contents_are_refused(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_sparge_pt(saved(tmp_path / "a.pt", value))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("cdfthreshd", torch.tensor([0.5, float("nan"), 0.5, 0.5]), r"attn1, head 1: cdfthreshd must be in \[0, 1\]"),
        ("pvthreshd", torch.full((4,), float("inf")), "head 0: pvthreshd must be at least 0 and finite"),
        ("simthreshd1", torch.full((4,), -1.5), "head 0: simthreshd1 must be in"),
        ("simthreshd1", torch.zeros(3), r"of one shape \(heads,\).*simthreshd1 \(3,\)"),
        ("cdfthreshd", torch.zeros(4, 1), r"of one shape \(heads,\).*cdfthreshd \(4, 1\)"),
        ("is_sparse", torch.tensor([0.0, 0.5, 1.0, 1.0]), "is_sparse must be true or false for each head"),
        ("pvthreshd", torch.zeros(4).to_sparse(), r"cannot load .* as tensors"),
        ("pvthreshd", torch.zeros(4, dtype=torch.complex64), r"cannot load .* as tensors"),
    ],
)
def test_values_that_do_not_hold_are_refused(tmp_path: Path, column: str, value: Tensor, message: str) -> None:
    values = sparge_layer(MODULE.format(0)) | {f"{MODULE.format(0)}.inner_attention.{column}": value}
    with pytest.raises(CheckpointError, match=message):
        read_sparge_pt(saved(tmp_path / "a.pt", values))


def test_a_head_that_is_not_sparse_is_written_with_both_thresholds_1(tmp_path: Path) -> None:
    head = HeadThresholds(simthreshd1=-1, cdfthreshd=0.5, is_sparse=False)
    write_sparge_pt(Policy((LayerThresholds("transformer.a", (head,)),)), tmp_path / "a.pt")
    written = torch.load(tmp_path / "a.pt", weights_only=True)
    assert list(written) == [f"a.inner_attention.{column}" for column in COLUMNS]
    assert written["a.inner_attention.cdfthreshd"] == written["a.inner_attention.simthreshd1"] == 1


def test_topk_cannot_be_written(tmp_path: Path) -> None:
    policy = Policy.uniform([("transformer.a", 2)], HeadThresholds(simthreshd1=-1, topk=0.5))
    with pytest.raises(CheckpointError, match="has no topk thresholds"):
        write_sparge_pt(policy, tmp_path / "a.pt", allow_loss=True)


@pytest.mark.parametrize(
    ("policy", "lost"),
    [
        (Policy.uniform([("transformer.a", 2)], schedule=DenseSchedule(0.25)), "dense_fraction 0.25"),
        (Policy.uniform([("transformer.a", 2)], order="hilbert"), "order hilbert"),
        (Policy.uniform([("transformer.a", 2)], keep_text=True), "keep_text"),
    ],
)
def test_what_the_format_would_lose_is_refused_unless_allowed(tmp_path: Path, policy: Policy, lost: str) -> None:
    with pytest.raises(CheckpointError, match=lost):
        write_sparge_pt(policy, tmp_path / "a.pt")
    assert not (tmp_path / "a.pt").exists()
    write_sparge_pt(policy, tmp_path / "a.pt", allow_loss=True)
    assert read_sparge_pt(tmp_path / "a.pt").layers == policy.layers


def test_layers_outside_the_root_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not under 'transformer'"):
        write_sparge_pt(Policy.uniform([("transformer_2.a", 2)]), tmp_path / "a.pt")


def test_a_packed_or_strided_bomb_is_refused_at_once(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**8))
    with pytest.raises(CheckpointError, match="holds 100 MB, more than thresholds need"):
        read_sparge_pt(bomb)
    claims = torch.zeros(1).expand(10**12)
    names = ("is_sparse", "cdfthreshd", "simthreshd1", "pvthreshd")
    torch.save({f"blocks.0.inner_attention.{name}": claims for name in names}, tmp_path / "strided.pt")
    with pytest.raises(CheckpointError, match="must be real and of one shape"):
        read_sparge_pt(tmp_path / "strided.pt")
