"""Verdict of a report: one sentence, headline numbers and gate conditions."""

from dataclasses import dataclass

from sparsetune.evaluation.result import ConditionSection, EvaluationResult, SparsitySection
from sparsetune.report.source import Source
from sparsetune.report.words import Words


@dataclass(frozen=True)
class Tile:
    """A headline number with a note; `tone` is `good`, `bad` or empty."""

    name: str
    text: str
    note: str = ""
    tone: str = ""


def sentence(source: Source, words: Words) -> str:
    result = source.evaluation
    if result is None:
        return _without_winner(source, words)
    if result.overall_score is None or result.sparsity.overall is None:
        return words("verdict.none", failed=len(result.failed))
    return words(
        "verdict.sentence" if result.seconds is None else "verdict.sentence_seconds",
        word=words(f"verdict.{result.verdict}"),
        score=result.overall_score,
        speed="" if result.seconds is None else f"{result.seconds.speedup:.2f}×",
        saved=_saved(result.sparsity, words),
        phrase=words(f"phrase.{result.verdict}"),
        gate=words("gate.sentence_met" if result.gate.passed else "gate.sentence_missed"),
    )


def _saved(part: SparsitySection, words: Words) -> str:
    """What was left out: of a policy that skips blocks and no pairs in them, the blocks."""
    if not part.overall and part.blocks_run is not None and part.blocks_run < 1.0:
        return words("verdict.saved_blocks", blocks=f"{part.blocks_run:.0%}")
    return words("verdict.saved_sparsity", sparsity=f"{part.overall or 0.0:.1%}")


def tone(source: Source) -> str:
    return "good" if source.evaluation is not None and source.evaluation.gate.passed else "bad"


def tiles(result: EvaluationResult, words: Words) -> tuple[Tile, ...]:
    psnr, part = result.statistics.get("psnr"), result.sparsity
    found = [
        Tile(
            words("outcome.score"),
            "–" if result.overall_score is None else f"{result.overall_score}/100",
            words(f"verdict.{result.verdict}"),
        ),
        Tile(
            words("outcome.gate"),
            words("gate.met" if result.gate.passed else "gate.missed"),
            words("gate.person"),
            "good" if result.gate.passed else "bad",
        ),
    ]
    if (seconds := result.seconds) is not None:
        bounds = (seconds.ci95_low, seconds.ci95_high)
        interval = " – ".join("?" if bound is None else f"{bound:.2f}" for bound in bounds)
        note = words("tile.measured", dense=f"{seconds.dense:.3g}", sparse=f"{seconds.sparse:.3g}", interval=interval)
        tone = "good" if seconds.is_faster else "bad"
        found.append(Tile(words("outcome.measured"), f"{seconds.speedup:.2f}×", note, tone))
    if part.overall is not None:
        speed = "–" if part.theoretical_speedup is None else f"{part.theoretical_speedup:.2f}×"
        found.append(Tile(words("outcome.sparsity"), f"{part.overall:.1%}", words("tile.theoretical", speed=speed)))
    if result.config.policy.cache is not None and part.blocks_run is not None:
        found.append(Tile(words("outcome.blocks_run"), f"{part.blocks_run:.1%}", result.config.policy.cache))
    if psnr is not None:
        found.append(Tile(words("tile.psnr"), f"{psnr.mean:.2f} dB", words("tile.worst", psnr=f"{psnr.min:.2f}")))
    return tuple(found)


def conditions(result: EvaluationResult, words: Words) -> tuple[Tile, ...]:
    found = [_condition(one, words) for one in result.gate.conditions]
    if result.failed:
        failed, total = len(result.failed), len(result.detailed_results)
        found.append(Tile(words("gate.prompts"), words("gate.failed", failed=failed, total=total), tone="bad"))
    return tuple(found)


def _condition(one: ConditionSection, words: Words) -> Tile:
    unit = f" {one.unit}" if one.unit else ""
    relation = {">=": "≥", "<=": "≤"}.get(one.relation, one.relation)
    decimals = 4 if abs(one.bound) <= 1 else 2
    return Tile(
        words.known(f"condition.{one.name}", one.name),
        f"{one.measured:.{decimals}f}{unit} {relation} {one.bound:g}{unit}",
        tone="good" if one.met else "bad",
    )


def _without_winner(source: Source, words: Words) -> str:
    record = source.tuning
    if record is not None and record.dense_because is not None:
        return words("verdict.dense", reason=record.dense_because)
    if record is None or record.closest is None:
        return words("verdict.no_trial", trials=0 if record is None else len(record.trials))
    closest = next(trial for trial in record.trials if trial.number == record.closest)
    psnr = "–" if closest.psnr is None else f"{closest.psnr:.2f}"
    sparsity = f"{closest.sparsity or 0.0:.1%}"
    return words("verdict.closest", trials=len(record.trials), number=closest.number, sparsity=sparsity, psnr=psnr)
