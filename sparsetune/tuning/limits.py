"""How low each head's thresholds may go: what searches of one layer and input after the other come to."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sparsetune.attention.policy import Policy
from sparsetune.attention.thresholds import HeadThresholds, LayerThresholds, Rule
from sparsetune.errors import TuningError
from sparsetune.tuning.bounds import DENSE
from sparsetune.tuning.curves import Array
from sparsetune.tuning.tables import UNREADABLE, read_table, write_table

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Limits:
    """The lowest thresholds of each head that keep its error within a bound on every input seen.

    They are of a fixed simthreshd1 and token order. The error falls as a threshold rises, so what holds on all inputs
    is the largest of what holds on each: limits are merged in any order, exactly.

    Args:
        layers: (name, number of heads) of each layer.
        cut: the lowest cdfthreshd or topk, float32 (layers, heads); infinite where none holds the bound, NaN for heads
            that a layer doesn't have.
        pvthreshd: the lowest one at that cut, the same shape; NaN as above.
        num_inputs: prompts seen.
    """

    layers: tuple[tuple[str, int], ...]
    cut: Array
    pvthreshd: Array
    num_inputs: int

    @classmethod
    def none(cls, layers: tuple[tuple[str, int], ...], num_inputs: int = 0) -> "Limits":
        """Limits of no input, to which others are merged: 0 for every head."""
        cut = np.full((len(layers), max(heads for _, heads in layers)), np.nan, np.float32)
        for index, (_, heads) in enumerate(layers):
            cut[index, :heads] = 0.0
        return cls(layers, cut, cut.copy(), num_inputs)

    def merged(self, other: "Limits") -> "Limits":
        """Put the limits of further prompts to these.

        Raises:
            TuningError: the layers differ.
        """
        if self.layers != other.layers:
            raise TuningError("limits can be merged when they are of the same layers, but theirs differ")
        return replace(
            self,
            cut=np.maximum(self.cut, other.cut),
            pvthreshd=np.maximum(self.pvthreshd, other.pvthreshd),
            num_inputs=self.num_inputs + other.num_inputs,
        )

    def policy(self, start: Policy) -> Policy:
        """Give each head of a policy its limits; one that no cut below 1 keeps within the bound is dense.

        Args:
            start: what the limits were searched at: its simthreshd1, orders and rule hold.
        """
        layers = []
        for index, layer in enumerate(start.layers):
            # As a checkpoint gives them back: the shortest decimals that are the same in float32.
            cuts, pvs = ([float(str(value)) for value in table[index]] for table in (self.cut, self.pvthreshd))
            heads = tuple(
                _thresholds(layer.rule, head.simthreshd1, cuts[place], pvs[place])
                for place, head in enumerate(layer.heads)
            )
            layers.append(LayerThresholds(layer.name, heads, layer.order))
        return replace(start, layers=tuple(layers))

    def save(self, path: Path) -> None:
        """Write the limits as .npz: the two arrays as above, `about` a JSON text with the rest."""
        about = {"layers": self.layers, "num_inputs": self.num_inputs}
        write_table(path, SCHEMA_VERSION, about, cut=self.cut, pvthreshd=self.pvthreshd)

    @classmethod
    def load(cls, path: Path) -> "Limits":
        """Read limits that `save` wrote.

        Raises:
            TuningError: the file isn't that.
        """
        try:
            about, (cut, pvthreshd) = read_table(path, SCHEMA_VERSION, "cut", "pvthreshd")
            layers = tuple((str(name), int(heads)) for name, heads in about["layers"])
            if not cut.shape == pvthreshd.shape == cls.none(layers).cut.shape:
                raise ValueError(f"arrays of {cut.shape} and {pvthreshd.shape} for {len(layers)} layers")
            return cls(layers, cut, pvthreshd, int(about["num_inputs"]))
        except UNREADABLE as problem:
            raise TuningError(
                f"the limits must be a table that sparsetune wrote, but {path} can't be read as one ({problem}); "
                "remove it to search them again"
            ) from problem


def _thresholds(rule: Rule, sim: float, cut: float, pvthreshd: float) -> HeadThresholds:
    if cut >= 1.0:
        return DENSE[rule]
    if rule == "cdf":
        return HeadThresholds(sim, cdfthreshd=cut, pvthreshd=pvthreshd)
    return HeadThresholds(sim, topk=cut, pvthreshd=pvthreshd)
