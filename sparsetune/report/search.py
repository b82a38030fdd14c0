"""Figures of a search: its front, its history, what mattered, and whether calibration told the truth."""

from collections.abc import Callable, Sequence

from sparsetune.report.charts import Axis, Bars, Number, Plot, Role, Series, extent
from sparsetune.report.words import Words
from sparsetune.tuning.record import TrialSection, TuningRecord

_KINDS: tuple[tuple[str, Role], ...] = (("feasible", "main"), ("missed", "second"), ("pruned", "muted"))

Figure = Callable[[TrialSection], Number]


def front(trials: Sequence[TrialSection]) -> tuple[TrialSection, ...]:
    """Give the complete trials that no other beats in both sparsity and PSNR, sparsest first."""
    complete = [trial for trial in trials if trial.state == "complete" and trial.sparsity is not None]
    ranked = sorted(complete, key=lambda trial: (-(trial.sparsity or 0.0), -(trial.psnr or 0.0), trial.number))
    found: list[TrialSection] = []
    for trial in ranked:
        if not found or (trial.psnr or 0.0) > (found[-1].psnr or 0.0):
            found.append(trial)
    return tuple(found)


def kind(trial: TrialSection) -> str:
    """Tell a trial's kind: `feasible`, `missed` (the gate), `pruned` or `failed`."""
    if trial.state == "complete":
        return "feasible" if trial.feasible else "missed"
    return trial.state


def pareto(record: TuningRecord, words: Words) -> Plot | None:
    """Sparsity against PSNR, a point a trial, with the front's line."""
    shown = [trial for trial in record.trials if trial.sparsity is not None and trial.psnr is not None]
    if not shown:
        return None
    best = front(shown)
    line = Series(
        words("search.front"), "third", tuple(trial.sparsity for trial in best), tuple(trial.psnr for trial in best),
        line=True,
    )  # fmt: skip
    points = _points(record, words, lambda trial: trial.sparsity, lambda trial: trial.psnr)
    return Plot(
        "pareto_front",
        words("pareto.title"),
        words("pareto.alt", trials=len(shown), front=", ".join(str(trial.number) for trial in best)),
        Axis(words("axis.sparsity"), percent=True),
        Axis(words("axis.psnr")),
        (line, *points),
    )


def history(record: TuningRecord, words: Words) -> Plot | None:
    """Sparsity by trial, with the best that met the gate so far."""
    if not any(trial.sparsity is not None for trial in record.trials):
        return None
    best: list[Number] = []
    for trial in record.trials:
        so_far = best[-1] if best else None
        better = trial.feasible and (so_far is None or (trial.sparsity or 0.0) > so_far)
        best.append(trial.sparsity if better else so_far)
    numbers = tuple(trial.number for trial in record.trials)
    line = Series(words("search.best_so_far"), "third", numbers, tuple(best), line=True, step=True)
    points = _points(record, words, lambda trial: trial.number, lambda trial: trial.sparsity)
    high = extent(best)[1]
    return Plot(
        "search_history",
        words("history.title"),
        words("history.alt", trials=len(numbers), best=f"{high:.1%}"),
        Axis(words("axis.trial")),
        Axis(words("axis.sparsity"), percent=True),
        (line, *points),
    )


def importances(record: TuningRecord, words: Words) -> Bars | None:
    """What set the best trials apart."""
    if record.insight is None or not record.insight.importances:
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
    """What calibration expected of each trial's policy, against its videos' PSNR."""
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


def _points(record: TuningRecord, words: Words, x: Figure, y: Figure) -> tuple[Series, ...]:
    """Give the trials that have both figures, a series a kind, the winner last and on top."""
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
