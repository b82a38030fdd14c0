"""Gain of a tuned policy: beside dense and hand-set thresholds, and what of the gate's allowed loss it uses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sparsetune.evaluation.result import ConditionSection, EvaluationResult, HandSetPoint

RowName = Literal["dense", "at_gate", "tuned", "at_sparsity"]

LABELS: dict[RowName, str] = {
    "dense": "dense",
    "at_gate": "best hand-set pair within the gate",
    "tuned": "tuned",
    "at_sparsity": "hand-set pair that saves as much",
}


@dataclass(frozen=True)
class GainRow:
    """One way to render: speed-up (None where it isn't measured), fraction of attention saved, PSNR in dB."""

    name: RowName
    pair: str  # simthreshd1 / cdfthreshd
    speedup: float | None
    saved: float
    psnr: float | None  # of one prompt where there are hand-set pairs, else the mean; None for dense
    meets_gate: bool


def gain_rows(result: EvaluationResult) -> tuple[GainRow, ...]:
    """Rows of dense, the best hand-set pair within the gate, the tuned policy, and a pair that saves as much.

    Hand-set pairs are left out where they weren't measured; the one at the gate too where no pair met it.
    """
    saved = saved_attention(result)
    if saved is None:
        return ()
    hand_set, psnr = result.hand_set, result.statistics.get("psnr")
    mean = None if psnr is None else psnr.mean
    speedup = result.sparsity.measured_speedup
    own = mean if hand_set is None else result.detailed_results[hand_set.prompt].psnr
    tuned = GainRow("tuned", "", speedup, saved, own, result.gate.passed)
    dense = GainRow("dense", "", None if speedup is None else 1.0, 0.0, None, True)
    if hand_set is None:
        return dense, tuned
    at_gate = () if hand_set.at_gate is None else (_pair_row("at_gate", hand_set.at_gate),)
    return dense, *at_gate, tuned, _pair_row("at_sparsity", hand_set.at_sparsity)


def saved_attention(result: EvaluationResult) -> float | None:
    """Fraction in [0, 1] of a dense generation's attention that wasn't computed: left out, or in skipped blocks."""
    part = result.sparsity
    return part.overall if part.attention_computed is None else 1.0 - part.attention_computed


def budget_used(one: ConditionSection) -> float | None:
    """Share of the loss that a gate's bound allows, 1 at the bound: of squared error for dB, else of 1 - value."""
    if one.unit == "dB":
        return float(10.0 ** ((one.bound - one.measured) / 10.0))
    return (1.0 - one.measured) / (1.0 - one.bound) if one.bound < 1.0 else None


def gain_table(result: EvaluationResult) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Column heads and rows of the gain as texts; no rows where nothing rendered."""
    psnr = "psnr (dB)" if result.hand_set is None else f"psnr, prompt {result.hand_set.prompt + 1} (dB)"
    rows = [
        (LABELS[row.name] + (f" ({row.pair})" if row.pair else ""), *cells(row), "met" if row.meets_gate else "missed")
        for row in gain_rows(result)
    ]
    return ("", "speed-up", "attention saved", psnr, "gate"), rows


def cells(row: GainRow) -> tuple[str, str, str]:
    """Speed-up, attention saved and PSNR as texts."""
    return (
        "-" if row.speedup is None else f"{row.speedup:.2f}x",
        f"{row.saved:.1%}",
        "-" if row.psnr is None else f"{row.psnr:.2f}",
    )


def gain_notes(result: EvaluationResult) -> list[str]:
    """Sentences about the gain: what a hand-set pair loses at equal saving, and the allowed loss that is used."""
    notes = []
    if (change := hand_set_change(result)) is not None:
        notes.append(f"saving as much with one hand-set pair changes psnr by {change:+.1f} dB")
    used = [f"{one.name} {share:.0%}" for one in result.gate.conditions if (share := budget_used(one)) is not None]
    if used:
        notes.append(f"of the loss that the gate allows it uses: {', '.join(used)}")
    return notes


def hand_set_change(result: EvaluationResult) -> float | None:
    """PSNR in dB of the pair that saves as much, less the tuned policy's on its prompt; None where not measured."""
    if result.hand_set is None:
        return None
    own = result.detailed_results[result.hand_set.prompt].psnr
    return None if own is None else result.hand_set.at_sparsity.psnr - own


def _pair_row(name: RowName, point: HandSetPoint) -> GainRow:
    pair = f"{point.simthreshd1:g} / {point.cdfthreshd:.4g}"
    return GainRow(name, pair, point.speedup, point.sparsity, point.psnr, point.meets_gate)
