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
from click.testing import CliRunner

from sparsetune.cli.main import main
from sparsetune.errors import GateError, RegistryError, TrackingError, UsageError
from sparsetune.tracking.promotion import Move, Verdict, judge, promote, rollback
from sparsetune.tracking.registry import (
    CLAIM,
    CLAIM_SECONDS,
    EVALUATION,
    GATE,
    OVERRIDE,
    RUN,
    Registry,
    _age,
    first_tag,
    open_registry,
)
from sparsetune.tracking.results import find_candidate
from tests.tracking.recorded import PSNRS, Place, Recorded, World


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
    assert met(verdict) == [True, False, True, True]
    assert f"run: sparsetune review {recorded.tuning[:8]}" in verdict.conditions[1].says
    place.reviewed(recorded, ok=False)
    rejected = verdict_of(place, recorded)
    assert met(rejected) == [True, False, True, True]
    assert "prompt_0_compare.mp4: content" in rejected.conditions[1].says
    with pytest.raises(GateError, match="conditions are not met: human review"):
        promote(place.registry(), rejected)
    assert len(versions(place)) == 1


def test_review_of_another_run_with_the_policy_counts(place: Place) -> None:
    reviewed, again = place.tuned(0.5, sparsity=0.5), place.evaluated(0.5, sparsity=0.5)
    assert met(verdict_of(place, again)) == [True, False, True, True]
    place.reviewed(reviewed)
    assert met(verdict_of(place, again)) == [True, True, True, True]
    place.reviewed(again, ok=False)
    assert met(verdict_of(place, reviewed)) == [True, False, True, True]


@pytest.mark.slow
def test_review_of_another_policy_does_not_count(place: Place, world: World) -> None:
    recorded = place.tuned(0.5, sparsity=0.5)
    place.reviewed(Recorded(recorded.tuning, recorded.evaluation, world.champion.result))
    assert met(verdict_of(place, recorded)) == [True, False, True, True]


@pytest.mark.slow
def test_gate_that_does_not_hold_is_refused(place: Place) -> None:
    recorded = place.tuned(0.5, psnrs=(30.0, 31.0))
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
    assert met(verdict) == [True, False, False, True]
    assert verdict.champion == "1"
    says = verdict.conditions[2].says
    assert says.startswith("its sparsity is lower: against demo-sparse version 1 over 6 paired prompts")
    assert "sparsity -0.0500" in says


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
def test_the_champion_s_policy_is_not_compared_with_itself(place: Place) -> None:
    condition = verdict_of(place, place.evaluated(0.9, psnrs=(30.0,))).conditions[-1]
    assert condition.met and condition.says == "it has the policy of the champion, version 1"


@pytest.mark.slow
def test_promoting_the_champion_again_changes_nothing(place: Place, world: World) -> None:
    verdict = verdict_of(place, world.champion)
    assert verdict.conditions[2].says == "it is the champion, version 1"
    assert promote(place.registry(), verdict) == Move("demo-sparse", "champion", "1", None, changed=False)
    assert len(versions(place)) == 1 and aliases(place) == {"champion": "1"}


@pytest.mark.slow
def test_promoting_another_run_with_the_champion_s_policy_changes_nothing(place: Place) -> None:
    again = place.evaluated(0.9, psnrs=(40.0,))
    assert promoted(place, again, "to see") == Move("demo-sparse", "champion", "1", None, changed=False)
    assert len(versions(place)) == 1 and aliases(place) == {"champion": "1"}
    text = CliRunner().invoke(main, ["promote", again.tuning, "--override", "to see"]).stdout
    assert "is version 1 already, with the same policy; nothing was changed" in text


def test_second_of_two_who_promote_at_once_is_asked_to_compare_again(place: Place, world: World) -> None:
    one, other = verdict_of(place, world.sparser), verdict_of(place, world.sparsest)
    promote(place.registry(), one)
    with pytest.raises(RegistryError, match=r"changed from version 1 to version 2 during the comparison"):
        promote(place.registry(), other)
    assert aliases(place) == {"champion": "2", "previous": "1"}
    assert len(versions(place)) == 2  # nothing half-registered


@pytest.mark.parametrize("name", ["Ada's model", 'a"b', "a/b", "a:b", "a@b", " a", "..", "", "x" * 300])
def test_a_name_that_a_filter_or_uri_cannot_hold_is_refused_before_anything_is_made(place: Place, name: str) -> None:
    with pytest.raises(UsageError, match="--name must begin with a letter or digit"):
        open_registry(place.client, place.registry().store, "demo", name or " ")
    assert [one.name for one in place.client.search_registered_models()] == ["demo-sparse"]


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


def test_claim_from_a_clock_ahead_turns_nobody_away_for_longer_than_any_other(
    place: Place, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsetune.tracking.registry.CLAIM_SECONDS", 2.0)
    place.client.set_registered_model_tag("demo-sparse", f"{CLAIM}other", f"{time.time() + 86_400:.0f}")
    started = time.monotonic()
    with place.registry().claimed():
        assert 2.0 <= time.monotonic() - started < 60.0
    model = place.registry().model()
    assert model is not None and not [tag for tag in model.tags if tag.startswith(CLAIM)]


@pytest.mark.parametrize(("lives", "host", "is_over"), [(False, "", True), (True, "", False), (False, "other", False)])
def test_a_claim_of_this_host_ends_with_its_process(lives: bool, host: str, is_over: bool) -> None:
    with subprocess.Popen(["true"]) as dead:
        dead.wait()
    process = os.getpid() if lives else dead.pid
    assert (_age(f"{time.time():.0f} {host or socket.gethostname()}:{process}") >= CLAIM_SECONDS) is is_over
    assert _age(f"{time.time() - 500:.0f} {host or socket.gethostname()}:{process}") >= CLAIM_SECONDS


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


def lower(by: float) -> tuple[float, ...]:
    return tuple(psnr - by for psnr in PSNRS)


@pytest.mark.slow
def test_a_row_of_candidates_is_compared_with_the_first_one_too(place: Place) -> None:
    """Each loses 0.3 dB against its champion, less than the margin of 0.5 dB; the second would lose 0.6 dB in all."""
    second = place.reviewed(place.tuned(0.8, psnrs=lower(0.3)))
    assert promoted(place, second).version == "2"
    verdict = verdict_of(place, place.reviewed(place.tuned(0.7, psnrs=lower(0.6))))
    assert (verdict.champion, verdict.first) == ("2", "1")
    assert verdict.unmet == ("no worse than the first champion under this gate",)
    assert "its psnr is lower: against demo-sparse version 1 over 6 paired prompts" in verdict.conditions[-2].says


@pytest.mark.slow
def test_another_gate_begins_a_new_row(place: Place) -> None:
    second = place.reviewed(place.tuned(0.8, psnrs=lower(0.3), bound=34.0))
    assert verdict_of(place, second).first is None
    promoted(place, second)
    assert versions(place)[-1].tags[GATE] == "mean psnr > 34 dB"
    assert versions(place)[-1].tags[first_tag("champion")] == "2"
    verdict = verdict_of(place, place.reviewed(place.tuned(0.7, psnrs=lower(0.6), bound=34.0)))
    assert verdict.passed and verdict.first == "2"


@pytest.mark.slow
def test_without_the_first_version_the_champion_takes_its_place(place: Place) -> None:
    promoted(place, place.reviewed(place.tuned(0.8, psnrs=lower(0.3))))
    place.client.delete_registered_model_alias("demo-sparse", "previous")
    place.client.delete_model_version("demo-sparse", "1")
    assert verdict_of(place, place.tuned(0.7, psnrs=lower(0.6))).first == "2"


@pytest.mark.slow
def test_a_champion_of_an_earlier_version_of_the_tool_is_the_first(place: Place, world: World) -> None:
    for tag in (GATE, first_tag("champion")):
        place.client.delete_model_version_tag("demo-sparse", "1", tag)
    assert verdict_of(place, world.sparser).first == "1"


@pytest.mark.slow
def test_without_a_champion_the_prompts_that_a_later_comparison_takes_are_said(place: Place) -> None:
    condition = verdict_of(place, place.tuned(0.8), name="other").conditions[-1]
    assert condition.met
    assert "takes about 27 prompts (--num-prompts) to show a mean loss under 0.5 dB" in condition.says
