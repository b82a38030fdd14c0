"""What two compared evaluations say, as data, JSON and Markdown."""

from dataclasses import dataclass
from typing import Any

from sparsetune.evaluation.markdown import cell, difference, number, table
from sparsetune.metrics import PairedDifference, interval_caveat


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
