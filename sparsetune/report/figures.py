"""The figures of a report, in the order in which it shows them."""

from sparsetune.report.charts import Chart
from sparsetune.report.search import calibration, history, importances, pareto
from sparsetune.report.source import Source
from sparsetune.report.sparsity import by_head, by_step, frames, ladder, thresholds
from sparsetune.report.timing import phases
from sparsetune.report.words import Words


def figures(source: Source, words: Words) -> tuple[Chart, ...]:
    """Describe every figure that there are data for.

    Args:
        source: what is told of.
        words: titles and alternative texts are in their language; the figures are the same.
    """
    found: list[Chart | None] = []
    if source.evaluation is not None:
        result = source.evaluation
        found += [frames(result, words), by_step(result, words), by_head(result, words)]
        found += [*thresholds(result, source.before, words)]
    if source.tuning is not None:
        record = source.tuning
        found += [make(record, words) for make in (pareto, history, importances, calibration)]
    if source.evaluation is not None:
        found.append(ladder(source.evaluation, words))
    found.append(phases(source, words))
    return tuple(chart for chart in found if chart is not None)
