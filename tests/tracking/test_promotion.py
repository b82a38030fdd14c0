import json
import multiprocessing
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest

from sparsetune.errors import GateError, RegistryError, TrackingError, UsageError
from sparsetune.evaluation.result import EvaluationResult
from sparsetune.tracking.promotion import (
    Condition,
    Move,
    Verdict,
    champion_condition,
    gate_condition,
    judge,
    promote,
    rollback,
    speed_condition,
)
from sparsetune.tracking.registry import CLAIM, EVALUATION, OVERRIDE, RUN, Registry, _is_over
from sparsetune.tracking.results import find_candidate
from tests.tracking.recorded import PSNRS, Place, Recorded, World, result_of


def verdict_of(place: Place, recorded: Recorded, name: str = "demo-sparse", alias: str = "champion") -> Verdict:
    return judge(place.registry(name), find_candidate(place.client, recorded.tuning), alias)


def promoted(place: Place, recorded: Recorded, override: str | None = None) -> Move:
    return promote(place.registry(), verdict_of(place, recorded), override)


def met(verdict: Verdict) -> list[bool]:
    return [condition.met for condition in verdict.conditions]


def aliases(place: Place) -> dict[str, str]:
    model = place.registry().model()
    return {} if model is None else {alias: str(version) for alias, version in model.aliases.items()}


def versions(place: Place) -> list[Any]:
    return sorted(place.client.search_model_versions("name = 'demo-sparse'"), key=lambda one: int(one.version))


def test_reviewed_winner_becomes_the_champion_and_its_version_tells_where_it_is_from(world: World) -> None:
    place, recorded = Place(world.database, world.database.parent), world.champion
    assert aliases(place) == {"champion": "1"}
    (version,) = versions(place)
    assert version.run_id == version.tags[RUN] == recorded.tuning
    assert version.tags[EVALUATION] == recorded.evaluation
    assert "- met: human review: ok by Ada" in version.description
    assert place.tags(recorded.tuning)["promoted"] == "demo-sparse/1"
    model = place.client.get_logged_model(version.source.removeprefix("models:/"))
    assert model.source_run_id == recorded.tuning
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "demo-sparse", "version": "1"}]


def test_without_a_review_or_with_a_rejection_it_is_refused(place: Place) -> None:
    recorded = place.tuned(0.5, sparsity=0.5)
    verdict = verdict_of(place, recorded)
    assert met(verdict) == [True, False, True]
    assert f"sparsetune review {recorded.tuning[:8]} --ok --reviewer NAME" in verdict.conditions[1].says
    place.reviewed(recorded, ok=False)
    rejected = verdict_of(place, recorded)
    assert met(rejected) == [True, False, True]
    assert "prompt_0_compare.mp4: content" in rejected.conditions[1].says
    with pytest.raises(GateError, match="conditions are not met: human review"):
        promote(place.registry(), rejected)
    assert len(versions(place)) == 1


@pytest.mark.slow
def test_review_of_another_policy_does_not_count(place: Place, world: World) -> None:
    recorded = place.tuned(0.5, sparsity=0.5)
    place.reviewed(Recorded(recorded.tuning, recorded.evaluation, world.champion.result))
    assert met(verdict_of(place, recorded)) == [True, False, True]


@pytest.mark.slow
def test_gate_that_does_not_hold_is_refused(place: Place) -> None:
    recorded = place.tuned(psnrs=(30.0, 31.0))
    assert verdict_of(place, recorded, name="other").unmet == ("gate on eval prompts", "human review")


@pytest.mark.slow
def test_sparser_one_replaces_the_champion_which_keeps_previous(place: Place, world: World) -> None:
    assert promoted(place, world.sparser) == Move("demo-sparse", "champion", "2", "1")
    assert aliases(place) == {"champion": "2", "previous": "1"}
    assert rollback(place.registry()) == Move("demo-sparse", "champion", "1", "2")
    assert aliases(place) == {"champion": "1", "previous": "2"}
    assert rollback(place.registry()).version == "2"  # a second one swaps back


@pytest.mark.slow
def test_one_that_is_less_sparse_is_refused_with_the_figures(place: Place) -> None:
    verdict = verdict_of(place, place.tuned(0.95, sparsity=0.20))
    assert met(verdict) == [True, False, False]
    assert verdict.champion == "1"
    says = verdict.conditions[2].says
    assert says.startswith("its sparsity is lower: against demo-sparse version 1 over 6 paired prompts")
    assert "sparsity -0.0500 (-0.0500 .. -0.0500)" in says


@pytest.mark.slow
def test_champion_that_was_judged_otherwise_is_compared_by_a_newer_evaluation_of_its_policy(
    place: Place, world: World
) -> None:
    candidate = place.tuned(0.5, sparsity=0.3, seed=7)
    missing = verdict_of(place, candidate).conditions[2]
    assert not missing.met and "not comparable with demo-sparse version 1" in missing.says
    place.evaluated(0.9, seed=7)
    assert verdict_of(place, candidate).conditions[2].met


@pytest.mark.slow
def test_override_is_kept_on_the_version_behind_earlier_ones(place: Place, world: World) -> None:
    promoted(place, world.unreviewed, "demo on Monday")
    promoted(place, world.unreviewed, "and on Tuesday")
    version = versions(place)[-1]
    first, second = version.tags[OVERRIDE].splitlines()
    assert first.endswith("although not met: human review: demo on Monday")
    assert second.endswith("and on Tuesday")
    assert "**not met**: human review" in version.description


@pytest.mark.slow
def test_override_that_was_not_needed_is_not_kept(place: Place, world: World) -> None:
    promoted(place, world.sparser, "just in case")
    assert OVERRIDE not in versions(place)[-1].tags


def test_override_must_give_a_reason(place: Place, world: World) -> None:
    with pytest.raises(UsageError, match="--override must give a reason, but is empty"):
        promoted(place, world.unreviewed, "  ")
    assert len(versions(place)) == 1


@pytest.mark.slow
def test_promoting_the_champion_again_changes_nothing(place: Place, world: World) -> None:
    verdict = verdict_of(place, world.champion)
    assert verdict.conditions[2].says == "it is the champion, version 1"
    assert promote(place.registry(), verdict) == Move("demo-sparse", "champion", "1", None)
    assert len(versions(place)) == 1 and aliases(place) == {"champion": "1"}


def test_second_of_two_who_promote_at_once_is_asked_to_compare_again(place: Place, world: World) -> None:
    one, other = verdict_of(place, world.sparser), verdict_of(place, world.sparsest)
    promote(place.registry(), one)
    with pytest.raises(RegistryError, match=r"changed from version 1 to version 2 during the comparison"):
        promote(place.registry(), other)
    assert aliases(place) == {"champion": "2", "previous": "1"}
    assert len(versions(place)) == 2  # nothing half-registered


def test_claim_of_another_promotion_turns_away_and_that_of_a_dead_one_lapses(place: Place, world: World) -> None:
    verdict, registry = verdict_of(place, world.sparser), place.registry()
    place.client.set_registered_model_tag("demo-sparse", f"{CLAIM}other", f"{time.time():.0f}")
    with pytest.raises(RegistryError, match="another promotion or rollback of demo-sparse is in progress"):
        promote(registry, verdict)
    assert len(versions(place)) == 1
    place.client.set_registered_model_tag("demo-sparse", f"{CLAIM}other", f"{time.time() - 500:.0f}")
    promote(registry, verdict)
    model = registry.model()
    assert model is not None and not [tag for tag in model.tags if tag.startswith(CLAIM)]


@pytest.mark.parametrize(("lives", "host", "is_over"), [(False, "", True), (True, "", False), (False, "other", False)])
def test_a_claim_of_this_host_ends_with_its_process(lives: bool, host: str, is_over: bool) -> None:
    with subprocess.Popen(["true"]) as dead:
        dead.wait()
    process = os.getpid() if lives else dead.pid
    assert _is_over(f"{time.time():.0f} {host or socket.gethostname()}:{process}") is is_over
    assert _is_over(f"{time.time() - 500:.0f} {host or socket.gethostname()}:{process}")


def _promote_in_a_process(database: Path, folder: Path, run: str, start: Any, outcomes: Any) -> None:
    place = Place(database, folder)
    verdict = judge(place.registry(), find_candidate(place.client, run))
    start.wait(60)
    try:
        outcomes.put(promote(place.registry(), verdict).version)
    except RegistryError as error:
        outcomes.put(str(error))


@pytest.mark.slow  # two more processes import MLflow and PyTorch
def test_of_two_processes_that_promote_at_the_same_moment_at_most_one_does(
    place: Place, world: World, own_store: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    start, outcomes = context.Barrier(2), context.Queue()
    workers = [
        context.Process(target=_promote_in_a_process, args=(own_store, place.folder, run, start, outcomes))
        for run in (world.sparser.tuning, world.sparsest.tuning)
    ]
    for worker in workers:
        worker.start()
    results = [outcomes.get(timeout=90) for _ in workers]
    for worker in workers:
        worker.join(30)
    done = [one for one in results if one.isdigit()]
    assert len(done) <= 1
    assert len(versions(place)) == 1 + len(done)
    assert aliases(place) == ({"champion": "2", "previous": "1"} if done else {"champion": "1"})


@pytest.mark.parametrize(
    "step", ["set_registered_model_alias", pytest.param("set_logged_model_tags", marks=pytest.mark.slow)]
)
def test_version_that_could_not_get_its_alias_is_named_and_the_next_call_takes_it_up(
    place: Place, world: World, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def refuse(*_: object) -> None:
        raise ConnectionError("the server went away")

    message = "version 2 of demo-sparse was created, but cannot get the alias champion: .*the server went away"
    with monkeypatch.context() as patch, pytest.raises(RegistryError, match=message):
        patch.setattr(place.client, step, refuse)
        promote(place.registry(), verdict_of(place, world.sparser))
    assert aliases(place) == {"champion": "1"} and len(versions(place)) == 2
    assert promoted(place, world.sparser).version == "2"
    assert aliases(place) == {"champion": "2", "previous": "1"} and len(versions(place)) == 2


@pytest.mark.slow
def test_crash_between_version_and_alias_leaves_a_version_that_the_next_call_takes_up(
    place: Place, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict = verdict_of(place, world.sparser)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Registry, "set_alias", die)
        promote(place.registry(), verdict)
    assert len(versions(place)) == 2
    assert promoted(place, world.sparser).version == "2"


@pytest.mark.slow
def test_new_winner_of_a_resumed_tuning_is_a_version_of_its_own(place: Place, world: World) -> None:
    newer = place.reviewed(place.tuned(0.5, sparsity=0.3))
    place.client.set_tag(newer.evaluation, "mlflow.parentRunId", world.champion.tuning)
    assert promoted(place, world.champion).version == "2"
    first, second = versions(place)
    assert first.run_id == second.run_id == world.champion.tuning


def test_rollback_without_anything_to_go_back_to_is_an_error(place: Place) -> None:
    with pytest.raises(RegistryError, match="there is no registered model other-sparse"):
        rollback(place.registry("other-sparse"))
    with pytest.raises(RegistryError, match="there is no alias previous"):
        rollback(place.registry())
    with pytest.raises(RegistryError, match="has no alias staging, only champion"):
        rollback(place.registry(), "staging")


@pytest.mark.slow
def test_other_aliases_keep_a_previous_of_their_own(place: Place, world: World) -> None:
    for recorded in (world.champion, world.sparser):
        promote(place.registry(), verdict_of(place, recorded, alias="staging"))
    assert aliases(place) == {"champion": "1", "staging": "2", "previous-staging": "1"}


@pytest.mark.parametrize(
    ("name", "alias", "message"),
    [
        ("a/b", "champion", r"MLflow rejects --name 'a/b': .*cannot contain"),
        ("demo-sparse", "no spaces", r"MLflow rejects --alias 'no spaces'"),
        ("another", "no spaces", r"MLflow rejects --alias 'no spaces'"),
        ("demo-sparse", "latest", "--alias must not be latest"),
        ("demo-sparse", "v7", "--alias must not look like a version number, got v7"),
        ("demo-sparse", "previous", "--alias must not be previous: `sparsetune rollback` uses it"),
        ("demo-sparse", "previous-staging", "--alias must not be previous-staging"),
    ],
)
def test_names_that_mlflow_refuses_are_told_before_anything_is_registered(
    shared_place: Place, world: World, name: str, alias: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        verdict_of(shared_place, world.sparser, name=name, alias=alias)


def test_candidates_that_are_none_say_so(place: Place, world: World) -> None:
    with pytest.raises(TrackingError, match="is another tool's"):
        find_candidate(place.client, place.foreign())
    trial = place.run("trial", "trial 1", {"mlflow.parentRunId": world.champion.tuning})
    with pytest.raises(
        TrackingError, match=f"is a trial, which has no evaluation; give its tuning run {world.champion.tuning}"
    ):
        find_candidate(place.client, trial)
    bare = place.run("tuning", "tune", {"best.trial": "none"})
    with pytest.raises(TrackingError, match="has no evaluation of the winner"):
        find_candidate(place.client, bare)


@pytest.mark.slow
def test_mlflow_s_global_state_is_as_it_was(place: Place, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    promoted(place, world.sparser)
    assert os.environ["MLFLOW_TRACKING_URI"] == mlflow.get_tracking_uri() == "http://127.0.0.1:9"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert not mlflow.is_tracking_uri_set()


def shifted(by: float) -> tuple[float, ...]:
    return tuple(psnr + by for psnr in PSNRS)


def against(candidate: EvaluationResult, champion: EvaluationResult) -> Condition:
    return champion_condition(candidate, [champion], "demo-sparse version 3")


def changed(result: EvaluationResult, **sections: dict[str, object]) -> EvaluationResult:
    value = result.to_dict()
    for name, section in sections.items():
        value[name] |= section
    return EvaluationResult.model_validate(value)


def test_gate_that_holds_on_unseen_prompts_is_met_with_its_figures() -> None:
    condition = gate_condition(result_of())
    assert condition.met
    assert condition.says == "mean psnr 38.5 > 35 dB; 6 prompts"


def test_gate_that_does_not_hold_says_by_what() -> None:
    condition = gate_condition(result_of(shifted(-5)))
    assert not condition.met
    assert "mean psnr 33.5 <= 35 dB" in condition.says


def test_gate_on_prompts_that_were_tuned_on_counts_for_nothing() -> None:
    condition = gate_condition(result_of(prompts_in_tune_set=["a red circle, number 0"]))
    assert not condition.met
    assert "1 of the prompts were tuned on" in condition.says


def test_default_thresholds_are_no_candidate() -> None:
    assert not gate_condition(result_of(use_tuned=False)).met


@pytest.mark.parametrize(
    ("psnr", "sparsity", "met"),
    [
        (0.0, 0.25, True),  # the same
        (0.5, 0.25, True),  # better quality at the same sparsity
        (-0.05, 0.25, True),  # worse by less than the tolerance
        (-0.5, 0.25, False),  # worse quality at the same sparsity
        (-2.0, 0.30, True),  # sparser: quality may decrease down to the gate
        (-4.0, 0.30, False),  # sparser, but not within the champion's gate
        (3.0, 0.20, False),  # better quality doesn't make up for less sparsity
    ],
)
def test_at_least_as_good_means_sparser_within_the_gate_or_as_sparse_and_no_worse(
    psnr: float, sparsity: float, met: bool
) -> None:
    condition = against(result_of(shifted(psnr), sparsity), result_of(PSNRS, 0.25))
    assert condition.met is met, condition.says
    assert "demo-sparse version 3 over 6 paired prompts" in condition.says


def test_difference_within_chance_is_none() -> None:
    mixed = (38.0, 35.0, 40.0, 37.0, 42.0, 36.0)  # half of them better, half worse, 0.5 dB worse on average
    assert against(result_of(mixed), result_of(PSNRS)).met


def test_over_few_prompts_the_mean_decides() -> None:
    condition = against(result_of((37.0, 35.5)), result_of((36.0, 37.0)))
    assert not condition.met
    assert "too few for an interval" in condition.says


def test_bound_that_the_champion_meets_must_be_judged_and_met() -> None:
    worst = {"name": "worst prompt's psnr", "unit": "dB", "measured": 36.0, "bound": 30.0, "met": True}
    champion = result_of()
    stricter = changed(champion, gate={"conditions": [*champion.to_dict()["gate"]["conditions"], worst]})
    condition = against(result_of(), stricter)
    assert not condition.met
    assert "its worst prompt's psnr wasn't judged, and the champion's is > 30 dB" in condition.says


def timed(
    result: EvaluationResult, speedup: float, backend: str = "sparge", low: float | None = None
) -> EvaluationResult:
    value = result.to_dict()
    value["config"]["backend"] = backend
    value["seconds"] = {
        "dense": 3.0 * speedup, "sparse": 3.0, "speedup": speedup, "ci95_low": low or speedup - 0.02,
        "ci95_high": speedup + 0.02, "noise": 0.005, "attention_share": 0.6, "ceiling": 2.5,
    }  # fmt: skip
    return EvaluationResult.model_validate(value)


def test_where_both_were_timed_with_one_kernel_the_faster_is_better_whatever_its_sparsity() -> None:
    slower, faster = timed(result_of(PSNRS, 0.25), 1.4), timed(result_of(PSNRS, 0.2), 1.5)
    condition = against(faster, slower)
    assert condition.met
    assert "speed-up 1.50x, was 1.40x (noise 1.0%)" in condition.says
    assert against(slower, faster).says.startswith("it is slower: ")
    assert not against(timed(result_of(PSNRS, 0.2), 1.5, "flex"), slower).met


def cached(result: EvaluationResult, speedup: float) -> EvaluationResult:
    """The result with a step cache, on a CPU, where only policies with a cache are timed."""
    policy = result.config.policy.model_copy(update={"cache": "mag 0.1, max_skips 1"})
    config = result.config.model_copy(update={"policy": policy})
    return timed(result.model_copy(update={"config": config}), speedup, backend="reference")


def on_cpu(result: EvaluationResult) -> EvaluationResult:
    return result.model_copy(update={"config": result.config.model_copy(update={"backend": "reference"})})


def test_beside_a_cache_a_policy_without_one_is_as_fast_as_dense_on_a_cpu() -> None:
    plain = on_cpu(result_of())
    condition = champion_condition(cached(result_of(), 1.5), [plain], "version 1")
    assert condition.met
    assert "speed-up 1.50x, was 1.00x" in condition.says
    condition = champion_condition(plain, [cached(result_of(), 1.5)], "version 1")
    assert not condition.met
    assert "it is slower" in condition.says


def test_speed_ups_within_the_noise_are_equal_so_that_quality_decides() -> None:
    champion = timed(result_of(PSNRS, 0.25), 1.5)
    assert against(timed(result_of(PSNRS, 0.25), 1.49), champion).met
    assert not against(timed(result_of(shifted(-1), 0.25), 1.505), champion).met
    assert against(timed(result_of(shifted(-1), 0.25), 1.6), champion).met


def test_a_policy_must_be_measured_to_be_faster_than_dense() -> None:
    assert speed_condition(timed(result_of(), 1.5)).met
    assert "1.50 times as fast" in speed_condition(timed(result_of(), 1.5)).says
    slower = speed_condition(timed(result_of(), 0.35))
    assert not slower.met and "0.35 times as fast, slower than dense" in slower.says
    unclear = speed_condition(timed(result_of(), 1.01, low=0.99))
    assert not unclear.met and "no difference beyond the noise" in unclear.says
    assert "no seconds were measured" in speed_condition(result_of()).says


def test_what_cannot_be_compared_says_why_and_what_to_do() -> None:
    condition = against(result_of(seed=7), result_of())
    assert not condition.met
    assert "not comparable with demo-sparse version 3" in condition.says
    assert "seed" in condition.says and "sparsetune eval --checkpoint models:/...@champion" in condition.says


def test_the_first_comparable_evaluation_of_the_champion_is_taken() -> None:
    assert champion_condition(result_of(seed=7), [result_of(), result_of(seed=7)], "it").met


def test_champion_without_an_evaluation_is_said() -> None:
    assert "it has no evaluation that can be read" in champion_condition(result_of(), [], "it").says
