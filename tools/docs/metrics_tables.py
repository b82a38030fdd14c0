"""Tables of the registered metrics and of the score."""

import math
from collections.abc import Sequence

from sparsetune import metrics
from sparsetune.config import DEFAULT_METRICS
from sparsetune.metrics.score import COSINE_POINTS, L1_POINTS, PSNR_POINTS, VERDICTS


def metrics_table() -> str:
    """Return a table of all registered metrics with their definitions, the default ones first."""
    lines = ["| metric | range | better | definition | source |", "| --- | --- | --- | --- | --- |"]
    for name in dict.fromkeys((*DEFAULT_METRICS, *metrics.names())):
        one = metrics.get(name)
        low, high = (_end(value) for value in one.range)
        span = f"{low} to {high}" + (f" {one.unit}" if one.unit else "")
        better = "higher" if one.higher_is_better else "lower"
        cells = (f"`{name}`", span, better, one.definition.replace("|", "\\|"), one.source)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def score_tables() -> str:
    """Return tables of the points for each mean and of the verdicts."""
    lines = ["| mean | points |", "| --- | --- |"]
    for name, sign, unit, steps in (
        ("frame_cosine", ">", "", COSINE_POINTS),
        ("psnr", ">", " dB", PSNR_POINTS),
        ("frame_l1", "<", "", L1_POINTS),
    ):
        lines.append(f"| `{name}` | {_steps(sign, unit, steps)}, otherwise 0 |")
    verdicts = ", ".join(f"from {lowest} **{word}**" for lowest, word in VERDICTS)
    return "\n".join([*lines, "", f"Out of 100 points: {verdicts}, otherwise **degraded**. All bounds are strict."])


def _steps(sign: str, unit: str, steps: Sequence[tuple[float, int]]) -> str:
    return ", ".join(f"{sign} {bound:g}{unit}: {points}" for bound, points in steps)


def _end(value: float) -> str:
    return f"{value:g}" if math.isfinite(value) else ("∞" if value > 0 else "−∞")
