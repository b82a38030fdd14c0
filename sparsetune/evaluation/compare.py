"""Paired comparison of two evaluations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from sparsetune.errors import MetricError, ResultError
from sparsetune.evaluation.report_markdown import cell, table
from sparsetune.evaluation.result import EvaluationResult, PromptRow, load_result, short_repr
from sparsetune.metrics import PairedDifference, get, holm, interval_caveat, paired_difference
from sparsetune.metrics.statistics import LEVEL


@dataclass(frozen=True)
class Change:
    """Difference of one metric, `sparsity` or `seconds_sparse` between two results; means are over paired prompts.

    `p_corrected` is the difference's p-value after Holm's correction for all changes of the comparison.
    """

    name: str
    unit: str
    higher_is_better: bool | None  # None where neither the result nor the registry knows it
    before: float
    after: float
    difference: PairedDifference
    p_corrected: float | None = None

    @property
    def significant(self) -> bool:
        """Whether it differs from 0; over all changes of a comparison, 5% of those without any difference say so."""
        return self.p_corrected is not None and self.p_corrected < LEVEL


@dataclass(frozen=True)
class EvaluationSummary:
    """Headline numbers of one of the two results."""

    use_tuned: bool
    score: int | None
    verdict: str
    gate_passed: bool
    gate_failures: tuple[str, ...]
    sparsity: float | None
    theoretical_speedup: float | None
    measured_speedup: float | None
    num_failed: int


@dataclass(frozen=True)
class Comparison:
    """Result of `compare`.

    Pairs have the same prompt and seed and numbers in both results; `num_unpaired` prompts of either result, failed
    ones included, have no partner. `notes` are differences that don't forbid the comparison, `forced` those that do.
    """

    before: EvaluationSummary
    after: EvaluationSummary
    changes: tuple[Change, ...]
    num_pairs: int
    num_unpaired: int
    notes: tuple[str, ...]
    forced: tuple[str, ...]

    def __repr__(self) -> str:
        changes = {one.name: f"{one.before:.4g} -> {one.after:.4g}" for one in self.changes}
        return short_repr(self, {"pairs": self.num_pairs, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON value."""
        return {
            "before": vars(self.before) | {"gate_failures": list(self.before.gate_failures)},
            "after": vars(self.after) | {"gate_failures": list(self.after.gate_failures)},
            "num_pairs": self.num_pairs,
            "num_unpaired": self.num_unpaired,
            "changes": {one.name: _without_name(one) for one in self.changes},
            "notes": list(self.notes),
            "not_comparable": list(self.forced),
        }

    def to_markdown(self) -> str:
        """Format as Markdown."""
        sides = {"before": self.before, "after": self.after}
        tuned = ("Tuned", *("yes" if side.use_tuned else "no" for side in sides.values()))
        summary = [tuned, *((_LABELS[key], *texts) for key, *texts in summary_rows(self))]
        changes = [
            (*row[:4], row.interval(" to ") + (" \\*" if row.significant else ""), row.worst, *map(str, row.counts))
            for row in change_rows(self)
        ]
        forced = f"**Not comparable, compared with --force:** {'; '.join(map(cell, self.forced))}"
        parts = [
            "# Before and after",
            forced if self.forced else None,
            table(("", "Before", "After"), summary),
            "\n".join(f"- gate {name}: {cell(one)}" for name, side in sides.items() for one in side.gate_failures),
            f"{self.num_pairs} pairs by prompt and seed; {self.num_unpaired} prompts without a partner or a number.",
            table(_HEADS, changes),
            "A star marks a difference that is significant at 5% over all rows together (Holm's correction).",
            interval_caveat(self.num_pairs),
            *(f"- {cell(note)}" for note in self.notes),
        ]
        return "\n\n".join(part for part in parts if part) + "\n"


def _without_name(change: Change) -> dict[str, Any]:
    values = vars(change) | {"difference": change.difference.to_dict(), "significant": change.significant}
    return {key: value for key, value in values.items() if key != "name"}


_HEADS = ("Metric", "Before", "After", "Difference", "95% interval", "Worst prompt", "Better", "Worse", "Equal")
_LABELS = {
    "score": "Score",
    "verdict": "Verdict",
    "gate": "Gate",
    "measured": "Measured speed-up of the denoising",
    "sparsity": "Sparsity",
    "theoretical": "Theoretical speed-up of attention",
    "failed": "Failed prompts",
}


class ChangeRow(NamedTuple):
    """A `Change` as texts: `low` and `high` bound the mean difference, and are empty for a single pair.

    `worst` is the difference of the prompt that changed most for the worse; `counts` are those better, worse and equal.
    """

    name: str
    before: str
    after: str
    difference: str
    low: str
    high: str
    worst: str
    counts: tuple[int, int, int]
    significant: bool

    def interval(self, to: str, missing: str = "-") -> str:
        """The interval as a text, e.g. "-1.20 to +0.30"."""
        return f"{self.low}{to}{self.high}" if self.low else missing


def summary_rows(
    comparison: Comparison, *, sparsity: str = "{:.1%}", speedup: str = "{:.2f}x", missing: str = "-"
) -> list[tuple[str, str, str]]:
    """Key, before and after of the headline numbers, as texts; the verdict and `met` or `not met` untranslated."""

    def column(side: EvaluationSummary) -> tuple[str, ...]:
        return (
            missing if side.score is None else f"{side.score}/100",
            side.verdict,
            "met" if side.gate_passed else "not met",
            missing if side.measured_speedup is None else speedup.format(side.measured_speedup),
            missing if side.sparsity is None else sparsity.format(side.sparsity),
            missing if side.theoretical_speedup is None else speedup.format(side.theoretical_speedup),
            str(side.num_failed),
        )

    return list(zip(_LABELS, column(comparison.before), column(comparison.after), strict=True))


def change_rows(comparison: Comparison, decimals: int = 4) -> list[ChangeRow]:
    """Format every change: two decimals for dB and from 10 on, otherwise `decimals`."""
    rows = []
    for one in comparison.changes:
        pairs, short = one.difference, one.unit == "dB" or max(abs(one.before), abs(one.after)) >= 10
        places = 2 if short else decimals
        before, after = (f"{value:.{places}f}" for value in (one.before, one.after))
        mean, low, high, worst = (
            "" if value is None else f"{value:+.{places}f}"
            for value in (pairs.mean, pairs.ci95_low, pairs.ci95_high, pairs.worst)
        )
        counts = (pairs.better, pairs.worse, pairs.equal)
        name = f"{one.name} ({one.unit})" if one.unit else one.name
        rows.append(ChangeRow(name, before, after, mean, low, high, worst, counts, one.significant))
    return rows


_DECIDING = (
    "short_name",
    "model.fingerprint",
    "model.revision",
    "model.pipeline_class",
    "height",
    "width",
    "num_frames",
    "num_inference_steps",
    "guidance_scale",
    "guidance_scale_2",
    "sigmas",
    "negative_prompt",
    "max_sequence_length",
    "scheduler",
    "dtype",
    "vae_tiling",
    "seed",
    "num_prompts",
    "prompts_hash",
)
"""Configuration that both results must share, because it decides the dense videos."""
_NOTED = ("device", "backend", "compile")  # may differ, with a note
_ALWAYS = ("sparsity", "seconds_sparse")


def compare(
    before: EvaluationResult | Path | str, after: EvaluationResult | Path | str, *, force: bool = False
) -> Comparison:
    """Compare two results, each given itself, as its JSON file or as a folder that holds one.

    Results that aren't comparable are compared only with `force`, over the prompts that both have.

    Raises:
        ResultError: a result can't be read, they aren't comparable (each difference is listed), or share no prompt.
    """
    first, second = (given if isinstance(given, EvaluationResult) else load_result(given) for given in (before, after))
    differing = _differences(first, second, _DECIDING)
    if differing and not force:
        raise ResultError(
            f"results are not comparable, they differ in {'; '.join(differing)}; "
            "evaluate both with the same settings, or use --force"
        )
    pairs = [(_metrics(one), _metrics(other)) for one, other in paired_rows(first, second)]
    if not pairs:
        raise ResultError("the results share no prompt and seed that rendered in both")
    total = len(first.detailed_results) + len(second.detailed_results)
    names = dict.fromkeys(name for one, other in pairs for name in one if name in other)
    changes = [_change(name, pairs, first) for name in names]
    corrected = holm([change.difference.p_value for change in changes])
    return Comparison(
        before=_summary(first),
        after=_summary(second),
        changes=tuple(replace(one, p_corrected=p) for one, p in zip(changes, corrected, strict=True)),
        num_pairs=len(pairs),
        num_unpaired=total - 2 * len(pairs),
        notes=_notes(first, second),
        forced=tuple(differing),
    )


def _differences(first: EvaluationResult, second: EvaluationResult, names: Sequence[str]) -> list[str]:
    found = []
    for name in names:
        one, other = first.config, second.config
        for part in name.split("."):
            one, other = getattr(one, part), getattr(other, part)
        if one != other:
            found.append(f"{name} ({_short(one)} and {_short(other)})")
    return found


def _short(value: object) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 40 else f"{text[:18]}...{text[-6:]}"


def paired_rows(before: EvaluationResult, after: EvaluationResult) -> list[tuple[PromptRow, PromptRow]]:
    """Pair the rows of two results that have the same prompt and seed and rendered in both."""
    waiting: dict[tuple[str, int], list[PromptRow]] = {}
    for row in after.detailed_results:
        if row.error is None:
            waiting.setdefault((row.prompt, row.seed), []).append(row)
    pairs = []
    for row in before.detailed_results:
        partners = waiting.get((row.prompt, row.seed), [])
        if row.error is None and partners:
            pairs.append((row, partners.pop(0)))  # repeated prompts in order
    return pairs


def _metrics(row: PromptRow) -> dict[str, float]:
    always = {name: getattr(row, name) for name in _ALWAYS}
    return row.metrics | {name: value for name, value in always.items() if value is not None}


def _change(
    name: str, pairs: Sequence[tuple[Mapping[str, float], Mapping[str, float]]], first: EvaluationResult
) -> Change:
    unit, higher = _direction(name, first)
    both = [(one[name], other[name]) for one, other in pairs if name in one and name in other]
    before, after = [one for one, _ in both], [other for _, other in both]
    difference = paired_difference(before, after, higher_is_better=higher is not False)
    return Change(name, unit, higher, sum(before) / len(before), sum(after) / len(after), difference)


def _direction(name: str, result: EvaluationResult) -> tuple[str, bool | None]:
    """Unit and direction of a metric, from the result first: a user's metric need not be registered here."""
    if name == "sparsity":
        return "", True
    if name == "seconds_sparse":
        return "s", False
    recorded = result.statistics.get(name)
    if recorded is not None and recorded.higher_is_better is not None:
        return recorded.unit, recorded.higher_is_better
    try:
        metric = get(name)
    except MetricError:
        return "", None
    return metric.unit, metric.higher_is_better


def _notes(first: EvaluationResult, second: EvaluationResult) -> tuple[str, ...]:
    notes = [f"{difference} differ" for difference in _differences(first, second, _NOTED)]
    versions = (first.environment.versions, second.environment.versions)
    changed = [
        f"{name} {versions[0].get(name, 'none')} and {versions[1].get(name, 'none')}"
        for name in sorted(versions[0] | versions[1])
        if versions[0].get(name) != versions[1].get(name)
    ]
    if changed:
        notes.append(f"versions differ: {', '.join(changed)}")
    missing = sorted(set(first.statistics) ^ set(second.statistics))
    if missing:
        notes.append(f"only one result has {', '.join(missing)}")
    if unknown := [name for name in first.statistics if _direction(name, first)[1] is None]:
        notes.append(f"not registered here, so higher is taken as better: {', '.join(unknown)}")
    for side, result in (("before", first), ("after", second)):
        if overlap := result.config.prompts_in_tune_set:
            notes.append(f"{len(overlap)} prompts of {side} are also in the tune set, which inflates scores")
    return tuple(notes)


def _summary(result: EvaluationResult) -> EvaluationSummary:
    return EvaluationSummary(
        use_tuned=result.config.use_tuned,
        score=result.overall_score,
        verdict=result.verdict,
        gate_passed=result.gate.passed,
        gate_failures=result.gate.failures,
        sparsity=result.sparsity.overall,
        theoretical_speedup=result.sparsity.theoretical_speedup,
        measured_speedup=result.sparsity.measured_speedup,
        num_failed=len(result.failed),
    )
