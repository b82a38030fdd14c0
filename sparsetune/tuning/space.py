"""The search space: what a trial's parameters are, and the policy that they mean."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import optuna

from sparsetune.attention.policy import Policy
from sparsetune.attention.schedule import DenseSchedule
from sparsetune.attention.thresholds import SPARGE_DEFAULTS, HeadThresholds, LayerThresholds
from sparsetune.tuning.curves import Curves
from sparsetune.tuning.events import Parameter

Granularity = Literal["global", "group", "layer"]
Kind = Literal["budget", "raw"]

BUDGETS = (0.01, 0.4)
"""Range of the error budget: relative L1 error of an attention output, searched on a logarithmic scale."""

DENSE_FRACTIONS = (0.0, 0.6, 0.1)
"""Lowest, highest and step of the fraction of denoising steps that run dense."""

_STARTS = ((0.05, 0.0), (0.1, 0.3))
"""Budgets and dense fractions to start from."""

NUM_GROUPS = 3
"""Groups of consecutive layers at granularity `group`: early, middle and late layers bear sparsity differently."""

THRESHOLDS, CALIBRATED, DEFAULT = "thresholds", "calibrated", "default"
"""Where a trial's thresholds come from: the curves, or, in the first trial, SpargeAttn's defaults. The sampler doesn't
choose it; it is enqueued with the trial as a user attribute."""


@dataclass(frozen=True)
class Start:
    """A trial to try first: its parameters, and where its thresholds come from."""

    params: dict[str, Parameter]
    thresholds: str = CALIBRATED


@dataclass(frozen=True)
class SearchSpace:
    """What a trial decides.

    Args:
        curves: calibrated curves that budgets are read off.
        kind: `budget` searches error budgets, `raw` the thresholds simthreshd1 and cdfthreshd themselves.
        granularity: one budget (or pair of thresholds) for all layers, for each of three groups, or for each layer.
        orders: token orders to choose from; must be calibrated ones.
        rules: mask rules to choose from, `cdf` or `topk`; budgets only.
    """

    curves: Curves
    kind: Kind = "budget"
    granularity: Granularity = "group"
    orders: tuple[str, ...] = ("raster",)
    rules: tuple[str, ...] = ("cdf",)

    def suggest(self, trial: optuna.Trial) -> dict[str, Parameter]:
        """Ask the sampler for a trial's parameters."""
        params: dict[str, Parameter] = {}
        for group in self._groups():
            if self.kind == "budget":
                params[f"l1_{group}"] = trial.suggest_float(f"l1_{group}", *BUDGETS, log=True)
            else:
                params[f"simthreshd1_{group}"] = trial.suggest_float(f"simthreshd1_{group}", -1.0, 1.0)
                params[f"cdfthreshd_{group}"] = trial.suggest_float(f"cdfthreshd_{group}", 0.3, 1.0)
        low, high, step = DENSE_FRACTIONS
        params["dense_fraction"] = trial.suggest_float("dense_fraction", low, high, step=step)
        params["order"] = trial.suggest_categorical("order", self.orders)
        if self.kind == "budget":
            params["rule"] = trial.suggest_categorical("rule", self.rules)
            params[THRESHOLDS] = trial.user_attrs.get(THRESHOLDS, CALIBRATED)
        return params

    def warm_start(self) -> list[Start]:
        """List the trials to try first: SpargeAttn's defaults, then sensible settings of the space.

        Calibrated ones run in the order that the curves find best at a middle budget. The default thresholds stand
        at the lowest budget for the sampler, which their error is nearest to.
        """
        if self.kind == "raw":
            first: dict[str, Parameter] = {"dense_fraction": 0.0, "order": self.orders[0]}
            default = self._everywhere(SPARGE_DEFAULTS.simthreshd1, SPARGE_DEFAULTS.cdfthreshd)
            tight = self._everywhere(-1.0, 0.98)
            return [Start(first | default), Start(first | tight | {"dense_fraction": 0.2})]
        default = self.at(BUDGETS[0]).params | {"order": self.orders[0]}
        return [Start(default, DEFAULT), *(self.at(budget, dense) for budget, dense in _STARTS)]

    def at(self, budget: float, dense_fraction: float = 0.0) -> Start:
        """Give the trial with one budget for all layers, in the order that the curves find best."""
        rest: dict[str, Parameter] = {"dense_fraction": dense_fraction, "order": self._order, "rule": self.rules[0]}
        return Start(self._everywhere(budget) | rest)

    def is_at(self, params: Mapping[str, Parameter]) -> float | None:
        """Give the budget of a trial that is `at` one without dense steps; None for any other trial."""
        if self.kind == "raw" or params.get(THRESHOLDS) != CALIBRATED:
            return None
        budget = float(params[f"l1_{self._groups()[0]}"])
        start = self.at(budget).params | {THRESHOLDS: CALIBRATED}
        return budget if all(params.get(name) == value for name, value in start.items()) else None

    def policy(self, params: Mapping[str, Parameter]) -> Policy:
        """Build the policy that a trial's parameters mean."""
        order, dense_fraction = str(params["order"]), float(params["dense_fraction"])
        if params.get(THRESHOLDS) == DEFAULT:
            return Policy.uniform(self.curves.layers, schedule=DenseSchedule(dense_fraction), order=order)
        groups = self._groups()
        of_layer = [groups[index * len(groups) // len(self.curves.layers)] for index in range(len(self.curves.layers))]
        if self.kind == "budget":
            budgets = [float(params[f"l1_{group}"]) for group in of_layer]
            rule: Literal["cdf", "topk"] = "topk" if params["rule"] == "topk" else "cdf"
            return self.curves.policy(budgets, order=order, rule=rule, dense_fraction=dense_fraction)
        layers = tuple(
            LayerThresholds.uniform(
                name,
                num_heads,
                HeadThresholds(float(params[f"simthreshd1_{group}"]), float(params[f"cdfthreshd_{group}"])),
            )
            for (name, num_heads), group in zip(self.curves.layers, of_layer, strict=True)
        )
        return Policy(layers, DenseSchedule(dense_fraction), order, self.curves.keep_text)

    @functools.cached_property
    def _order(self) -> str:
        return best_order(self.curves, self.orders)

    def _groups(self) -> list[str]:
        num_layers = len(self.curves.layers)
        count = {"global": 1, "group": min(NUM_GROUPS, num_layers), "layer": num_layers}[self.granularity]
        return ["all"] if count == 1 else [f"{index:02d}" for index in range(count)]

    def _everywhere(self, first: float, cdfthreshd: float | None = None) -> dict[str, Parameter]:
        if self.kind == "budget":
            return {f"l1_{group}": first for group in self._groups()}
        params: dict[str, Parameter] = {}
        for group in self._groups():
            params |= {f"simthreshd1_{group}": first, f"cdfthreshd_{group}": cdfthreshd or 1.0}
        return params


def best_order(curves: Curves, orders: Sequence[str], budget: float = 0.1) -> str:
    """Pick the token order that gives the most sparsity at the same error, averaged over layers and heads."""

    def sparsity(order: str) -> float:
        policy = curves.policy(budget, order=order)
        place = {point: index for index, point in enumerate(curves.points)}
        table = curves.sparsity[curves.orders.index(order)].mean(axis=1)  # (layers, heads, points)
        found = [
            float(table[index, head, place[thresholds]]) if thresholds.is_sparse else 0.0
            for index, layer in enumerate(policy.layers)
            for head, thresholds in enumerate(layer.heads)
        ]
        return sum(found) / len(found)

    return max(orders, key=sparsity)
