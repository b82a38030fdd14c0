"""Promotion: judging a run's checkpoint, moving a registered model's alias to it, and rolling back."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparsetune.config.models import PromotionConfig
from sparsetune.errors import GateError, RegistryError, TrackingError, UsageError
from sparsetune.evaluation.prompt import saves_seconds
from sparsetune.evaluation.report_markdown import cell
from sparsetune.files import scratch_folder
from sparsetune.tracking.criteria import (
    Condition,
    bounds_of,
    gate_condition,
    later_promotions,
    no_worse_conditions,
    speed_condition,
)
from sparsetune.tracking.logged_model import DIGEST, log_checkpoint_model
from sparsetune.tracking.lookup import download_run_checkpoint
from sparsetune.tracking.registry import (
    CHAMPION,
    EVALUATION,
    GATE,
    OVERRIDE,
    RUN,
    LoggedIn,
    Registry,
    copy_checkpoint,
    first_tag,
    previous_alias,
)
from sparsetune.tracking.results import Candidate, results_of_policy
from sparsetune.tracking.review import deciding_review, reviews_of_policy
from sparsetune.tracking.run_logger import user_name
from sparsetune.tracking.store import MissingError, store_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_LOG = logging.getLogger(__name__)

CHAMPION_ROLE = "the champion"
FIRST_ROLE = "the first champion under this gate"


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate may get an alias.

    `champion` is the version that has it now, if any; `first` the first champion since the gate was last changed, None
    where the candidate would be that.
    """

    candidate: Candidate
    name: str
    alias: str
    champion: str | None
    conditions: tuple[Condition, ...]
    first: str | None = None

    @property
    def passed(self) -> bool:
        return all(condition.met for condition in self.conditions)

    @property
    def unmet(self) -> tuple[str, ...]:
        return tuple(condition.name for condition in self.conditions if not condition.met)


def judge(
    registry: Registry, candidate: Candidate, alias: str = CHAMPION, margins: PromotionConfig | None = None
) -> Verdict:
    """Check whether a candidate may have an alias; raises UsageError where MLflow refuses the name or the alias.

    It must be no worse than the champion, and than the first champion under the same gate: by how much it may be worse
    (`margins`), a row of candidates could otherwise fall again and again.
    """
    margins = margins or PromotionConfig()
    champion = registry.aliased(alias)
    registry.check_alias(alias)
    config = candidate.result.config
    timed = saves_seconds(config.backend, config.policy)
    first = None if champion is None else _first(registry, candidate, alias, champion)
    conditions = (
        gate_condition(candidate.result),
        *((speed_condition(candidate.result),) if timed else ()),
        _review_condition(registry.client, candidate),
        *_no_worse(registry, candidate, champion, CHAMPION_ROLE, margins),
        *(_no_worse(registry, candidate, first, FIRST_ROLE, margins) if first not in (None, champion) else ()),
    )
    return Verdict(candidate, registry.name, alias, champion, conditions, first)


def _first(registry: Registry, candidate: Candidate, alias: str, champion: str) -> str | None:
    """Return the first champion since the gate was last changed; None where the candidate's gate is another.

    It is the champion itself where that was promoted without a record of this, or its first one was deleted.
    """
    tags = registry.version(champion).tags
    if tags.get(GATE, bounds_of(candidate.result)) != bounds_of(candidate.result):
        return None
    first = str(tags.get(first_tag(alias), champion))
    try:
        registry.version(first)
    except MissingError:
        return champion
    return first


def _review_condition(client: "MlflowClient", candidate: Candidate) -> Condition:
    name, digest = "human review", candidate.result.config.policy.digest
    last = deciding_review(reviews_of_policy(client, digest, candidate.model))
    if last is None:
        return Condition(name, False, f"none is recorded; run: sparsetune review {candidate.run_id[:8]}")
    says = f"{last.verdict} by {last.reviewer} at {last.at}, {last.summary}"
    says += f"; {'; '.join(last.rejected)}" if last.rejected else ""
    return Condition(name, last.ok, f"{says}; {last.note}" if last.note else says)


def _no_worse(
    registry: Registry, candidate: Candidate, number: str | None, role: str, margins: PromotionConfig
) -> tuple[Condition, ...]:
    if number is None:
        return (Condition(f"no worse than {role}", True, later_promotions(margins)),)
    version = registry.version(number)
    digest = str(version.tags.get(DIGEST, ""))
    if digest == candidate.result.config.policy.digest:
        same = "is" if version.tags.get(RUN) == candidate.run_id else "has the policy of"
        return (Condition(f"no worse than {role}", True, f"it {same} {role}, version {number}"),)
    results = results_of_policy(registry.client, digest, str(version.tags.get(EVALUATION)))
    return no_worse_conditions(candidate.result, results, role, f"{registry.name} version {number}", margins)


@dataclass(frozen=True)
class Move:
    """An alias that was moved to a version, unless it named that already; `replaced` is the one before it, if any."""

    name: str
    alias: str
    version: str
    replaced: str | None
    changed: bool = True

    @property
    def uri(self) -> str:
        return f"models:/{self.name}@{self.alias}"


def promote(registry: Registry, verdict: Verdict, override: str | None = None) -> Move:
    """Register a candidate's checkpoint, unless it is, and move the alias to it.

    Where the alias names the same policy from another run, nothing changes: a second version of it would make a later
    rollback go back to itself.

    A crash between any two steps leaves a state that the next call completes: a version without its alias is found
    again, and `previous` is set before the alias moves. An `override`, the reason to promote although a condition
    isn't met, is kept on the version.

    Raises GateError where a condition isn't met without override, RegistryError where the champion changed since
    `judge`, somebody else is promoting, or the alias couldn't be set.
    """
    if override is not None and not override.strip():
        raise UsageError("--override must give a reason, but is empty")
    if not verdict.passed and override is None:
        raise GateError(
            f"conditions are not met: {', '.join(verdict.unmet)}; meet them, or give a reason with --override"
        )
    digest = verdict.candidate.result.config.policy.digest
    if verdict.champion is not None:
        tags = registry.version(verdict.champion).tags
        if tags.get(DIGEST) == digest and tags.get(RUN) != verdict.candidate.run_id:
            return _moved(registry, verdict, verdict.champion)
    with scratch_folder() as folder:
        made_of = _logged_model(registry, verdict.candidate, folder)
    registry.register()
    with registry.claimed():
        registry.expect(verdict.alias, verdict.champion)
        version = registry.find(verdict.candidate.run_id, digest)
        if version is None:
            tags = _tags(verdict, digest)
            version = registry.create(made_of.run_id, made_of.model_id, tags, _description(verdict))
        number = str(version.version)
        try:
            if not verdict.passed and override is not None:
                _write_override(registry, version, override, verdict)
            registry.link(made_of.model_id, number)
            if verdict.champion != number:
                registry.set_tag(number, GATE, bounds_of(verdict.candidate.result))
                registry.set_tag(number, first_tag(verdict.alias), verdict.first or number)
            _move(registry, verdict, number)
        except (TrackingError, RegistryError) as error:
            raise RegistryError(
                f"version {number} of {registry.name} was created, but cannot get the alias {verdict.alias}: {error}; "
                "promote the run again, which reuses this version"
            ) from error
    _tag_runs(registry.client, verdict.candidate, f"{registry.name}/{number}")
    return _moved(registry, verdict, number)


def _moved(registry: Registry, verdict: Verdict, number: str) -> Move:
    changed = verdict.champion != number
    replaced = verdict.champion if changed else registry.aliased(previous_alias(verdict.alias))
    return Move(registry.name, verdict.alias, number, replaced, changed)


def rollback(registry: Registry, alias: str = CHAMPION) -> Move:
    """Swap what an alias names with what it named before; raises RegistryError where that can't be done."""
    back = previous_alias(alias)
    model = registry.model()
    if model is None:
        raise RegistryError(
            f"there is no registered model {registry.name}; create one with `sparsetune promote RUN`, or give --name"
        )
    with registry.claimed():
        now, before = registry.aliased(alias), registry.aliased(back)
        if now is None:
            there = ", ".join(sorted(model.aliases)) or "none"
            raise RegistryError(f"{registry.name} has no alias {alias}, only {there}; promote a run first")
        if before is None or before == now:
            found = f"there is no alias {back}" if before is None else f"{back} is version {now} too"
            raise RegistryError(f"cannot roll back {registry.name}@{alias}: {found}; promote a run instead")
        registry.set_alias(alias, before)
        registry.set_alias(back, now)
    return Move(registry.name, alias, before, now)


def _logged_model(registry: Registry, candidate: Candidate, folder: Path) -> LoggedIn:
    """Return the logged model of the evaluated checkpoint, created where the run, or the registry's side, has none."""
    client = registry.client
    with store_errors(f"read run {candidate.evaluation_id}"):
        evaluation = client.get_run(candidate.evaluation_id)
    checkpoint = download_run_checkpoint(client, evaluation, folder / "run")
    model_id = log_checkpoint_model(client, candidate.run_id, checkpoint)
    if not registry.store.copies_models:
        return LoggedIn(candidate.run_id, model_id)
    return copy_checkpoint(registry.home, registry.store, candidate.model, candidate.run_id, checkpoint)


def _tags(verdict: Verdict, digest: str) -> dict[str, str]:
    candidate = verdict.candidate
    return {
        RUN: candidate.run_id,
        EVALUATION: candidate.evaluation_id,
        DIGEST: digest,
        "sparsetune.model": candidate.model,
        "promoted.by": user_name(),
    }


def _description(verdict: Verdict) -> str:
    result = verdict.candidate.result
    sparsity, seconds = result.sparsity.overall, result.seconds
    speed = "" if seconds is None else f"{seconds.speedup:.2f} times as fast as dense, "
    lines = [
        f"Sparse attention thresholds for {verdict.candidate.model}, {speed}"
        f"sparsity {'unknown' if sparsity is None else f'{sparsity:.3f}'}, score {result.overall_score}/100.",
        "",
        *(f"- {'met' if one.met else '**not met**'}: {one.name}: {cell(one.says)}" for one in verdict.conditions),
    ]
    return "\n".join(lines)


def _write_override(registry: Registry, version: "ModelVersion", reason: str, verdict: Verdict) -> None:
    entry = f"{user_name()}, although not met: {', '.join(verdict.unmet)}: {' '.join(reason.split())}"
    earlier = version.tags.get(OVERRIDE)
    registry.set_tag(str(version.version), OVERRIDE, f"{earlier}\n{entry}" if earlier else entry)


def _move(registry: Registry, verdict: Verdict, version: str) -> None:
    registry.expect(verdict.alias, verdict.champion)
    if verdict.champion == version:
        return
    if verdict.champion is not None:
        registry.set_alias(previous_alias(verdict.alias), verdict.champion)
    registry.set_alias(verdict.alias, version)


def _tag_runs(client: "MlflowClient", candidate: Candidate, version: str) -> None:
    for run_id in dict.fromkeys((candidate.run_id, candidate.evaluation_id)):
        try:
            with store_errors(f"write to run {run_id}"):
                client.set_tag(run_id, "promoted", version)
        except TrackingError as error:  # the promotion itself is done
            _LOG.warning("the run is not tagged as promoted: %s", error)
