"""Policies as safetensors files: thresholds as tensors, the rest as metadata; read and written without torch."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sparsetune.attention.policy import Policy
from sparsetune.attention.schedule import DenseSchedule
from sparsetune.attention.step_cache import StepCache
from sparsetune.attention.thresholds import HeadThresholds, LayerThresholds, Rule
from sparsetune.checkpoint.manifest import SCHEMA_VERSION, check_schema_version
from sparsetune.documents import read_json
from sparsetune.errors import CheckpointError, ThresholdError
from sparsetune.files import atomic_path

Column = NDArray[np.bool_] | NDArray[np.floating[Any]]
"""One value for each head of a layer."""

_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def unwrapped(name: str) -> str:
    """Return a module's path without the parts that torch.compile, data parallelism and checkpointing add."""
    return _WRAPPERS.sub("", name)


def threshold_columns(rule: Rule) -> tuple[str, str, str]:
    """Return the names of a rule's thresholds, as fields of `HeadThresholds` and as tensors."""
    return "simthreshd1", "cdfthreshd" if rule == "cdf" else "topk", "pvthreshd"


def to_columns(layer: LayerThresholds) -> dict[str, Column]:
    """Return a layer as arrays of shape (heads,): `is_sparse` bool, the thresholds rounded to float32.

    Unlike in `LayerThresholds.tensors`, dense heads keep their thresholds.
    """
    columns: dict[str, Column] = {"is_sparse": np.array([head.is_sparse for head in layer.heads], dtype=np.bool_)}
    for name in threshold_columns(layer.rule):
        columns[name] = np.array([getattr(head, name) for head in layer.heads], dtype=np.float32)
    return columns


def from_columns(name: str, rule: Rule, columns: Mapping[str, Column]) -> LayerThresholds:
    """Build a layer from arrays of shape (heads,) in any real dtype; the thresholds are rounded to float32.

    Args:
        name: the attention module's path from the pipeline.
        rule: which of `cdfthreshd` and `topk` the arrays hold.
        columns: `simthreshd1`, `pvthreshd`, the rule's threshold and `is_sparse`, which may be stored as numbers, 0 or
            1: SpargeAttn casts it with the model's dtype. Others are ignored.

    Raises:
        CheckpointError: an array is missing, shapes differ, or a value is NaN or out of range.
    """
    wanted = ("is_sparse", *threshold_columns(rule))
    missing = [column for column in wanted if column not in columns]
    if missing:
        raise CheckpointError(f"{name} lacks {', '.join(missing)}; save the checkpoint again")
    _check_shapes(name, {column: columns[column].shape for column in wanted})
    flags = columns["is_sparse"].astype(np.float32)
    if not ((flags == 0) | (flags == 1)).all():
        raise CheckpointError(f"{name}.is_sparse must be true or false for each head, got {flags.tolist()}")
    unset: dict[str, Any] = {"cdfthreshd": None, "topk": None}
    thresholds = zip(*(_values(columns[column]) for column in wanted[1:]), strict=True)
    heads = []
    for index, (is_sparse, values) in enumerate(zip(flags.tolist(), thresholds, strict=True)):
        try:
            named = unset | dict(zip(wanted[1:], values, strict=True))
            heads.append(HeadThresholds(**named, is_sparse=bool(is_sparse)))
        except ThresholdError as error:
            raise CheckpointError(f"{name}, head {index}: {error}") from error
    return LayerThresholds(name, tuple(heads))


def _check_shapes(name: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless a layer's columns are of one shape (heads,)."""
    shape = next(iter(shapes.values()))
    if len(shape) != 1 or not 0 < shape[0] <= _MAX_HEADS or set(shapes.values()) != {shape}:
        listed = ", ".join(f"{column} {found}" for column, found in shapes.items())
        raise CheckpointError(f"the tensors of {name} must be real and of one shape (heads,), got {listed}")


def _values(column: Column) -> list[float]:
    # The shortest decimal that rounds to the same float32: 0.98 comes back as 0.98, not 0.9800000190734863,
    # and a kernel gets the same bits from either.
    return [float(str(value)) for value in column.astype(np.float32)]


_MAX_HEADS = 4096  # a tensor may claim far more than its file holds
METADATA_KEY = "sparsetune.policy"  # the safetensors metadata entry with the rest of the policy, as JSON


def write_policy(policy: Policy, path: Path) -> None:
    """Write a policy atomically to a .safetensors file, with the tensors `{layer}.{column}` of `to_columns`."""
    tensors = {
        f"{layer.name}.{column}": tensor for layer in policy.layers for column, tensor in to_columns(layer).items()
    }
    described = {
        "schema_version": SCHEMA_VERSION,
        "layers": [{"name": layer.name, "rule": layer.rule, "order": layer.order} for layer in policy.layers],
        "dense_fraction": policy.schedule.dense_fraction,
        "drop_scale": policy.schedule.drop_scale,
        "order": policy.order,
        "keep_text": policy.keep_text,
        "select_partial": policy.select_partial,
        "cache": None if policy.cache is None else asdict(policy.cache),
    }
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(described)})


def read_policy(path: Path) -> Policy:
    """Read what `write_policy` wrote; CheckpointError where it can't be read or isn't exactly that."""
    try:
        with safe_open(path, framework="np") as opened:
            described = _described(path, opened.metadata() or {})
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the policy {path}: {error}; save the checkpoint again") from error
    try:
        return _build(described, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, ThresholdError) as error:
        raise CheckpointError(f"{path} is no complete policy: {error!r}; save the checkpoint again") from error


def _build(described: dict[str, Any], tensors: dict[str, Column]) -> Policy:
    layers: list[LayerThresholds] = []
    for entry in described["layers"]:
        name, rule = str(entry["name"]), entry["rule"]
        if rule not in ("cdf", "topk"):
            raise ValueError(f"a rule must be cdf or topk, got {rule!r}")
        wanted = ("is_sparse", *threshold_columns(rule))
        columns = {column: tensors.pop(key) for column in wanted if (key := f"{name}.{column}") in tensors}
        order = entry.get("order")
        order = tuple(order) if isinstance(order, list) else order
        layers.append(replace(from_columns(unwrapped(name), rule, columns), order=order))
    if tensors:
        raise CheckpointError(f"unexpected tensors {', '.join(tensors)}")
    drop_scale = tuple(float(factor) for factor in described.get("drop_scale", ()))
    schedule = DenseSchedule(float(described["dense_fraction"]), drop_scale)
    keep_text, select_partial = described["keep_text"], described.get("select_partial", False)
    if not isinstance(keep_text, bool) or not isinstance(select_partial, bool):
        raise TypeError(f"keep_text and select_partial must be true or false, got {keep_text!r}, {select_partial!r}")
    cache = described.get("cache")  # since version 2
    if cache is not None:
        ratios = tuple(tuple(float(ratio) for ratio in of_one) for of_one in cache["ratios"])
        cache = StepCache(**dict(cache) | {"ratios": ratios})
    return Policy(tuple(layers), schedule, str(described["order"]), keep_text, select_partial, cache)


def _described(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if METADATA_KEY not in metadata:
        raise CheckpointError(
            f"{path} is no policy that sparsetune wrote: its metadata has no entry {METADATA_KEY!r}; "
            "is it a model's weights?"
        )
    try:
        described = read_json(metadata[METADATA_KEY])
    except ValueError as error:
        raise CheckpointError(f"the metadata of {path} is no JSON: {error}; save the checkpoint again") from error
    check_schema_version(path, described.get("schema_version") if isinstance(described, dict) else None)
    return cast("dict[str, Any]", described)
