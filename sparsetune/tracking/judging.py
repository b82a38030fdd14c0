"""The judgement of a run's checkpoint: may it have an alias that servers load by?"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsetune.errors import ResultError, TrackingError
from sparsetune.evaluation.result import EvaluationResult
from sparsetune.tracking.logged import DIGEST
from sparsetune.tracking.lookup import find_run, model_of, parent_of
from sparsetune.tracking.registry import CHAMPION, EVALUATION, RUN, Registry
from sparsetune.tracking.results import evaluation_of, read_result, results_of_policy
from sparsetune.tracking.review import read_reviews
from sparsetune.tracking.standing import Condition, champion_condition, gate_condition

if TYPE_CHECKING:
    from mlflow import MlflowClient

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
