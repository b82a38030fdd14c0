import pytest

from sparsetune.errors import TrackingError
from sparsetune.tracking.results import before_and_after, is_run, read_result, result_of
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
