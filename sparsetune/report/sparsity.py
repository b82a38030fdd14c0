"""Figures of one evaluation: its frames, where attention was left out, by which thresholds, and whose the error is."""

from collections.abc import Sequence

from sparsetune.evaluation.ladder import attribute
from sparsetune.evaluation.result import EvaluationResult, LayerSection, PromptRow
from sparsetune.report.charts import Axis, Bars, HeatMap, Number, Plot, Role, Series, extent
from sparsetune.report.words import Words

_THRESHOLDS = ("cdfthreshd", "topk", "simthreshd1", "pvthreshd")


def frames(result: EvaluationResult, words: Words) -> Plot | None:
    """Every prompt's PSNR frame by frame, the worst prompt set apart and its worst frame marked."""
    known = [row for row in result.detailed_results if row.psnr_per_frame]
    if not known:
        return None
    worst = min(known, key=_lowest)
    values, name = worst.psnr_per_frame or (), words("frames.prompt", index=worst.index)
    at = values.index(min(values))
    others = [row for row in known if row is not worst]
    series = [_frame_series(row, words("frames.others"), "muted") for row in others]
    series.append(_frame_series(worst, name, "main"))
    series.append(Series(words("frames.worst"), "bad", (at,), (values[at],)))
    return Plot(
        "frame_psnr",
        words("frames.title"),
        words("frames.alt", prompts=len(known), index=worst.index, frame=at, psnr=f"{values[at]:.2f}"),
        Axis(words("axis.frame")),
        Axis(words("axis.psnr_frame")),
        tuple(series),
    )


def by_step(result: EvaluationResult, words: Words) -> HeatMap | None:
    """Sparsity of each layer at each denoising step."""
    rows = result.sparsity.by_layer_and_step
    return _heat_map("sparsity_by_layer_and_step", "heat.step", "axis.step", 1, rows, words)


def by_head(result: EvaluationResult, words: Words) -> HeatMap | None:
    """Sparsity of each head of each layer; None where the kernel doesn't tell heads apart."""
    return _heat_map("sparsity_by_layer_and_head", "heat.head", "axis.head", 0, result.sparsity.by_head, words)


def thresholds(result: EvaluationResult, before: EvaluationResult | None, words: Words) -> list[Plot]:
    """The mean of each threshold by layer, before and after; one that is the same everywhere has no figure."""
    sides = [("before", before.thresholds if before else ()), ("after", result.thresholds)]
    plots = []
    for threshold in _THRESHOLDS:
        columns = {side: _column(layers, threshold) for side, layers in sides}
        known = {value for column in columns.values() for value in column if value is not None}
        if len(known) > 1:
            plots.append(_threshold_plot(threshold, columns, result.thresholds, words))
    return plots


def ladder(result: EvaluationResult, words: Words) -> Bars | None:
    """The squared error, stacked by whose doing it is; None where no ladder was measured or there is no error."""
    found = attribute(result.detailed_results)
    if found is None or found.shares is None:
        return None
    rungs: tuple[tuple[str, Role], ...] = (("dense_again", "muted"), ("kernel", "second"), ("policy", "main"))
    shares = {rung: f"{share:.1%}" for rung, share in found.shares.items()}
    return Bars(
        "error_attribution",
        words("ladder.title"),
        words("ladder.alt", **shares),
        Axis(words("axis.error_share"), percent=True),
        (words("ladder.bar"),),
        tuple((words(f"ladder.{rung}"), role, (found.shares[rung],)) for rung, role in rungs),
    )


def _lowest(row: PromptRow) -> float:
    return min(row.psnr_per_frame or (0.0,))


def _frame_series(row: PromptRow, name: str, role: Role) -> Series:
    values = row.psnr_per_frame or ()
    return Series(name, role, tuple(range(len(values))), values, line=True)


def _heat_map(
    name: str, key: str, x_axis: str, first: int, rows: dict[str, tuple[float, ...]], words: Words
) -> HeatMap | None:
    if not rows or not any(rows.values()):
        return None
    width = max(len(row) for row in rows.values())
    values: list[tuple[Number, ...]] = [(*row, *[None] * (width - len(row))) for row in rows.values()]
    low, high = extent([value for row in values for value in row])
    layer, column = next((i, row.index(high)) for i, row in enumerate(values) if high in row)
    return HeatMap(
        name,
        words(f"{key}.title"),
        words(
            f"{key}.alt", layers=len(values), columns=width, low=f"{low:.1%}", high=f"{high:.1%}", layer=layer,
            column=column + first,
        ),
        Axis(words(x_axis), labels=tuple(str(index + first) for index in range(width))),
        Axis(words("axis.layer"), labels=tuple(str(index) for index in range(len(values)))),
        tuple(values),
    )  # fmt: skip


def _column(layers: Sequence[LayerSection], threshold: str) -> tuple[Number, ...]:
    values: tuple[Number, ...] = tuple(getattr(layer, threshold) for layer in layers)
    return values if any(value is not None for value in values) else ()


def _threshold_plot(
    threshold: str, columns: dict[str, tuple[Number, ...]], layers: Sequence[LayerSection], words: Words
) -> Plot:
    roles: dict[str, Role] = {"before": "muted", "after": "main"}
    drawn = {side: column for side, column in columns.items() if column}
    names = {side: words(f"side.{side}" if columns["before"] else "side.only") for side in drawn}
    series = tuple(
        Series(names[side], roles[side], tuple(range(len(column))), column, line=True) for side, column in drawn.items()
    )
    parts = []
    for side, column in drawn.items():
        low, high = extent(column)
        parts.append(words("thresholds.range", side=names[side], low=f"{low:.3g}", high=f"{high:.3g}"))
    return Plot(
        f"thresholds_{threshold}",
        words("thresholds.title", threshold=threshold),
        words("thresholds.alt", threshold=threshold, layers=len(layers), ranges="; ".join(parts)),
        Axis(words("axis.layer"), labels=tuple(str(index) for index in range(len(layers)))),
        Axis(words("thresholds.axis", threshold=threshold)),
        series,
    )
