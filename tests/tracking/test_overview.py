from sparsetune.tracking.results import list_runs
from tests.tracking.recorded import Place, World


def test_runs_are_listed_best_first_with_figures_and_aliases(place: Place, world: World) -> None:
    failed = place.evaluated(0.5, psnrs=(30.0, 31.0), sparsity=0.9)
    unfinished = place.run("tuning", "tune 99", {})
    rows = list_runs(place.client)
    best = [world.unreviewed, world.sparsest, world.sparser, world.champion]
    assert [row.run_id for row in rows] == [*(one.tuning for one in best), failed.tuning, unfinished]
    champion = rows[3]
    assert champion.aliases == ("demo-sparse@champion",)
    assert (champion.sparsity, champion.psnr, champion.score) == (0.25, 38.5, 85.0)
    assert (champion.kind, champion.gate, champion.review) == ("tuning", "passed", "ok")
    assert rows[4].gate == "failed" and rows[4].review is None
    assert rows[5].psnr is None and rows[5].status == "RUNNING"


def test_runs_of_another_model_and_trials_and_other_tools_are_left_out(place: Place, world: World) -> None:
    place.foreign()
    place.run("trial", "trial 1", {})
    other = place.run("evaluation", "eval", {"sparsetune.model": "other"})
    assert [row.run_id for row in list_runs(place.client, "other")] == [other]
    assert len(list_runs(place.client)) == 5
