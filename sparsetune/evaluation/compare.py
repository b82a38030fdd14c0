"""Two evaluations compared, prompt by prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsetune.errors import MetricError, ResultError
from sparsetune.evaluation.report_markdown import cell, difference, number, table
from sparsetune.evaluation.result import EvaluationResult, PromptRow, load_result
from sparsetune.metrics import PairedDifference, get, interval_caveat, paired_difference


@dataclass(frozen=True)
class Change:
    """How one figure moved from before to after, over the prompts that both have.

    Args:
        name: the metric, `sparsity` or `seconds_sparse`.
        unit: of its values.
        higher_is_better: its direction; None where neither the result nor the registry knows it.
        before: mean over the paired prompts.
        after: likewise.
        difference: of the pairs, with the bootstrap interval of the mean and the prompts better and worse.
    """

    name: str
    unit: str
    higher_is_better: bool | None
    before: float
    after: float
    difference: PairedDifference


@dataclass(frozen=True)
class Outcome:
    """One of the two results in brief."""

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
    """What `compare` found.

    Args:
        before: the one result.
        after: the other.
        changes: one entry a figure that both have.
        num_pairs: prompts with numbers in both results, paired by prompt and seed.
        num_unpaired: prompts of either result without a partner, failed ones counted in.
        notes: what differs without forbidding the comparison.
        forced: what differs and does forbid it; only with `force`.
    """

    before: Outcome
    after: Outcome
    changes: tuple[Change, ...]
    num_pairs: int
    num_unpaired: int
    notes: tuple[str, ...]
    forced: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Give the comparison as JSON's value."""
        return {
            "before": _outcome_dict(self.before),
            "after": _outcome_dict(self.after),
            "num_pairs": self.num_pairs,
            "num_unpaired": self.num_unpaired,
            "changes": {
                change.name: {
                    "unit": change.unit,
                    "higher_is_better": change.higher_is_better,
                    "before": change.before,
                    "after": change.after,
                    "difference": change.difference.to_dict(),
                }
                for change in self.changes
            },
            "notes": list(self.notes),
            "not_comparable": list(self.forced),
        }

    def to_markdown(self) -> str:
        """Give the comparison as Markdown."""
        parts = [
            "# Before and after",
            *[f"**Not comparable, compared all the same:** {'; '.join(map(cell, self.forced))}"][: len(self.forced)],
            table(("", "Before", "After"), _outcome_rows(self.before, self.after)),
            f"{self.num_pairs} pairs by prompt and seed; {self.num_unpaired} prompts without a partner or a number.",
            table(
                ("Figure", "Before", "After", "Difference", "95 % interval", "Better", "Worse", "Equal"),
                [_change_row(change) for change in self.changes],
            ),
            "A star marks an interval that leaves out 0: the difference is more than the choice of these prompts.",
            *filter(None, [interval_caveat(self.num_pairs)]),
            *(f"- {cell(note)}" for note in self.notes),
        ]
        return "\n\n".join(parts) + "\n"


def _outcome_dict(outcome: Outcome) -> dict[str, Any]:
    return {**vars(outcome), "gate_failures": list(outcome.gate_failures)}


def _outcome_rows(before: Outcome, after: Outcome) -> list[tuple[str, str, str]]:
    def column(outcome: Outcome) -> tuple[str, ...]:
        return (
            "yes" if outcome.use_tuned else "no",
            "none" if outcome.score is None else f"{outcome.score}/100",
            outcome.verdict,
            "met" if outcome.gate_passed else "not met: " + cell("; ".join(outcome.gate_failures)),
            "" if outcome.sparsity is None else f"{outcome.sparsity:.1%}",
            "" if outcome.theoretical_speedup is None else f"{outcome.theoretical_speedup:.2f}x",
            "" if outcome.measured_speedup is None else f"{outcome.measured_speedup:.2f}x",
            str(outcome.num_failed),
        )

    names = (
        "Tuned",
        "Score",
        "Verdict",
        "Gate",
        "Sparsity",
        "Theoretical speed-up of attention",
        "Measured speed-up of a rendering",
        "Failed prompts",
    )
    return list(zip(names, column(before), column(after), strict=True))


def _change_row(change: Change) -> tuple[str, ...]:
    pairs = change.difference
    scale = max(abs(change.before), abs(change.after))
    low, high = difference(pairs.ci95_low, scale), difference(pairs.ci95_high, scale)
    mark = " \\*" if pairs.significant else ""
    return (
        change.name + (f" ({change.unit})" if change.unit else ""),
        number(change.before),
        number(change.after),
        difference(pairs.mean, scale),
        f"{low} to {high}{mark}",
        str(pairs.better),
        str(pairs.worse),
        str(pairs.equal),
    )


_DECIDING = (
    "model_name",
    "model.fingerprint",
    "model.revision",
    "model.pipeline_class",
    "height",
    "width",
    "num_frames",
    "num_inference_steps",
    "guidance_scale",
    "guidance_scale_2",
    "negative_prompt",
    "max_sequence_length",
    "scheduler",
    "dtype",
    "vae_tiling",
    "seed",
    "num_prompts",
    "prompts_hash",
)
"""Configuration that both results must share: what decides the dense videos and which they are."""

_TELLING = ("device", "backend")
"""Configuration that may differ, which is said."""

_ALWAYS = ("sparsity", "seconds_sparse")


def compare(
    before: EvaluationResult | Path | str, after: EvaluationResult | Path | str, *, force: bool = False
) -> Comparison:
    """Compare two results, paired by prompt and seed.

    Args:
        before: a result, its JSON file, or a folder that holds one.
        after: likewise.
        force: compare what isn't comparable, over the prompts that both have.

    Raises:
        ResultError: a result can't be read, the two aren't comparable (every difference is listed), or no prompt
            has numbers in both.
    """
    first, second = _load(before), _load(after)
    differing = _differences(first, second, _DECIDING)
    if differing and not force:
        raise ResultError(
            f"two results must be of the same model, settings and prompts, but differ in {'; '.join(differing)}; "
            "evaluate both alike, or compare with --force"
        )
    pairs = _pairs(first.detailed_results, second.detailed_results)
    if not pairs:
        raise ResultError(
            "two results must share a prompt and seed that rendered in both, but share none; evaluate both alike"
        )
    total = len(first.detailed_results) + len(second.detailed_results)
    return Comparison(
        before=_outcome(first),
        after=_outcome(second),
        changes=tuple(_change(name, pairs, *_direction(name, first)) for name in _names(pairs)),
        num_pairs=len(pairs),
        num_unpaired=total - 2 * len(pairs),
        notes=_notes(first, second),
        forced=tuple(differing),
    )


def _load(given: EvaluationResult | Path | str) -> EvaluationResult:
    return given if isinstance(given, EvaluationResult) else load_result(given)


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


def _pairs(first: Sequence[PromptRow], second: Sequence[PromptRow]) -> list[tuple[dict[str, float], dict[str, float]]]:
    """Pair the prompts with numbers; a prompt that is listed twice is paired in order."""
    waiting: dict[tuple[str, int], list[PromptRow]] = {}
    for row in second:
        if row.error is None:
            waiting.setdefault((row.prompt, row.seed), []).append(row)
    pairs = []
    for row in first:
        partners = waiting.get((row.prompt, row.seed), [])
        if row.error is None and partners:
            pairs.append((_figures(row), _figures(partners.pop(0))))
    return pairs


def _figures(row: PromptRow) -> dict[str, float]:
    always = {name: getattr(row, name) for name in _ALWAYS}
    return row.metrics | {name: value for name, value in always.items() if value is not None}


def _names(pairs: Sequence[tuple[Mapping[str, float], Mapping[str, float]]]) -> list[str]:
    """Name the figures that some pair has on both sides, in the order of their first appearance."""
    return list(dict.fromkeys(name for one, other in pairs for name in one if name in other))


def _change(
    name: str,
    pairs: Sequence[tuple[Mapping[str, float], Mapping[str, float]]],
    unit: str,
    higher_is_better: bool | None,
) -> Change:
    both = [(one[name], other[name]) for one, other in pairs if name in one and name in other]
    before, after = [one for one, _ in both], [other for _, other in both]
    return Change(
        name,
        unit,
        higher_is_better,
        sum(before) / len(before),
        sum(after) / len(after),
        paired_difference(before, after, higher_is_better=higher_is_better is not False),
    )


def _direction(name: str, result: EvaluationResult) -> tuple[str, bool | None]:
    """Tell a figure's unit and whether higher is better: as the result says, so that no user's module is needed."""
    if name == "sparsity":
        return "", True
    if name == "seconds_sparse":
        return "s", False
    told = result.statistics.get(name)
    if told is not None and told.higher_is_better is not None:
        return told.unit, told.higher_is_better
    try:
        metric = get(name)
    except MetricError:  # registered by whoever made the results, not here
        return "", None
    return metric.unit, metric.higher_is_better


def _notes(first: EvaluationResult, second: EvaluationResult) -> tuple[str, ...]:
    notes = [f"{difference} differ" for difference in _differences(first, second, _TELLING)]
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
        notes.append(f"not registered here, so taken as better when higher: {', '.join(unknown)}")
    for side, result in (("before", first), ("after", second)):
        if overlap := result.config.prompts_in_tune_set:
            notes.append(f"{len(overlap)} prompts of {side} are in the set that policies are tuned on")
    return tuple(notes)


def _outcome(result: EvaluationResult) -> Outcome:
    return Outcome(
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
