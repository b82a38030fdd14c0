"""Calibrated curves: error and sparsity of every head at each point of a grid of thresholds, and their .npz files."""

import contextlib
import json
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sparsetune.attention.schedule import DenseSchedule
from sparsetune.attention.thresholds import HeadThresholds, Rule
from sparsetune.documents import read_json
from sparsetune.errors import ThresholdError, TuningError
from sparsetune.files import atomic_path

Array = npt.NDArray[np.float32]

_UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, EOFError, NotImplementedError, SyntaxError, tokenize.TokenError,
    zipfile.BadZipFile, zlib.error, ThresholdError,
)  # fmt: skip
"""Raised by NumPy, zipfile and json on damaged files, and by our own types on their contents."""


@contextlib.contextmanager
def reading(path: Path, what: str, remedy: str) -> Iterator[None]:
    """Raise `TuningError` where a file of measurements is damaged."""
    try:
        yield
    except _UNREADABLE as problem:
        raise TuningError(f"cannot read the {what} {path} ({problem}); remove it to {remedy}") from problem


def write_table(path: Path, schema_version: int, about: Mapping[str, Any], **arrays: Any) -> None:
    """Write arrays and their JSON metadata as .npz, atomically."""
    text = json.dumps({"schema_version": schema_version, **about})
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays, about=np.array(text))


def read_table(path: Path, schema_version: int, *names: str) -> tuple[dict[str, Any], list[Array]]:
    with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
        about = read_json(str(file["about"]))
        if about.pop("schema_version") != schema_version:
            raise ValueError("another version's schema")
        return about, [file[name] for name in names]


SCHEMA_VERSION = 2

_ARRAYS = ("error", "error_rms", "sparsity", "size")

_CDFS = tuple(round(1.0 - 2.0 ** (-index / 2), 6) for index in range(21))
"""The error grows with the probability left out, 1 − cdfthreshd: each point leaves out √2 less than the last."""

_TOPKS = (0.02, *(index / 40 for index in range(2, 16)), *(index / 20 for index in range(8, 19)))
_SIMS = (-1.0, 0.3)


def grid(rules: Sequence[Rule]) -> tuple[HeadThresholds, ...]:
    """Thresholds to measure: those of the cdf rule first and always, since sensitivity is probed with one of them."""
    points = {
        "cdf": [HeadThresholds(simthreshd1=sim, cdfthreshd=cdf) for sim in _SIMS for cdf in _CDFS],
        "topk": [HeadThresholds(simthreshd1=-1.0, topk=topk) for topk in _TOPKS],
    }
    wanted: list[Rule] = ["cdf", *(rule for rule in rules if rule != "cdf")]
    return tuple(point for rule in wanted for point in points[rule])


class Arrangement(NamedTuple):
    """A token order, and whether the text's key blocks are always computed."""

    order: str
    keep_text: bool


@dataclass(frozen=True)
class Curves:
    """Error and sparsity at every point of a grid, for each arrangement, layer, sampled step and head.

    `error`, `error_rms` and `sparsity` are float32 (arrangements, layers, steps, heads, points), `size` float32
    (layers, steps, heads); NaN for heads that a layer doesn't have.
    """

    layers: tuple[tuple[str, int], ...]  # name and number of heads
    arrangements: tuple[Arrangement, ...]
    steps: tuple[int, ...]  # sampled ones, ascending, of the generation's `num_steps`
    num_steps: int
    points: tuple[HeadThresholds, ...]  # the grid
    error: Array  # the largest relative L1 error of all prompts
    error_rms: Array  # its root mean square over the prompts
    sparsity: Array  # mean fraction of block pairs not computed
    size: Array  # mean |o| of the dense output
    num_inputs: int  # prompts measured
    select_partial: bool  # whether partial last blocks were selected like any other

    def arrangement_indices(self, orders: Sequence[str] | None, keep_text: bool) -> list[int]:
        """Indices of the arrangements with one of these orders (None is any) and this text rule."""
        measured = [arrangement.order for arrangement in self.arrangements if arrangement.keep_text == keep_text]
        wanted = measured if orders is None else list(orders)
        if not wanted or not set(wanted) <= set(measured):
            raise TuningError(
                f"orders must be calibrated ones ({', '.join(measured) or 'none'} with keep_text {keep_text}), "
                f"got {', '.join(wanted) or 'none'}; add them to --orders"
            )
        return [self.arrangements.index(Arrangement(order, keep_text)) for order in wanted]

    def active_steps(self, schedule: DenseSchedule) -> list[int]:
        """Indices of the sampled steps that run sparse; the last one where all of them run dense."""
        active = [index for index, step in enumerate(self.steps) if not schedule.is_dense(step, self.num_steps)]
        return active or [len(self.steps) - 1]

    def merged(self, other: "Curves") -> "Curves":
        """Merge with the curves of other prompts: the largest errors, and means of the rest."""
        same = ("layers", "arrangements", "steps", "num_steps", "points", "select_partial")
        if differing := [name for name in same if getattr(self, name) != getattr(other, name)]:
            raise TuningError(f"cannot merge curves that differ in {', '.join(differing)}")
        total = self.num_inputs + other.num_inputs

        def mean(ours: Array, theirs: Array) -> Array:
            return ((ours * self.num_inputs + theirs * other.num_inputs) / total).astype(np.float32)

        return replace(
            self,
            error=np.maximum(self.error, other.error),
            error_rms=np.sqrt(mean(self.error_rms**2, other.error_rms**2)),
            sparsity=mean(self.sparsity, other.sparsity),
            size=mean(self.size, other.size),
            num_inputs=total,
        )

    def save(self, path: Path) -> None:
        about: dict[str, Any] = {
            "layers": self.layers,
            "arrangements": [arrangement._asdict() for arrangement in self.arrangements],
            "steps": self.steps,
            "num_steps": self.num_steps,
            "num_inputs": self.num_inputs,
            "select_partial": self.select_partial,
            "points": [asdict(point) for point in self.points],
        }
        write_table(path, SCHEMA_VERSION, about, **{name: getattr(self, name) for name in _ARRAYS})

    @classmethod
    def load(cls, path: Path) -> "Curves":
        with reading(path, "calibration", "calibrate again"):
            about, arrays = read_table(path, SCHEMA_VERSION, *_ARRAYS)
            about |= dict(zip(_ARRAYS, arrays, strict=True)) | {
                "layers": tuple((name, heads) for name, heads in about["layers"]),
                "arrangements": tuple(Arrangement(**each) for each in about["arrangements"]),
                "steps": tuple(about["steps"]),
                "points": tuple(HeadThresholds(**point) for point in about["points"]),
            }
            curves = cls(**about)
            curves._check_shapes()
            return curves

    def _check_shapes(self) -> None:
        """Raise ValueError where an array hasn't the shape that the rest describes, or a value is infinite."""
        heads = max(heads for _, heads in self.layers)
        of_head = (len(self.layers), len(self.steps), heads)
        expected = (len(self.arrangements), *of_head, len(self.points))
        for name in _ARRAYS:
            array, wanted = getattr(self, name), of_head if name == "size" else expected
            if array.shape != wanted or array.dtype != np.float32:
                raise ValueError(f"{name} must be float32 of shape {wanted}, got {array.dtype} {array.shape}")
        there = np.arange(heads) < np.array([number for _, number in self.layers])[:, None]
        if np.isnan(np.moveaxis(self.size, 1, 0)[:, there]).any():
            raise ValueError("size is NaN for a head that its layer has")
