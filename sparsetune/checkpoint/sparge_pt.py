"""SpargeAttn's checkpoint format: a `torch.save`d dict of one tensor per threshold and layer."""

import io
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsetune.attention.policy import Policy
from sparsetune.attention.thresholds import LayerThresholds
from sparsetune.checkpoint.policy_file import Column, from_columns, to_columns, unwrapped
from sparsetune.errors import CheckpointError
from sparsetune.files import atomic_path

_MAX_BYTES = 64 * 10**6
_KEY = re.compile(r"(.+)\.inner_attention\.(is_sparse|cdfthreshd|simthreshd1|simthreshd2|pvthreshd)")


def read_sparge_pt(path: Path | str, *, root: str = "transformer") -> Policy:
    """Read a checkpoint that SpargeAttn's tuner saved.

    Keys are matched whole, where SpargeAttn's loader compares substrings and so mixes up `transformer_blocks` and
    `single_transformer_blocks`. Any real dtype does (SpargeAttn casts to the model's). `simthreshd2`, which none of its
    kernels reads, is dropped, as are prefixes of compiled and wrapped models. The policy has no dense steps and raster
    order, and keeps the first key block, as SpargeAttn's `attention_sink` does.

    Deviation: SpargeAttn's kernels ignore `is_sparse`, so a head tuned to be dense (both thresholds 1) still skips P·V
    by its pvthreshd there; here it runs fully dense. `write_sparge_pt` writes the stored value again.

    Args:
        path: the `.pt` file, in the format that `torch.save` writes since PyTorch 1.6. It is read without PyTorch,
            whose import takes over a second; only tensors are unpickled.
        root: the pipeline's attribute under which the keys' modules lie.

    Raises:
        CheckpointError: the file can't be read, holds more than tensors, or has wrong keys, shapes or values.
    """
    path = Path(path)
    layers: dict[str, dict[str, Column]] = {}
    for key, array in _arrays(path).items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise CheckpointError(
                f"{path}: key {key!r} is not MODULE.inner_attention.THRESHOLD; "
                "use a file of SpargeAttn's extract_sparse_attention_state_dict"
            )
        layers.setdefault(unwrapped(match[1]), {})[match[2]] = array
    if not layers:
        raise CheckpointError(f"{path} holds no thresholds; tune first")
    try:
        return Policy(tuple(from_columns(f"{root}.{module}", "cdf", columns) for module, columns in layers.items()))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def write_sparge_pt(policy: Policy, path: Path | str, *, root: str = "transformer", allow_loss: bool = False) -> None:
    """Write a policy as a file that SpargeAttn's `load_sparse_attention_state_dict` loads.

    A head that isn't sparse gets cdfthreshd and simthreshd1 1, which is how SpargeAttn makes one dense.

    Args:
        policy: thresholds by the cdf rule.
        path: the file, written atomically.
        root: the pipeline's attribute that every layer lies under; keys are written without it.
        allow_loss: write without dense steps, token order and text rule, which the format lacks: videos will differ.

    Raises:
        CheckpointError: the format can't hold the policy.
    """
    import torch

    path = Path(path)
    check_expressible(policy, path, root=root, allow_loss=allow_loss)
    tensors = {
        f"{layer.name.removeprefix(f'{root}.')}.inner_attention.{name}": torch.from_numpy(column)
        for layer in policy.layers
        for name, column in _sparge_columns(layer).items()
    }
    with atomic_path(path) as temporary:
        torch.save(tensors, temporary)


def check_expressible(policy: Policy, path: Path, *, root: str = "transformer", allow_loss: bool = False) -> None:
    """Raise CheckpointError unless `write_sparge_pt` can write the policy; `path` is for the message."""
    outside = next((layer.name for layer in policy.layers if not layer.name.startswith(f"{root}.")), None)
    if outside is not None:
        raise CheckpointError(f"cannot write {path}: layer {outside} is not under {root!r}")
    if any(layer.rule == "topk" for layer in policy.layers):
        raise CheckpointError(
            f"cannot write {path}: SpargeAttn's format has no topk thresholds; convert to a folder or .safetensors"
        )
    orders = ", ".join(order for order in policy.order_names if order != "raster")
    rules = {
        f"dense_fraction {policy.schedule.dense_fraction:g}": policy.schedule.dense_fraction,
        "drop_scale": policy.schedule.drop_scale,
        f"order {orders}": orders,
        "keep_text": policy.keep_text,
        "select_partial": policy.select_partial,
        f"cache {policy.cache}": policy.cache,
    }
    lost = [name for name, value in rules.items() if value]
    if lost and not allow_loss:
        raise CheckpointError(
            f"cannot write {path}: SpargeAttn's format would lose {', '.join(lost)}; "
            "convert to a folder or .safetensors, or allow the loss"
        )


def _sparge_columns(layer: LayerThresholds) -> dict[str, Column]:
    """Return a layer's columns in the order in which SpargeAttn's module registers its parameters."""
    columns = to_columns(layer)
    is_sparse = columns["is_sparse"]
    return {
        "is_sparse": is_sparse,
        "cdfthreshd": np.where(is_sparse, columns["cdfthreshd"], np.float32(1.0)),
        "simthreshd1": np.where(is_sparse, columns["simthreshd1"], np.float32(1.0)),
        "simthreshd2": np.zeros(len(layer.heads), dtype=np.float32),
        "pvthreshd": columns["pvthreshd"],
    }


def _check_size(path: Path) -> None:
    """Raise CheckpointError where a file, or what is packed in it, is far larger than thresholds are."""
    try:
        size = path.stat().st_size
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                size = max(size, sum(member.file_size for member in archive.infolist()))
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if size > _MAX_BYTES:
        raise CheckpointError(f"{path} holds {size / 1e6:.0f} MB, more than thresholds need; is it a model's weights?")


_DTYPES = {
    "BoolStorage": "?", "ByteStorage": "u1", "CharStorage": "i1", "ShortStorage": "<i2", "IntStorage": "<i4",
    "LongStorage": "<i8", "BFloat16Storage": "<u2", "HalfStorage": "<f2", "FloatStorage": "<f4", "DoubleStorage": "<f8",
}  # fmt: skip


@dataclass(frozen=True)
class _Storage:
    """The flat values of a tensor; only `_strided` makes an array of it, so that no view's bounds are trusted."""

    values: NDArray[Any]


class _Unpickler(pickle.Unpickler):
    """Reads tensors of `torch.save` as arrays; anything else that a pickle could call is refused."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        content = archive.read(f"{folder}/data.pkl")
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "BUILD":
                raise pickle.UnpicklingError("it sets an object's state")
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(content):
                raise pickle.UnpicklingError("it asks for more memory than its size")
        super().__init__(io.BytesIO(content))
        self._archive, self._folder = archive, folder
        self._storages: dict[tuple[str, str], _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        known = {
            "collections.OrderedDict": OrderedDict,
            "torch._utils._rebuild_tensor_v2": _strided,
            "torch._utils._rebuild_parameter": _data,
        }
        if module == "torch" and name in _DTYPES:
            return name
        if (found := known.get(f"{module}.{name}")) is None:
            raise pickle.UnpicklingError(f"it has {module}.{name}")
        return found

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, *_ = pid
        if (dtype, key) not in self._storages:  # however often a file names it, it is read once
            values = np.frombuffer(self._archive.read(f"{self._folder}/data/{key}"), _DTYPES[dtype])
            if dtype == "BFloat16Storage":  # the upper half of a float32
                values = (values.astype("<u4") << 16).view("<f4")
            self._storages[dtype, key] = _Storage(values)
        return self._storages[dtype, key]


def _strided(
    storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: object
) -> NDArray[Any]:
    """Return a tensor's view of its storage; it may be far larger, so nothing is copied."""
    values = storage.values
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if min(offset, *shape, *strides) < 0 or (0 not in shape and last >= len(values)):
        raise pickle.UnpicklingError("a tensor is larger than what is stored of it")
    steps = [stride * values.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(values[offset:], shape, steps, writeable=False)


def _data(array: NDArray[Any], *_: object) -> NDArray[Any]:
    return array


def _arrays(path: Path) -> Mapping[str, Column]:
    """Read a `torch.save`d dict of tensors without PyTorch, whose import takes over a second."""
    _check_size(path)
    try:
        with zipfile.ZipFile(path) as archive:
            folder = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("/data.pkl")
            loaded = _Unpickler(archive, folder).load()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # unpickling what isn't a pickle of tensors raises nearly anything
        raise CheckpointError(
            f"cannot load {path} as tensors ({type(error).__name__}): it is damaged, or holds code, which is never run"
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} must hold a dict of tensors, got {type(loaded).__name__}")
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, np.ndarray):
            raise CheckpointError(f"{path} must hold only tensors by name, but {key!r} is a {type(value).__name__}")
    return loaded
