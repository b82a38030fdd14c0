"""A layer's thresholds as stored tensors, one value a head."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsetune.attention.thresholds import HeadThresholds, LayerThresholds, Rule
from sparsetune.errors import CheckpointError, ThresholdError


def select_column(rule: Rule) -> str:
    """Return the name of the tensor that holds a rule's threshold: `cdfthreshd` or `topk`."""
    return "cdfthreshd" if rule == "cdf" else "topk"


def to_columns(layer: LayerThresholds) -> dict[str, Tensor]:
    """Lay a layer out as tensors of shape (heads,): `is_sparse` bool, the thresholds float32.

    Unlike `LayerThresholds.tensors`, a dense head keeps the thresholds it has.
    """
    select = select_column(layer.rule)
    columns = {"is_sparse": torch.tensor([head.is_sparse for head in layer.heads], dtype=torch.bool)}
    for name in ("simthreshd1", select, "pvthreshd"):
        columns[name] = torch.tensor([getattr(head, name) for head in layer.heads], dtype=torch.float32)
    return columns


def from_columns(name: str, rule: Rule, columns: Mapping[str, Tensor]) -> LayerThresholds:
    """Build a layer from tensors of shape (heads,) in any real dtype; the thresholds are rounded to float32.

    `is_sparse` may be stored as numbers, 0 or 1: SpargeAttn casts it with the model's dtype.

    Args:
        name: the attention module's path from the pipeline.
        rule: which of `cdfthreshd` and `topk` the tensors hold.
        columns: `is_sparse`, `simthreshd1`, `pvthreshd` and the rule's threshold.

    Raises:
        CheckpointError: a tensor is missing, shapes differ, or a value is NaN or out of range.
    """
    select = select_column(rule)
    wanted = ("is_sparse", "simthreshd1", select, "pvthreshd")
    missing = [column for column in wanted if column not in columns]
    if missing:
        raise CheckpointError(f"{name} must have {', '.join(wanted)}, but lacks {', '.join(missing)}; save it anew")
    _check_shapes(name, {column: columns[column] for column in wanted})
    flags = columns["is_sparse"].to(torch.float32)
    if not bool(((flags == 0) | (flags == 1)).all()):
        raise CheckpointError(f"{name}.is_sparse must hold only true and false, but holds {flags.tolist()}")
    thresholds = zip(*(_values(columns[column]) for column in wanted[1:]), strict=True)
    heads = []
    for index, (is_sparse, (similarity, chosen, pv)) in enumerate(zip(flags.tolist(), thresholds, strict=True)):
        try:
            heads.append(
                HeadThresholds(
                    simthreshd1=similarity,
                    cdfthreshd=chosen if rule == "cdf" else None,
                    topk=chosen if rule == "topk" else None,
                    pvthreshd=pv,
                    is_sparse=bool(is_sparse),
                )
            )
        except ThresholdError as error:
            raise CheckpointError(f"{name}, head {index}: {error}") from error
    return LayerThresholds(name, tuple(heads))


def _check_shapes(name: str, columns: Mapping[str, Tensor]) -> None:
    shapes = {column: tuple(tensor.shape) for column, tensor in columns.items()}
    plain = all(tensor.layout == torch.strided and not tensor.is_complex() for tensor in columns.values())
    shape = next(iter(shapes.values()))
    if not plain or len(shape) != 1 or shape[0] == 0 or set(shapes.values()) != {shape}:
        listed = ", ".join(f"{column} {found}" for column, found in shapes.items())
        raise CheckpointError(f"the tensors of {name} must all have the shape (heads,) and be real, but are {listed}")


def _values(column: Tensor) -> list[float]:
    # The shortest decimal that rounds to the same float32: 0.98 comes back as 0.98, not 0.9800000190734863,
    # and a kernel gets the same bits from either.
    return [float(str(value)) for value in column.detach().to("cpu", torch.float32).numpy()]
