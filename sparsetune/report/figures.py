"""Figures of a report, in display order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparsetune.config.files import flatten
from sparsetune.evaluation.ladder import attribute
from sparsetune.evaluation.result import EvaluationResult, LayerSection
from sparsetune.report.charts import Axis, Bars, Chart, HeatMap, Number, Plot, Role, Series, extent
from sparsetune.report.source import Source
from sparsetune.report.words import Words
from sparsetune.tuning.record import TrialSection, TuningRecord

_KINDS: tuple[tuple[str, Role], ...] = (("feasible", "main"), ("missed", "second"), ("pruned", "muted"))

Getter = Callable[[TrialSection], Number]


@dataclass(frozen=True)
class Saving:
    """What charts show that a trial saves: the measured speed-up, or the sparsity where none was measured."""

    name: str
    of: Getter

    @classmethod
    def of_trials(cls, trials: Sequence[TrialSection]) -> "Saving":
        """Choose by what the trials have."""
        if any(trial.speedup is not None for trial in trials):
            return cls("speedup", lambda trial: trial.speedup)
        return cls("sparsity", lambda trial: trial.sparsity)

    def axis(self, words: Words) -> Axis:
        """Its axis."""
        return Axis(words(f"axis.{self.name}"), percent=self.name == "sparsity")

    def text(self, value: float) -> str:
        """Format a value."""
        return f"{value:.1%}" if self.name == "sparsity" else f"{value:.2f}×"


def front(trials: Sequence[TrialSection]) -> tuple[TrialSection, ...]:
    """The Pareto front: complete trials that no other beats in both saving and PSNR, the most saving first."""
    saving = Saving.of_trials(trials).of
    complete = [trial for trial in trials if trial.state == "complete" and saving(trial) is not None]
    ranked = sorted(complete, key=lambda trial: (-(saving(trial) or 0.0), -(trial.psnr or 0.0), trial.number))
    found: list[TrialSection] = []
    for trial in ranked:
        if not found or (trial.psnr or 0.0) > (found[-1].psnr or 0.0):
            found.append(trial)
    return tuple(found)


def kind(trial: TrialSection) -> str:
    """`feasible`, `missed` (the gate), `pruned` or `failed`."""
    if trial.state == "complete":
        return "feasible" if trial.feasible else "missed"
    return trial.state


def pareto(record: TuningRecord, words: Words) -> Plot | None:
    saving = Saving.of_trials(record.trials)
    shown = [trial for trial in record.trials if saving.of(trial) is not None and trial.psnr is not None]
    if not shown:
        return None
    best = front(shown)
    line = Series(
        words("search.front"), "third", tuple(map(saving.of, best)), tuple(trial.psnr for trial in best), line=True
    )
    points = _points(record, words, saving.of, lambda trial: trial.psnr)
    gate = _gate(record, extent([saving.of(trial) for trial in shown]), words)
    return Plot(
        "pareto_front",
        words(f"pareto.title_{saving.name}"),
        words(f"pareto.alt_{saving.name}", trials=len(shown), front=", ".join(str(trial.number) for trial in best)),
        saving.axis(words),
        Axis(words("axis.psnr")),
        (line, *gate, *points),
    )


def _gate(record: TuningRecord, ends: tuple[float, float], words: Words) -> tuple[Series, ...]:
    """The mean PSNR that trials must exceed, margin included, as a line from end to end."""
    given = flatten(record.config)
    bound, margin = given.get("gate.min_psnr"), given.get("tune.margin_db", 0.0)
    if not isinstance(bound, int | float) or not isinstance(margin, int | float):
        return ()
    return (Series(words("pareto.gate", psnr=f"{bound + margin:g}"), "bad", ends, (bound + margin,) * 2, line=True),)


def history(record: TuningRecord, words: Words) -> Plot | None:
    saving = Saving.of_trials(record.trials)
    if not any(saving.of(trial) is not None for trial in record.trials):
        return None
    best: list[Number] = []
    for trial in record.trials:
        so_far = best[-1] if best else None
        better = trial.feasible and (so_far is None or (saving.of(trial) or 0.0) > so_far)
        best.append(saving.of(trial) if better else so_far)
    numbers = tuple(trial.number for trial in record.trials)
    line = Series(words("search.best_so_far"), "third", numbers, tuple(best), line=True, step=True)
    points = _points(record, words, lambda trial: trial.number, saving.of)
    high = extent(best)[1]
    return Plot(
        "search_history",
        words("history.title"),
        words(f"history.alt_{saving.name}", trials=len(numbers), best=saving.text(high)),
        Axis(words("axis.trial"), whole=True),
        saving.axis(words),
        (line, *points),
    )


def importances(record: TuningRecord, words: Words) -> Bars | None:
    if record.insight is None or len(record.insight.importances) < 2:  # one parameter has all of it
        return None
    ranked = sorted(record.insight.importances.items(), key=lambda share: -share[1])
    return Bars(
        "importances",
        words("importances.title"),
        words("importances.alt", shares=", ".join(f"{name} {share:.0%}" for name, share in ranked[:5])),
        Axis(words("axis.importance"), percent=True),
        tuple(name for name, _ in ranked),
        ((words("axis.importance"), "main", tuple(share for _, share in ranked)),),
    )


def calibration(record: TuningRecord, words: Words) -> Plot | None:
    shown = [trial for trial in record.trials if trial.predicted_error and trial.psnr is not None]
    if not shown:
        return None
    points = _points(record, words, lambda trial: trial.predicted_error or None, lambda trial: trial.psnr)
    rho = record.insight.rank_correlation if record.insight is not None else None
    return Plot(
        "calibration_against_psnr",
        words("calibration.title"),
        words("calibration.alt", trials=len(shown))
        + ("" if rho is None else words("calibration.correlation", rho=f"{rho:.2f}")),
        Axis(words("axis.predicted_error"), log=True),
        Axis(words("axis.psnr")),
        points,
    )


def _points(record: TuningRecord, words: Words, x: Getter, y: Getter) -> tuple[Series, ...]:
    both = [trial for trial in record.trials if x(trial) is not None and y(trial) is not None]
    groups = [(key, role, [t for t in both if kind(t) == key and t.number != record.best]) for key, role in _KINDS]
    groups.append(("winner", "best", [trial for trial in both if trial.number == record.best]))
    return tuple(
        Series(
            words(f"search.{key}"),
            role,
            tuple(x(trial) for trial in group),
            tuple(y(trial) for trial in group),
            ids=tuple(trial.number for trial in group),
            notes=tuple(words("search.trial", number=trial.number) for trial in group),
        )
        for key, role, group in groups
        if group
    )


def frames(result: EvaluationResult, words: Words) -> Plot | None:
    known = [row for row in result.detailed_results if row.psnr_per_frame]
    if not known:
        return None
    worst = min(known, key=lambda row: min(row.psnr_per_frame or (0.0,)))
    values, name = worst.psnr_per_frame or (), words("frames.prompt", index=worst.index + 1)
    at = values.index(min(values))
    others = [row for row in known if row is not worst]
    series = [_line(row.psnr_per_frame or (), words("frames.others"), "muted") for row in others]
    series.append(_line(values, name, "main"))
    series.append(Series(words("frames.worst"), "bad", (at,), (values[at],)))
    return Plot(
        "frame_psnr",
        words("frames.title"),
        words("frames.alt", prompts=len(known), index=worst.index + 1, frame=at, psnr=f"{values[at]:.2f}"),
        Axis(words("axis.frame"), whole=True),
        Axis(words("axis.psnr_frame")),
        tuple(series),
    )


def thresholds(result: EvaluationResult, before: EvaluationResult | None, words: Words) -> list[Plot]:
    """Mean of each threshold by layer, before and after; constant thresholds have no figure."""
    sides = [("before", before.thresholds if before else ()), ("after", result.thresholds)]
    plots = []
    for threshold in ("cdfthreshd", "topk", "simthreshd1", "pvthreshd"):
        columns = {side: _column(layers, threshold) for side, layers in sides}
        known = {value for column in columns.values() for value in column if value is not None}
        if len(known) > 1:
            plots.append(_threshold_plot(threshold, columns, result.thresholds, words))
    return plots


def ladder(result: EvaluationResult, words: Words) -> Bars | None:
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


def _line(values: tuple[Number, ...], name: str, role: Role) -> Series:
    return Series(name, role, tuple(range(len(values))), values, line=True)


def _heat_map(axis: str, first: int, rows: dict[str, tuple[float, ...]], words: Words) -> HeatMap | None:
    if not any(any(row) for row in rows.values()):  # a policy that is dense but for its cache
        return None
    width = max(len(row) for row in rows.values())
    values: list[tuple[Number, ...]] = [(*row, *[None] * (width - len(row))) for row in rows.values()]
    low, high = extent([value for row in values for value in row])
    layer, column = next((i, row.index(high)) for i, row in enumerate(values) if high in row)
    return HeatMap(
        f"sparsity_by_layer_and_{axis}",
        words(f"heat.{axis}.title"),
        words(
            f"heat.{axis}.alt", layers=len(values), columns=width, low=f"{low:.1%}", high=f"{high:.1%}", layer=layer,
            column=column + first,
        ),
        Axis(words(f"axis.{axis}"), labels=tuple(str(index + first) for index in range(width))),
        Axis(words("axis.layer"), labels=tuple(str(index) for index in range(len(values)))),
        tuple(values),
    )  # fmt: skip


def timeline(result: EvaluationResult, words: Words) -> Plot | None:
    """What ran in each denoising step; None without a step cache, where the heat map by step tells it."""
    part = result.sparsity
    if result.config.policy.cache is None or not part.blocks_run_by_step:
        return None
    steps = tuple(range(1, len(part.by_step) + 1))
    computed = tuple(1.0 - left_out for left_out in part.by_step)
    skipping = ", ".join(str(step) for step, share in enumerate(part.blocks_run_by_step, 1) if share < 1.0)
    return Plot(
        "timeline",
        words("timeline.title"),
        words("timeline.alt", cache=result.config.policy.cache, steps=len(computed), skipping=skipping or "–"),
        Axis(words("axis.step"), whole=True),
        Axis(words("axis.share"), percent=True),
        (
            Series(words("timeline.blocks"), "muted", steps, part.blocks_run_by_step, line=True),
            Series(words("timeline.attention"), "main", steps, computed, line=True),
        ),
    )


def _column(layers: Sequence[LayerSection], threshold: str) -> tuple[Number, ...]:
    values: tuple[Number, ...] = tuple(getattr(layer, threshold) for layer in layers)
    return values if any(value is not None for value in values) else ()


def _threshold_plot(
    threshold: str, columns: dict[str, tuple[Number, ...]], layers: Sequence[LayerSection], words: Words
) -> Plot:
    roles: dict[str, Role] = {"before": "muted", "after": "main"}
    drawn = {side: column for side, column in columns.items() if column}
    names = {side: words(f"side.{side}" if columns["before"] else "side.only") for side in drawn}
    series = tuple(_line(column, names[side], roles[side]) for side, column in drawn.items())
    ranges = {side: [f"{end:.3g}" for end in extent(column)] for side, column in drawn.items()}
    parts = [words("thresholds.range", side=names[side], low=low, high=high) for side, (low, high) in ranges.items()]
    return Plot(
        f"thresholds_{threshold}",
        words("thresholds.title", threshold=threshold),
        words("thresholds.alt", threshold=threshold, layers=len(layers), ranges="; ".join(parts)),
        Axis(words("axis.layer"), labels=tuple(str(index) for index in range(len(layers)))),
        Axis(words("thresholds.axis", threshold=threshold)),
        series,
    )


def phases(source: Source, words: Words) -> Bars | None:
    seconds = source.tuning.seconds_by_phase if source.tuning is not None else _of_evaluation(source.evaluation)
    seconds = {phase: value for phase, value in seconds.items() if value > 0.0}
    if not seconds:
        return None
    unit, scale = ("min", 60.0) if sum(seconds.values()) >= 300.0 else ("s", 1.0)
    names = {phase: words.known(f"phase.{phase}", phase) for phase in seconds}
    described = ", ".join(f"{names[phase]} {value / scale:.1f} {unit}" for phase, value in seconds.items())
    return Bars(
        "time_by_phase",
        words("phases.title"),
        words("phases.alt", phases=described),
        Axis(words("axis.time", unit=unit)),
        tuple(names.values()),
        ((words("phases.title"), "main", tuple(value / scale for value in seconds.values())),),
    )


def _of_evaluation(result: EvaluationResult | None) -> dict[str, float]:
    if result is None:
        return {}
    rendering = result.environment.seconds_generation
    return {"rendering": rendering, "metrics": max(0.0, result.environment.seconds_total - rendering)}


def figures(source: Source, words: Words) -> tuple[Chart, ...]:
    """Every figure that there is data for, with titles and alternative texts in the language of `words`."""
    found: list[Chart | None] = []
    if (result := source.evaluation) is not None:
        found += [frames(result, words), timeline(result, words)]
        for axis, first, rows in (("step", 1, result.sparsity.by_layer_and_step), ("head", 0, result.sparsity.by_head)):
            found.append(_heat_map(axis, first, rows, words))
        found += thresholds(result, source.before, words)
    if source.tuning is not None:
        found += [make(source.tuning, words) for make in (pareto, history, importances, calibration)]
    if result is not None:
        found.append(ladder(result, words))
    found.append(phases(source, words))
    return tuple(chart for chart in found if chart is not None)
