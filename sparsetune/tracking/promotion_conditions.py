"""The judgement of a run's checkpoint: may it have an alias that servers load by?"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsetune.errors import ResultError, TrackingError
from sparsetune.evaluation.result import EvaluationResult
from sparsetune.tracking.logged_model import DIGEST
from sparsetune.tracking.lookup import find_run, model_of, parent_of
from sparsetune.tracking.registry import CHAMPION, EVALUATION, RUN, Registry
from sparsetune.tracking.results import evaluation_of, read_result, results_of_policy
from sparsetune.tracking.review import read_reviews

if TYPE_CHECKING:
    from mlflow import MlflowClient

from collections.abc import Iterable

from sparsetune.evaluation.compare import Change, Comparison, compare
from sparsetune.metrics import MIN_FOR_INTERVAL

TOLERANCES = {"sparsity": 0.005, "psnr": 0.1, "frame_cosine": 0.0005}
"""Mean differences up to these count as none: half a percent of the block pairs, 0.1 dB, half a thousandth."""

QUALITY = ("psnr", "frame_cosine")


@dataclass(frozen=True)
class Condition:
    """One condition of a promotion: its name, whether it is met, and the figures that say why."""

    name: str
    met: bool
    says: str


def gate_condition(result: EvaluationResult) -> Condition:
    """The gate must be met, on prompts that the policy wasn't tuned on."""
    figures = [
        f"{one.name} {one.measured:.4g} {'>' if one.met else '<='} {one.bound:g}{f' {one.unit}' if one.unit else ''}"
        for one in result.gate.conditions
    ]
    figures += [failure for failure in result.gate.failures if failure.startswith(("every prompt", "at least"))]
    overlap = len(result.config.prompts_in_tune_set)
    if overlap:
        figures.append(f"{overlap} of the prompts were tuned on: evaluate on others")
    tuned = [] if result.config.use_tuned else ["SpargeAttn's default thresholds were judged, no checkpoint"]
    says = "; ".join([*figures, *tuned, f"{result.config.num_prompts} prompts"])
    return Condition("gate on eval prompts", result.gate.passed and not overlap and not tuned, says)


def champion_condition(candidate: EvaluationResult, champion: Iterable[EvaluationResult], named: str) -> Condition:
    """The candidate must be at least as good as the champion, compared prompt by prompt.

    A sparse checkpoint is there to compute less while the gate holds, so 'at least as good' means all of:

    1. Every bound of the champion's gate that the champion meets, the candidate meets too.
    2. The candidate computes no more: its sparsity isn't lower, or its measured renderings aren't slower where both
       ran on one device with SpargeAttn's kernels.
    3. Where it isn't sparser either, its quality isn't lower: psnr and frame_cosine. A sparser candidate may lose
       quality, as far as 1 allows.

    'Lower' is judged on the paired differences, candidate minus champion: their mean lies under minus the tolerance,
    and their 95 % bootstrap interval lies under 0 throughout. Over fewer than 6 prompts, where an interval says
    little, the mean decides alone. 'Sparser' is the same upwards.

    Args:
        candidate: its result on eval prompts.
        champion: results of the champion's policy, the preferred one first; the first comparable one is taken, and
            none after it is asked for.
        named: how the champion is called in what is said, e.g. `demo-sparse version 3`.
    """
    name = "at least as good as the champion"
    advice = (
        "evaluate both alike: `sparsetune eval --checkpoint models:/...@champion` with the candidate's settings "
        "and prompts, then promote again"
    )
    refusals = []
    for result in champion:
        try:
            comparison = compare(result, candidate)
        except ResultError as error:
            refusals.append(str(error).rpartition("; evaluate both alike")[0] or str(error))
            continue
        return _compared(name, named, candidate, result, comparison)
    if not refusals:
        return Condition(name, False, f"{named} has no evaluation that can be read; {advice}")
    return Condition(name, False, f"not comparable with {named}: {refusals[0]}; {advice}")


def _compared(
    name: str, named: str, candidate: EvaluationResult, champion: EvaluationResult, comparison: Comparison
) -> Condition:
    changes = {change.name: change for change in comparison.changes}
    lower = [metric for metric in TOLERANCES if metric in changes and _moved(changes[metric]) < 0]
    sparser = "sparsity" in changes and _moved(changes["sparsity"]) > 0
    failures = _unmet_bounds(candidate, champion)
    if ("sparsity" in lower or "sparsity" not in changes) and not _faster(candidate, champion, changes):
        failures.append("its sparsity is lower")
    if not sparser:
        failures += [f"its {metric} is lower" for metric in QUALITY if metric in lower]
    figures = [_figures(changes[metric]) for metric in TOLERANCES if metric in changes]
    if _times_comparable(candidate, champion) and "seconds_sparse" in changes:
        figures.append(_figures(changes["seconds_sparse"]))
    over = f"over {comparison.num_pairs} paired prompts"
    if comparison.num_pairs < MIN_FOR_INTERVAL:
        over += ", too few for an interval, so means decide"
    verdict = f"{'; '.join(failures)}: " if failures else ""
    return Condition(name, not failures, f"{verdict}against {named} {over}: {', '.join(figures)}")


def _moved(change: Change) -> int:
    """Tell whether a figure fell (-1), rose (1), or did neither beyond tolerance and chance (0)."""
    pairs, tolerance = change.difference, TOLERANCES[change.name]
    few = len(pairs.differences) < MIN_FOR_INTERVAL
    if pairs.mean < -tolerance and (few or pairs.ci95_high < 0):
        return -1
    if pairs.mean > tolerance and (few or pairs.ci95_low > 0):
        return 1
    return 0


def _unmet_bounds(candidate: EvaluationResult, champion: EvaluationResult) -> list[str]:
    """List the bounds that the champion met and the candidate doesn't, or wasn't judged by."""
    measured = {one.name: one.measured for one in candidate.gate.conditions}
    found = []
    for one in champion.gate.conditions:
        if one.met and one.name not in measured:
            found.append(f"its {one.name} wasn't judged, and the champion's is > {one.bound:g} {one.unit}".rstrip())
        elif one.met and measured[one.name] <= one.bound:
            found.append(f"its {one.name} is {measured[one.name]:.4g}, and the champion's gate asks > {one.bound:g}")
    return found


def _faster(candidate: EvaluationResult, champion: EvaluationResult, changes: dict[str, Change]) -> bool:
    """Whether renderings are measured to be no slower, in times that can be compared."""
    change = changes.get("seconds_sparse")
    return change is not None and _times_comparable(candidate, champion) and change.difference.ci95_high <= 0


def _times_comparable(candidate: EvaluationResult, champion: EvaluationResult) -> bool:
    def where(result: EvaluationResult) -> tuple[str, str]:
        return result.environment.device_name, result.config.backend

    return where(candidate) == where(champion) and candidate.config.backend == "sparge"


def _figures(change: Change) -> str:
    digits = 2 if change.unit == "dB" else 4
    pairs, unit = change.difference, f" {change.unit}" if change.unit else ""
    return (
        f"{change.name} {pairs.mean:+.{digits}f}{unit} ({pairs.ci95_low:+.{digits}f} .. {pairs.ci95_high:+.{digits}f})"
    )


_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that may be promoted.

    Args:
        run_id: the run that stands for it: the tuning's, or an evaluation's that is no part of one.
        evaluation_id: the evaluation it is judged by.
        model: short name of the model.
        result: of that evaluation.
    """

    run_id: str
    evaluation_id: str
    model: str
    result: EvaluationResult


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate may be promoted.

    Args:
        candidate: the checkpoint.
        name: of the registered model.
        alias: that it is to get.
        champion: the version that has the alias now; None where none has.
        conditions: each with its figures.
    """

    candidate: Candidate
    name: str
    alias: str
    champion: str | None
    conditions: tuple[Condition, ...]

    @property
    def passed(self) -> bool:
        """Whether every condition is met."""
        return all(condition.met for condition in self.conditions)

    @property
    def unmet(self) -> tuple[str, ...]:
        """The names of those that aren't."""
        return tuple(condition.name for condition in self.conditions if not condition.met)


def find_candidate(client: "MlflowClient", reference: str, model: str | None = None) -> Candidate:
    """Find what a run offers for promotion; arguments and errors are those of `find_run` and `evaluation_of`.

    Raises:
        ResultError: its result can't be read.
    """
    evaluation = evaluation_of(client, find_run(client, reference, model))
    evaluation_id = str(evaluation.info.run_id)
    result = read_result(client, evaluation_id)
    return Candidate(
        parent_of(evaluation) or evaluation_id, evaluation_id, model_of(evaluation) or result.config.model_name, result
    )


def judge(registry: Registry, candidate: Candidate, alias: str = CHAMPION) -> Verdict:
    """Judge whether a candidate may have an alias; nothing is written.

    Raises:
        UsageError: MLflow refuses the name or the alias.
        TrackingError: the store is away or refuses.
    """
    champion = registry.aliased(alias)
    registry.check_alias(alias)
    conditions = (
        gate_condition(candidate.result),
        _review_condition(registry.client, candidate),
        _champion_condition(registry, candidate, champion),
    )
    return Verdict(candidate, registry.name, alias, champion, conditions)


def _review_condition(client: "MlflowClient", candidate: Candidate) -> Condition:
    name, digest = "human review", candidate.result.config.policy.digest
    reviews = [one for one in read_reviews(client, candidate.evaluation_id) if one.policy_digest == digest]
    if not reviews:
        run = candidate.run_id[:8]
        return Condition(name, False, f"none is recorded; run: sparsetune review {run} --ok --reviewer NAME")
    last = reviews[-1]
    says = f"{last.verdict} by {last.reviewer} at {last.at}, {len(last.videos)} videos"
    says += f"; {'; '.join(last.rejected)}" if last.rejected else ""
    return Condition(name, last.ok, f"{says}; {last.note}" if last.note else says)


def _champion_condition(registry: Registry, candidate: Candidate, champion: str | None) -> Condition:
    if champion is None:
        return Condition("at least as good as the champion", True, "there is no champion yet")
    version = registry.version(champion)
    digest = str(version.tags.get(DIGEST, ""))
    if version.tags.get(RUN) == candidate.run_id and digest == candidate.result.config.policy.digest:
        return Condition("at least as good as the champion", True, f"it is the champion, version {champion}")
    results = _results(registry.client, str(version.tags.get(EVALUATION)), digest)
    return champion_condition(candidate.result, results, f"{registry.name} version {champion}")


def _results(client: "MlflowClient", evaluation_id: str, digest: str) -> Iterator[EvaluationResult]:
    """Give what is known of a champion: the evaluation it was promoted by, then others of its policy."""
    try:
        yield read_result(client, evaluation_id)
    except (TrackingError, ResultError) as error:
        _LOG.info("the champion's own evaluation can't be read: %s", error)
    yield from results_of_policy(client, digest)
