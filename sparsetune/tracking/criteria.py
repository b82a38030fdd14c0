"""Criteria of a promotion: gate, speed, and no loss of quality or speed against an earlier version."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sparsetune.config.models import PromotionConfig
from sparsetune.errors import ResultError
from sparsetune.evaluation.compare import Comparison, compare, paired_rows
from sparsetune.evaluation.prompt import saves_seconds
from sparsetune.evaluation.report_markdown import seconds_text
from sparsetune.evaluation.result import EvaluationResult, PromptRow
from sparsetune.metrics import Inferiority, inferiority, needed_pairs
from sparsetune.metrics.gate import meets

SPEED_CONDITION = "faster than dense by measurement"

INVISIBLE_DB = 50.0
"""From here on the mean error is below one of 255 levels, so PSNRs above count as this, identical videos too."""

TYPICAL_STD_DB = 1.0
TYPICAL_STD_SPEED = 0.02
"""Standard deviations of the paired differences that are assumed where they aren't known yet."""

SPARSITY_TOLERANCE = 0.005
"""Sparsity is counted, not sampled: it depends little on the prompt, so its mean is compared as it is."""


@dataclass(frozen=True)
class Condition:
    name: str
    met: bool
    says: str


def gate_condition(result: EvaluationResult) -> Condition:
    """Check the gate, on prompts that the policy wasn't tuned on."""
    figures = [
        f"{one.name} {one.measured:.4g} {one.relation} {one.bound:g}{f' {one.unit}' if one.unit else ''}"
        for one in result.gate.conditions
    ]
    figures += [failure for failure in result.gate.failures if failure.startswith(("every prompt", "at least"))]
    overlap, tuned = len(result.config.prompts_in_tune_set), result.config.use_tuned
    if overlap:
        figures.append(f"{overlap} of the prompts were tuned on: evaluate on others")
    if not tuned:
        figures.append("SpargeAttn's default thresholds were evaluated, no checkpoint")
    if result.gate.num_identical:
        figures.append(f"means leave out {result.gate.num_identical} identical")
    figures.append(f"{result.config.num_prompts} prompts")
    return Condition("gate on eval prompts", result.gate.passed and not overlap and tuned, "; ".join(figures))


def speed_condition(result: EvaluationResult) -> Condition:
    """Check that the denoising was measured to be faster than dense; for kernels that skip work."""
    seconds = result.seconds
    if seconds is None:
        return Condition(SPEED_CONDITION, False, "no seconds were measured; evaluate the checkpoint again")
    return Condition(SPEED_CONDITION, seconds.is_faster, seconds_text(seconds))


def bounds_of(result: EvaluationResult) -> str:
    """The bounds of a result's gate as a text, by which gates are told apart."""
    return "; ".join(sorted(f"{one.name} {one.wanted}" for one in result.gate.conditions))


def later_promotions(margins: PromotionConfig) -> str:
    """How many prompts a later candidate will take, for whoever promotes the first."""
    return (
        "there is no champion yet; a later candidate is compared with this one prompt by prompt, which takes about "
        f"{needed_pairs(TYPICAL_STD_DB, margins.margin_db)} prompts (--num-prompts) to show a mean loss under "
        f"{margins.margin_db:g} dB, if differences deviate by {TYPICAL_STD_DB:g} dB"
    )


def no_worse_conditions(
    candidate: EvaluationResult, earlier: Iterable[EvaluationResult], role: str, named: str, margins: PromotionConfig
) -> tuple[Condition, ...]:
    """Test that a candidate is no worse than an earlier version: non-inferiority, prompt by prompt, at 5%.

    1. Every bound of the earlier one's gate that it meets, the candidate meets too.
    2. The mean loss of psnr is shown to be under `margin_db`, and no prompt loses `margin_worst_db`.
    3. The loss of measured speed-up is shown to be under `margin_speed`; where the two weren't timed, or not with one
       kernel on one device, the candidate's sparsity isn't lower.

    `earlier` has the results of one policy, read up to the first comparable one; `role` is e.g. "the champion", and
    `named` its version. The second condition returned says whether the number of prompts could decide, or which could.
    """
    name, problem = f"no worse than {role}", ""
    for result in earlier:
        try:
            return _compared(role, named, candidate, result, compare(result, candidate), margins)
        except ResultError as error:
            reason = str(error).rpartition("; evaluate both alike")[0] or str(error)
            problem = problem or f"not comparable with {named}: {reason}"
    advice = (
        "evaluate both alike: `sparsetune eval --checkpoint models:/NAME/VERSION` with the candidate's settings and "
        "prompts, then promote again"
    )
    return (Condition(name, False, f"{problem or f'{named} has no evaluation that can be read'}; {advice}"),)


def _compared(
    role: str,
    named: str,
    candidate: EvaluationResult,
    earlier: EvaluationResult,
    comparison: Comparison,
    margins: PromotionConfig,
) -> tuple[Condition, ...]:
    pairs, failures = paired_rows(earlier, candidate), _unmet_bounds(candidate, earlier)
    differences = [_visible(after) - _visible(before) for before, after in pairs]
    quality = inferiority(differences, margins.margin_db, typical_std=TYPICAL_STD_DB)
    failures += _losses(quality, "psnr is lower", "psnr is no lower")
    if quality.worst <= -margins.margin_worst_db:
        failures.append(f"a prompt loses {-quality.worst:.2f} dB")
    figures, tests = [_quality_text(quality, margins)], [quality]
    if _timed_alike(earlier, candidate):
        speedups = _speedups(pairs, earlier, candidate)
        if speedups:
            margin = -math.log1p(-margins.margin_speed)
            speed = inferiority([math.log(now / was) for was, now in speedups], margin, typical_std=TYPICAL_STD_SPEED)
            failures += _losses(speed, "speed-up is lower", "speed-up is no lower")
            figures.append(_speed_text(speed, margins))
            tests.append(speed)
        else:
            failures.append("its speed-up can't be compared: seconds by prompt are missing, evaluate both again")
    else:
        sparsity = next((one.difference.mean for one in comparison.changes if one.name == "sparsity"), -math.inf)
        figures.append(f"sparsity {sparsity:+.4f}")
        if sparsity < -SPARSITY_TOLERANCE:
            failures.append("its sparsity is lower")
    verdict = f"{'; '.join(failures)}: " if failures else ""
    over = "1 paired prompt" if len(pairs) == 1 else f"{len(pairs)} paired prompts"
    says = f"{verdict}against {named} over {over}: {'; '.join(figures)}"
    return Condition(f"no worse than {role}", not failures, says), _enough(role, tests, margins)


def _losses(test: Inferiority, worse: str, no_worse: str) -> list[str]:
    return {"no worse": [], "worse": [f"its {worse}"], "unclear": [f"it isn't shown that its {no_worse}"]}[test.verdict]


def _enough(role: str, tests: Sequence[Inferiority], margins: PromotionConfig) -> Condition:
    """Whether the prompts decide every test, the first of which is of psnr."""
    name, quality = f"enough prompts to compare with {role}", tests[0]
    unclear = [one for one in tests if one.verdict == "unclear"]
    detectable = "" if quality.detectable is None else f"; they can detect a mean loss of {quality.detectable:.2f} dB"
    if not unclear:
        says = f"{quality.num_pairs} decide, where about {quality.needed} let an equal candidate pass{detectable}"
        return Condition(name, True, says)
    needed = max(one.needed for one in unclear)
    margin = f"{margins.margin_db:g} dB" if quality in unclear else f"{margins.margin_speed:.0%} of the speed"
    says = (
        f"can't tell from {quality.num_pairs}{detectable}; for the margin of {margin} about {needed} are needed: "
        f"evaluate both with --num-prompts {needed}"
    )
    return Condition(name, False, says)


def _visible(row: PromptRow) -> float:
    return min(row.psnr or 0.0, INVISIBLE_DB)


def _quality_text(test: Inferiority, margins: PromotionConfig) -> str:
    low = "unknown below 2 prompts" if test.low is None else f"at least {test.low:+.2f} dB with 95% confidence"
    return (
        f"psnr {test.mean:+.2f} dB, {low}, margin {test.margin:g} dB; worst prompt {test.worst:+.2f} dB, margin "
        f"{margins.margin_worst_db:g} dB"
    )


def _speed_text(test: Inferiority, margins: PromotionConfig) -> str:
    low = "unknown below 2 prompts" if test.low is None else f"at least {math.expm1(test.low):+.1%}"
    return f"speed {math.expm1(test.mean):+.1%}, {low}, margin {margins.margin_speed:.0%}"


def _unmet_bounds(candidate: EvaluationResult, earlier: EvaluationResult) -> list[str]:
    measured = {one.name: one.measured for one in candidate.gate.conditions}
    found = []
    for one in earlier.gate.conditions:
        if one.met and one.name not in measured:
            found.append(f"its {one.name} wasn't judged, and the earlier one's is {one.wanted}")
        elif one.met and not meets(measured[one.name], one.bound, one.is_maximum):
            found.append(f"its {one.name} is {measured[one.name]:.4g}, and the earlier gate asks {one.wanted}")
    return found


def _timed_alike(earlier: EvaluationResult, candidate: EvaluationResult) -> bool:
    results = (earlier, candidate)
    ran = {(one.config.backend, one.config.compile, one.environment.device_name) for one in results}
    return len(ran) == 1 and any(map(_saves_seconds, results))


def _saves_seconds(result: EvaluationResult) -> bool:
    return saves_seconds(result.config.backend, result.config.policy)


def _speedups(
    pairs: Sequence[tuple[PromptRow, PromptRow]], earlier: EvaluationResult, candidate: EvaluationResult
) -> list[tuple[float, float]]:
    """Speed-ups of both by prompt, of the prompts where both are known."""
    saves = (_saves_seconds(earlier), _saves_seconds(candidate))
    found = [(_speedup(before, saves[0]), _speedup(after, saves[1])) for before, after in pairs]
    return [(before, after) for before, after in found if before is not None and after is not None]


def _speedup(row: PromptRow, saves: bool) -> float | None:
    """Dense over sparse seconds; 1 where neither the kernel nor a cache skips work, None where they aren't known."""
    if not saves:
        return 1.0
    return row.denoising_dense / row.denoising_sparse if row.denoising_dense and row.denoising_sparse else None
