"""Summaries of results for a terminal, in the language of a report: lines of text, and tables."""

from collections.abc import Sequence

from sparsetune.evaluation.compare import Comparison
from sparsetune.evaluation.result import EvaluationResult, MetricStatistics
from sparsetune.report.tables import comparison_rows, gain_notes, gain_table, metric_rows
from sparsetune.report.verdict import conditions
from sparsetune.report.words import Words

TextTable = tuple[Sequence[str], Sequence[Sequence[str]]]
Summary = tuple[str | TextTable, ...]

_MARKS = {"excellent": "✓", "good": "✓", "acceptable": "!", "degraded": "✗", "failed": "✗"}


def evaluation_summary(result: EvaluationResult, words: Words) -> Summary:
    """Statistics of every metric, score, verdict, sparsity and gate."""
    heads = [words(f"summary.{name}") for name in ("metric", "mean", "std", "min", "max")]
    rows = [_statistics_row(name, one, words) for name, one in result.statistics.items()]
    parts: list[str | TextTable] = []
    if result.config.use_tuned and (gain := gain_table(result, words))[1]:
        parts += [words("section.gain"), gain, *gain_notes(result, words), ""]
    score = words("verdict.failed") if result.overall_score is None else f"{result.overall_score}/100"
    if rows:
        parts += [words("summary.statistics"), ([*heads, words("compare.interval")], rows), ""]
    parts += [words("summary.quality"), words("summary.score", score=score)]
    phrase = "" if result.verdict == "failed" else ": " + words(f"phrase.{result.verdict}")
    parts.append(f"{_MARKS[result.verdict]} {words(f'verdict.{result.verdict}')}{phrase}")
    sparsity = result.sparsity
    if sparsity.overall is not None:
        parts.append(words("summary.sparsity", sparsity=f"{sparsity.overall:.1%}"))
    if sparsity.theoretical_speedup is not None:
        parts.append(words("summary.theoretical", speed=f"{sparsity.theoretical_speedup:.2f}×"))
    if result.seconds is not None:
        parts.append(words("summary.measured", speed=f"{result.seconds.speedup:.2f}×"))
    parts.append(words("summary.gate_met" if result.gate.passed else "summary.gate_missed"))
    parts += [f"  {one.name}: {one.text}" for one in conditions(result, words)]
    parts += [words("summary.failed", index=row.index + 1, prompt=row.prompt, error=row.error) for row in result.failed]
    return tuple(parts)


def comparison_summary(comparison: Comparison, words: Words) -> Summary:
    """Both results side by side, and the difference of every metric's mean, paired by prompt."""
    names = ("metric", "before", "after", "difference", "interval", "worst", "better")
    heads = [words(f"compare.{name}") for name in names]
    outcome = (("", words("side.before"), words("side.after")), comparison_rows(comparison, words))
    changes = (heads, metric_rows(comparison))
    notes = (words("compare.star"), words("compare.pairs", pairs=comparison.num_pairs))
    return outcome, "", words("compare.changes"), changes, "", *notes


def _statistics_row(name: str, one: MetricStatistics, words: Words) -> list[str]:
    def text(value: float | None) -> str:
        is_short = one.unit == "dB" or max(abs(one.min), abs(one.max)) >= 10
        return "–" if value is None else f"{value:.{2 if is_short else 6}f}"

    label = words.known(f"metric.{name}", f"{name} ({one.unit})" if one.unit else name)
    interval = "–" if one.ci95_low is None else f"{text(one.ci95_low)} … {text(one.ci95_high)}"
    return [label, *map(text, (one.mean, one.std, one.min, one.max)), interval]
