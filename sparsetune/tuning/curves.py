"""Calibrated curves: what error each grid of thresholds costs each head, and the policy read off them."""

import json
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsetune.attention.policy import Policy
from sparsetune.attention.schedule import DenseSchedule
from sparsetune.attention.thresholds import HeadThresholds, LayerThresholds, Rule
from sparsetune.errors import ThresholdError, TuningError
from sparsetune.files import atomic_path

Array = npt.NDArray[np.float32]

SCHEMA_VERSION = 1

# What numpy, zipfile and json raise on damaged files, and what our own types raise on their contents.
_UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, EOFError, NotImplementedError, SyntaxError, tokenize.TokenError,
    zipfile.BadZipFile, zlib.error, ThresholdError,
)  # fmt: skip

_CDFS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)
_TOPKS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_SIMS = (-1.0, 0.3)


def grid(rules: Sequence[Rule]) -> tuple[HeadThresholds, ...]:
    """List the thresholds to measure: every simthreshd1 with every cdfthreshd, and topk without a similarity rule."""
    points = {
        "cdf": [HeadThresholds(simthreshd1=sim, cdfthreshd=cdf) for sim in _SIMS for cdf in _CDFS],
        "topk": [HeadThresholds(simthreshd1=-1.0, topk=topk) for topk in _TOPKS],
    }
    return tuple(point for rule in rules for point in points[rule])


DENSE = {
    "cdf": HeadThresholds(1.0, cdfthreshd=1.0, is_sparse=False),
    "topk": HeadThresholds(1.0, topk=1.0, is_sparse=False),
}


@dataclass(frozen=True)
class Curves:
    """For each arrangement, layer, sampled step and head: error and sparsity at every point of a grid.

    Args:
        layers: (name, number of heads) of each layer.
        orders: token orders measured, all with the text's key blocks kept or not as `keep_text` says.
        steps: sampled denoising steps, ascending, of `num_steps`.
        num_steps: steps of the generation.
        points: the grid.
        error: the largest relative L1 error seen, float32 (orders, layers, steps, heads, points); NaN for heads
            that a layer doesn't have.
        sparsity: mean fraction of block pairs not computed, the same shape.
        num_inputs: prompts measured.
        keep_text: whether the text's key blocks were kept.
    """

    layers: tuple[tuple[str, int], ...]
    orders: tuple[str, ...]
    steps: tuple[int, ...]
    num_steps: int
    points: tuple[HeadThresholds, ...]
    error: Array
    sparsity: Array
    num_inputs: int
    keep_text: bool

    def policy(
        self,
        budgets: float | Sequence[float],
        *,
        order: str = "raster",
        rule: Rule = "cdf",
        dense_fraction: float = 0.0,
    ) -> Policy:
        """Read off the sparsest policy within an error budget.

        Every head gets the point with the most sparsity among those whose error, on every input and every
        sampled step that runs sparse, is at most its layer's budget; a head without such a point runs dense.

        Args:
            budgets: bound on the relative L1 error of a head's output, one for all layers or one a layer.
            order: one of `orders`.
            rule: cdf or topk.
            dense_fraction: fraction of the steps that run dense; their errors don't count.

        Raises:
            TuningError: the order wasn't measured, or the number of budgets isn't the number of layers.
        """
        if order not in self.orders:
            raise TuningError(f"the order must be one that was calibrated, {', '.join(self.orders)}, but is {order!r}")
        per_layer = [budgets] * len(self.layers) if isinstance(budgets, float | int) else list(budgets)
        if len(per_layer) != len(self.layers):
            raise TuningError(f"budgets must be one or {len(self.layers)}, one a layer, but are {len(per_layer)}")
        schedule = DenseSchedule(dense_fraction)
        active = self._active_steps(schedule)
        usable = np.array([point.rule == rule for point in self.points])
        layers = []
        for index, (name, num_heads) in enumerate(self.layers):
            error = self.error[self.orders.index(order), index, active, :num_heads].max(axis=0)
            sparsity = self.sparsity[self.orders.index(order), index, active, :num_heads].mean(axis=0)
            allowed = (error <= per_layer[index]) & usable & (sparsity > 0)
            best = np.where(allowed, sparsity, -1.0).argmax(axis=1)
            heads = tuple(
                self.points[point] if allowed[head, point] else DENSE[rule] for head, point in enumerate(best)
            )
            layers.append(LayerThresholds(name, heads))
        return Policy(tuple(layers), schedule, order, self.keep_text)

    def merged(self, other: "Curves") -> "Curves":
        """Put the curves of further prompts to these: the largest errors, the mean sparsities.

        Raises:
            TuningError: the two measured different things.
        """
        same = ("layers", "orders", "steps", "num_steps", "points", "keep_text")
        if differing := [name for name in same if getattr(self, name) != getattr(other, name)]:
            raise TuningError(
                f"curves can be merged when they measure the same, but they differ in {', '.join(differing)}"
            )
        total = self.num_inputs + other.num_inputs
        sparsity = (self.sparsity * self.num_inputs + other.sparsity * other.num_inputs) / total
        return Curves(
            self.layers, self.orders, self.steps, self.num_steps, self.points,
            np.maximum(self.error, other.error), sparsity.astype(np.float32), total, self.keep_text,
        )  # fmt: skip

    def save(self, path: Path) -> None:
        """Write the curves as .npz: `error` and `sparsity` as above, `about` a JSON text with the rest."""
        about: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "layers": self.layers,
            "orders": self.orders,
            "steps": self.steps,
            "num_steps": self.num_steps,
            "num_inputs": self.num_inputs,
            "keep_text": self.keep_text,
            "points": [(p.simthreshd1, p.cdfthreshd, p.topk, p.pvthreshd) for p in self.points],
        }
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, error=self.error, sparsity=self.sparsity, about=np.array(json.dumps(about)))

    @classmethod
    def load(cls, path: Path) -> "Curves":
        """Read curves that `save` wrote.

        Raises:
            TuningError: the file isn't that.
        """
        try:
            with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                about = json.loads(str(file["about"]))
                if about["schema_version"] != SCHEMA_VERSION:
                    raise ValueError(f"schema version {about['schema_version']}")
                error, sparsity = file["error"], file["sparsity"]
            return cls(
                layers=tuple((name, heads) for name, heads in about["layers"]),
                orders=tuple(about["orders"]),
                steps=tuple(about["steps"]),
                num_steps=about["num_steps"],
                points=tuple(HeadThresholds(sim, cdf, topk, pv) for sim, cdf, topk, pv in about["points"]),
                error=error,
                sparsity=sparsity,
                num_inputs=about["num_inputs"],
                keep_text=about["keep_text"],
            )
        except _UNREADABLE as problem:
            raise TuningError(
                f"the calibration must be a table that sparsetune wrote, but {path} can't be read as one ({problem}); "
                "remove it to calibrate again"
            ) from problem

    def _active_steps(self, schedule: DenseSchedule) -> list[int]:
        """Places of the sampled steps that run sparse; the last one where all of them run dense."""
        active = [place for place, step in enumerate(self.steps) if not schedule.is_dense(step, self.num_steps)]
        return active or [len(self.steps) - 1]
