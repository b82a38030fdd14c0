"""The promotion of a run's checkpoint to a registered model's alias, and the way back."""

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparsetune.errors import GateError, RegistryError, TrackingError, UsageError
from sparsetune.tracking.logged_model import DIGEST, log_checkpoint_model
from sparsetune.tracking.lookup import download_run_checkpoint
from sparsetune.tracking.promotion_conditions import Candidate, Verdict
from sparsetune.tracking.registry import (
    CHAMPION,
    EVALUATION,
    OVERRIDE,
    RUN,
    LoggedIn,
    Registry,
    copy_checkpoint,
    previous_alias,
)
from sparsetune.tracking.run_logger import user_name
from sparsetune.tracking.store import store_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Move:
    """An alias that was moved.

    Args:
        name: of the registered model.
        alias: that was moved.
        version: that it names now.
        replaced: that it named before, and the previous alias names now; None where there was none.
    """

    name: str
    alias: str
    version: str
    replaced: str | None

    @property
    def uri(self) -> str:
        """The name that checkpoints are loaded by."""
        return f"models:/{self.name}@{self.alias}"


def promote(registry: Registry, verdict: Verdict, override: str | None = None) -> Move:
    """Register a candidate's checkpoint, unless it is, and let the alias name it.

    The steps are in an order that a crash between any two leaves in a state which the next call mends: a version
    without its alias is found again, and `previous` is set before the alias moves.

    Args:
        registry: the registered model.
        verdict: of `judge`; the alias must still name the champion of that time.
        override: why it is promoted although a condition isn't met; kept on the version.

    Raises:
        UsageError: the override is blank.
        GateError: a condition isn't met, and there is no override.
        RegistryError: the champion changed meanwhile, somebody else is promoting, or a version
            was made but couldn't get its alias.
        TrackingError: the registry is away or refuses.
    """
    if override is not None and not override.strip():
        raise UsageError("--override must give a reason, but is empty")
    if not verdict.passed and override is None:
        raise GateError(
            f"conditions are not met: {', '.join(verdict.unmet)}; meet them, or give a reason with --override"
        )
    with tempfile.TemporaryDirectory() as folder:
        made_of = _logged_model(registry, verdict.candidate, Path(folder))
    digest = verdict.candidate.result.config.policy.digest
    registry.make()
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
            _move(registry, verdict, number)
        except (TrackingError, RegistryError) as error:
            raise RegistryError(
                f"version {number} of {registry.name} was created, but cannot get the alias {verdict.alias}: {error}; "
                "promote the run again, which reuses this version"
            ) from error
    _tell_runs(registry.client, verdict.candidate, f"{registry.name}/{number}")
    replaced = verdict.champion if verdict.champion != number else registry.aliased(previous_alias(verdict.alias))
    return Move(registry.name, verdict.alias, number, replaced)


def rollback(registry: Registry, alias: str = CHAMPION) -> Move:
    """Swap what an alias names with what it named before; a second call swaps back.

    Raises:
        UsageError: MLflow refuses a name.
        RegistryError: there is no such model or alias, nothing to go back to, or somebody else moves aliases.
        TrackingError: the registry is away or refuses.
    """
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
    """Give the logged model of what the evaluation judged, made where the run, or the registry's side, has none."""
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
    """Say in Markdown what the version is and why it was promoted."""
    result = verdict.candidate.result
    sparsity = result.sparsity.overall
    lines = [
        f"Sparse attention thresholds for {verdict.candidate.model}, "
        f"sparsity {'unknown' if sparsity is None else f'{sparsity:.3f}'}, score {result.overall_score}/100.",
        "",
        *(f"- {'met' if one.met else '**not met**'}: {one.name}: {one.says}" for one in verdict.conditions),
    ]
    return "\n".join(lines)


def _write_override(registry: Registry, version: "ModelVersion", reason: str, verdict: Verdict) -> None:
    """Keep the reason on the version for good: behind earlier ones, never in their place."""
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


def _tell_runs(client: "MlflowClient", candidate: Candidate, version: str) -> None:
    for run_id in dict.fromkeys((candidate.run_id, candidate.evaluation_id)):
        try:
            with store_errors(f"write to run {run_id}"):
                client.set_tag(run_id, "promoted", version)
        except TrackingError as error:  # the promotion itself is done
            _LOG.warning("the run isn't marked as promoted: %s", error)
