"""Each head's thresholds at a bound, searched on the tune prompts and kept on disk."""

from pathlib import Path
from typing import Any

from sparsetune.attention.policy import Policy
from sparsetune.tuning.calibration.bounded_policy import Bounds, starting_policy
from sparsetune.tuning.calibration.curves import Curves
from sparsetune.tuning.calibration.refine import Limits, RefinePrompt
from sparsetune.tuning.context import TuningContext, calibration_signature, digest
from sparsetune.tuning.prepare import sampled_steps
from sparsetune.tuning.shared_files import measured

_SEARCH = 1
"""Raised whenever a search comes to other limits than before."""


def refined_policy(bench: TuningContext, curves: Curves) -> Policy:
    """Search the sparsest policy with every head's error within `tune.l1` and `tune.pv_l1`, as far as no run has.

    The curves give each head's simthreshd1 and token order. Then each prompt is rendered dense once more,
    and the lowest cut and `pvthreshd` that hold the bounds with the real kernel are searched at the sampled steps.

    Args:
        bench: what the search works with.
        curves: the calibration of its prompts.

    Raises:
        TuningError: nothing could be measured, or a file of an earlier run is damaged.
        TimeIsUp: `tune.max_minutes` ended first; what was searched is kept.
    """
    config, start = bench.config, start_of(bench, curves)
    tasks = {
        str(index): RefinePrompt(
            prompt=prompt,
            seed=config.tune.seed,
            start=start,
            bounds=Bounds(config.tune.l1, config.tune.pv_l1),
            steps=sampled_steps(bench),
            backend=config.backend,
        )
        for index, prompt in enumerate(bench.prompts)
    }
    limits = measured(
        bench,
        limits_path(bench, start),
        Limits.load,
        tasks,
        "refinement",
    )
    return limits.policy(start)


def start_of(bench: TuningContext, curves: Curves) -> Policy:
    """Give what a bench's limits are searched at."""
    tune = bench.config.tune
    return starting_policy(curves, tune.l1, orders=tune.orders, keep_text=bench.keep_text[0], rule=tune.rules[0])


def limits_path(bench: TuningContext, start: Policy) -> Path:
    """Say where the limits that were searched at `start` are kept."""
    folder = bench.config.tracking.root / "calibrations" / "limits"
    return folder / f"{digest(_signature(bench, start))}.npz"


def _signature(bench: TuningContext, start: Policy) -> dict[str, Any]:
    """Name all that decides the limits, as JSON values."""
    tune = bench.config.tune
    return calibration_signature(bench) | {
        "search": _SEARCH,
        "l1": tune.l1,
        "pv_l1": tune.pv_l1,
        "start": [
            [layer.name, order, layer.rule, [head.simthreshd1 for head in layer.heads]]
            for layer, order in zip(start.layers, start.orders, strict=True)
        ],
        "keep_text": start.keep_text,
    }
