import pytest

from sparsetune.errors import TrackingError
from sparsetune.tracking.results import before_and_after, is_run, list_runs, read_result, result_of
from tests.tracking.recorded import Place, World


def test_result_is_found_by_run_beginning_of_its_id_and_registered_model(shared_place: Place, world: World) -> None:
    champion = world.champion
    for reference in (
        champion.tuning,
        f"runs:/{champion.evaluation}",
        champion.evaluation[:10],
        "models:/demo-sparse/1",
    ):
        assert is_run(reference)
        assert result_of(shared_place.client, reference) == champion.result
    assert result_of(shared_place.client, "latest", "demo") == world.unreviewed.result


def test_latest_is_the_newest_tuning_with_a_winner_of_that_model(place: Place, world: World) -> None:
    place.run("tuning", "tune", {"best.trial": "none"})
    assert result_of(place.client, "latest") == world.unreviewed.result
    with pytest.raises(TrackingError, match=r"no tuning run of the model other has a winner.*tune --model other"):
        result_of(place.client, "latest", "other")


def test_before_and_after_are_a_tuning_s_two_evaluations(shared_place: Place, world: World) -> None:
    for reference in (world.sparser.tuning, world.sparser.evaluation):
        before, after = before_and_after(shared_place.client, reference)
        assert not before.config.use_tuned
        assert after == world.sparser.result


def test_before_that_is_missing_is_said(place: Place, world: World) -> None:
    with pytest.raises(TrackingError, match="has no evaluation of SpargeAttn's default thresholds"):
        before_and_after(place.client, world.champion.tuning)
    with pytest.raises(TrackingError, match="is an evaluation, which has no before and after"):
        before_and_after(place.client, place.evaluated(0.5).tuning)


def test_evaluation_that_never_ended_is_said(place: Place) -> None:
    with pytest.raises(TrackingError, match=r"has no result\.json: its evaluation didn't finish"):
        read_result(place.client, place.run("evaluation", "eval", {}))


def test_runs_are_listed_best_first_with_figures_and_aliases(place: Place, world: World) -> None:
    failed = place.evaluated(0.5, psnrs=(30.0, 31.0), sparsity=0.9)
    unfinished = place.run("tuning", "tune 99", {})
    rows = list_runs(place.store)
    best = [world.unreviewed, world.sparsest, world.sparser, world.champion]
    assert [row.run_id for row in rows] == [*(one.tuning for one in best), failed.tuning, unfinished]
    champion = rows[3]
    assert champion.aliases == ("demo-sparse@champion",)
    assert (champion.sparsity, champion.psnr, champion.score) == (0.25, 38.5, 85.0)
    assert (champion.kind, champion.gate, champion.review) == ("tuning", "passed", "ok")
    assert rows[4].gate == "failed" and rows[4].review is None
    assert rows[5].psnr is None and rows[5].status == "RUNNING"


def test_runs_of_a_reviewed_policy_are_listed_with_its_review(place: Place) -> None:
    place.reviewed(place.tuned(0.5), ok=False)
    tuned, evaluated, other = place.tuned(0.5), place.evaluated(0.5), place.evaluated(0.5, model="other")
    reviews = {row.run_id: row.review for row in list_runs(place.store)}
    assert (reviews[tuned.tuning], reviews[evaluated.tuning], reviews[other.tuning]) == ("rejected", "rejected", None)


def test_runs_of_another_model_and_trials_and_other_tools_are_left_out(place: Place, world: World) -> None:
    place.foreign()
    place.run("trial", "trial 1", {})
    other = place.run("evaluation", "eval", {"sparsetune.model": "other"})
    assert [row.run_id for row in list_runs(place.store, "other")] == [other]
    assert len(list_runs(place.store)) == 5
