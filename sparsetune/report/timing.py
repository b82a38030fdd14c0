"""The figure of where the time went."""

from sparsetune.evaluation.result import EvaluationResult
from sparsetune.report.charts import Axis, Bars
from sparsetune.report.source import Source
from sparsetune.report.words import Words


def phases(source: Source, words: Words) -> Bars | None:
    """Minutes of each phase: a search's, or rendering and the rest of an evaluation."""
    seconds = source.tuning.seconds_by_phase if source.tuning is not None else _of_evaluation(source.evaluation)
    seconds = {phase: value for phase, value in seconds.items() if value > 0.0}
    if not seconds:
        return None
    unit, scale = ("min", 60.0) if sum(seconds.values()) >= 300.0 else ("s", 1.0)
    names = {phase: words.known(f"phase.{phase}", phase) for phase in seconds}
    told = ", ".join(f"{names[phase]} {value / scale:.1f} {unit}" for phase, value in seconds.items())
    return Bars(
        "time_by_phase",
        words("phases.title"),
        words("phases.alt", phases=told),
        Axis(words("axis.time", unit=unit)),
        tuple(names.values()),
        ((words("phases.title"), "main", tuple(value / scale for value in seconds.values())),),
    )


def _of_evaluation(result: EvaluationResult | None) -> dict[str, float]:
    if result is None:
        return {}
    rendering = result.environment.seconds_generation
    return {"rendering": rendering, "metrics": max(0.0, result.environment.seconds_total - rendering)}
