"""Promotion: judging a run's checkpoint, moving a registered model's alias to it, and rolling back."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparsetune.errors import GateError, RegistryError, ResultError, TrackingError, UsageError
from sparsetune.evaluation.compare import Change, Comparison, compare
from sparsetune.evaluation.prompt import saves_seconds
from sparsetune.evaluation.report_markdown import seconds_text
from sparsetune.evaluation.result import EvaluationResult
from sparsetune.files import scratch_folder
from sparsetune.metrics import MIN_FOR_INTERVAL
from sparsetune.tracking.logged_model import DIGEST, log_checkpoint_model
from sparsetune.tracking.lookup import download_run_checkpoint
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
from sparsetune.tracking.results import Candidate, results_of_policy
from sparsetune.tracking.review import read_reviews
from sparsetune.tracking.run_logger import user_name
from sparsetune.tracking.store import store_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_LOG = logging.getLogger(__name__)

TOLERANCES = {"sparsity": 0.005, "psnr": 0.1, "frame_cosine": 0.0005}
"""Mean differences up to these count as none; dB for psnr, fractions for the others."""

QUALITY = ("psnr", "frame_cosine")
CHAMPION_CONDITION = "at least as good as the champion"
SPEED_CONDITION = "faster than dense by measurement"


@dataclass(frozen=True)
class Condition:
    name: str
    met: bool
    says: str


def gate_condition(result: EvaluationResult) -> Condition:
    """Check the gate, on prompts that the policy wasn't tuned on."""
    figures = [
        f"{one.name} {one.measured:.4g} {'>' if one.met else '<='} {one.bound:g}{f' {one.unit}' if one.unit else ''}"
        for one in result.gate.conditions
    ]
    figures += [failure for failure in result.gate.failures if failure.startswith(("every prompt", "at least"))]
    overlap, tuned = len(result.config.prompts_in_tune_set), result.config.use_tuned
    if overlap:
        figures.append(f"{overlap} of the prompts were tuned on: evaluate on others")
    if not tuned:
        figures.append("SpargeAttn's default thresholds were evaluated, no checkpoint")
    figures.append(f"{result.config.num_prompts} prompts")
    return Condition("gate on eval prompts", result.gate.passed and not overlap and tuned, "; ".join(figures))


def speed_condition(result: EvaluationResult) -> Condition:
    """Check that the denoising was measured to be faster than dense; for kernels that skip work."""
    seconds = result.seconds
    if seconds is None:
        return Condition(SPEED_CONDITION, False, "no seconds were measured; evaluate the checkpoint again")
    return Condition(SPEED_CONDITION, seconds.is_faster, seconds_text(seconds))


def champion_condition(candidate: EvaluationResult, champion: Iterable[EvaluationResult], named: str) -> Condition:
    """Compare a candidate with the champion, prompt by prompt: it must be at least as good.

    A checkpoint is there to save seconds while the gate holds, so 'at least as good' means all of:

    1. Every bound of the champion's gate that the champion meets, the candidate meets too.
    2. Its measured speed-up isn't lower; where the two weren't measured with one kernel on one device, its sparsity.
    3. Unless it is faster (or sparser), its psnr and frame_cosine aren't lower.

    'Lower' is judged on the paired differences, candidate minus champion: their mean is below minus the tolerance, and
    their 95% bootstrap interval is below 0. Over fewer than 6 prompts, too few for an interval, the mean decides alone.
    'Sparser' is the same upwards. Speed-ups differ beyond twice the larger noise of the two. `champion` has the results
    of its policy, read up to the first comparable one.
    """
    advice = (
        "evaluate both alike: `sparsetune eval --checkpoint models:/...@champion` with the candidate's settings "
        "and prompts, then promote again"
    )
    problem = ""
    for result in champion:
        try:
            return _compared(named, candidate, result, compare(result, candidate))
        except ResultError as error:
            reason = str(error).rpartition("; evaluate both alike")[0] or str(error)
            problem = problem or f"not comparable with {named}: {reason}"
    problem = problem or f"{named} has no evaluation that can be read"
    return Condition(CHAMPION_CONDITION, False, f"{problem}; {advice}")


def _compared(named: str, candidate: EvaluationResult, champion: EvaluationResult, comparison: Comparison) -> Condition:
    changes = {change.name: change for change in comparison.changes}
    lower = [metric for metric in TOLERANCES if metric in changes and _moved(changes[metric]) < 0]
    failures = _unmet_bounds(candidate, champion)
    figures = [_figures(changes[metric]) for metric in TOLERANCES if metric in changes]
    if (speeds := _speedups(candidate, champion)) is None:
        saves_more = "sparsity" in changes and _moved(changes["sparsity"]) > 0
        if "sparsity" in lower or "sparsity" not in changes:
            failures.append("its sparsity is lower")
    else:
        now, before, noise = speeds
        saves_more = now > before * (1.0 + noise)
        if now < before * (1.0 - noise):
            failures.append("it is slower")
        figures.insert(0, f"speed-up {now:.2f}x, was {before:.2f}x (noise {noise:.1%})")
    if not saves_more:
        failures += [f"its {metric} is lower" for metric in QUALITY if metric in lower]
    over = f"over {comparison.num_pairs} paired prompts"
    if comparison.num_pairs < MIN_FOR_INTERVAL:
        over += ", too few for an interval, so means decide"
    verdict = f"{'; '.join(failures)}: " if failures else ""
    return Condition(CHAMPION_CONDITION, not failures, f"{verdict}against {named} {over}: {', '.join(figures)}")


def _moved(change: Change) -> int:
    """Return -1 where a figure fell, 1 where it rose, 0 where it did neither beyond tolerance and chance."""
    pairs, tolerance = change.difference, TOLERANCES[change.name]
    few = len(pairs.differences) < MIN_FOR_INTERVAL
    fell = pairs.mean < -tolerance and (few or pairs.ci95_high < 0)
    rose = pairs.mean > tolerance and (few or pairs.ci95_low > 0)
    return rose - fell


def _unmet_bounds(candidate: EvaluationResult, champion: EvaluationResult) -> list[str]:
    measured = {one.name: one.measured for one in candidate.gate.conditions}
    found = []
    for one in champion.gate.conditions:
        if one.met and one.name not in measured:
            found.append(f"its {one.name} wasn't judged, and the champion's is > {one.bound:g} {one.unit}".rstrip())
        elif one.met and measured[one.name] <= one.bound:
            found.append(f"its {one.name} is {measured[one.name]:.4g}, and the champion's gate asks > {one.bound:g}")
    return found


def _speedups(candidate: EvaluationResult, champion: EvaluationResult) -> tuple[float, float, float] | None:
    """Return both measured speed-ups and the noise of their ratio; None where they can't be compared."""
    ran = [
        (result.config.backend, result.config.compile, result.environment.device_name)
        for result in (candidate, champion)
    ]
    untimed = candidate.seconds is None and champion.seconds is None
    now, before = _speed(candidate), _speed(champion)
    if untimed or now is None or before is None or ran[0] != ran[1]:
        return None
    return now[0], before[0], 2.0 * max(now[1], before[1])


def _speed(result: EvaluationResult) -> tuple[float, float] | None:
    """Return a measured speed-up and its noise; 1 where neither the kernel nor a cache skips work, None if unknown."""
    if result.seconds is not None:
        return result.seconds.speedup, result.seconds.noise
    return None if saves_seconds(result.config.backend, result.config.policy) else (1.0, 0.0)


def _figures(change: Change) -> str:
    digits = 2 if change.unit == "dB" else 4
    pairs, unit = change.difference, f" {change.unit}" if change.unit else ""
    return (
        f"{change.name} {pairs.mean:+.{digits}f}{unit} ({pairs.ci95_low:+.{digits}f} .. {pairs.ci95_high:+.{digits}f})"
    )


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate may get an alias; `champion` is the version that has it now, if any."""

    candidate: Candidate
    name: str
    alias: str
    champion: str | None
    conditions: tuple[Condition, ...]

    @property
    def passed(self) -> bool:
        return all(condition.met for condition in self.conditions)

    @property
    def unmet(self) -> tuple[str, ...]:
        return tuple(condition.name for condition in self.conditions if not condition.met)


def judge(registry: Registry, candidate: Candidate, alias: str = CHAMPION) -> Verdict:
    """Check whether a candidate may have an alias; raises UsageError where MLflow refuses the name or the alias."""
    champion = registry.aliased(alias)
    registry.check_alias(alias)
    config = candidate.result.config
    timed = saves_seconds(config.backend, config.policy)
    conditions = (
        gate_condition(candidate.result),
        *((speed_condition(candidate.result),) if timed else ()),
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
        return Condition(CHAMPION_CONDITION, True, "there is no champion yet")
    version = registry.version(champion)
    digest = str(version.tags.get(DIGEST, ""))
    if version.tags.get(RUN) == candidate.run_id and digest == candidate.result.config.policy.digest:
        return Condition(CHAMPION_CONDITION, True, f"it is the champion, version {champion}")
    results = results_of_policy(registry.client, digest, str(version.tags.get(EVALUATION)))
    return champion_condition(candidate.result, results, f"{registry.name} version {champion}")


@dataclass(frozen=True)
class Move:
    """An alias that was moved to a version; `replaced` is the one that it named before, if any."""

    name: str
    alias: str
    version: str
    replaced: str | None

    @property
    def uri(self) -> str:
        return f"models:/{self.name}@{self.alias}"


def promote(registry: Registry, verdict: Verdict, override: str | None = None) -> Move:
    """Register a candidate's checkpoint, unless it is, and move the alias to it.

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
    with scratch_folder() as folder:
        made_of = _logged_model(registry, verdict.candidate, folder)
    digest = verdict.candidate.result.config.policy.digest
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
            _move(registry, verdict, number)
        except (TrackingError, RegistryError) as error:
            raise RegistryError(
                f"version {number} of {registry.name} was created, but cannot get the alias {verdict.alias}: {error}; "
                "promote the run again, which reuses this version"
            ) from error
    _tag_runs(registry.client, verdict.candidate, f"{registry.name}/{number}")
    replaced = verdict.champion if verdict.champion != number else registry.aliased(previous_alias(verdict.alias))
    return Move(registry.name, verdict.alias, number, replaced)


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
        *(f"- {'met' if one.met else '**not met**'}: {one.name}: {one.says}" for one in verdict.conditions),
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
