import json
import re
from pathlib import Path
from queue import Queue

import pytest
from click.testing import CliRunner, Result

from sparsetune.checkpoint import Checkpoint, Manifest, save_checkpoint
from sparsetune.cli.main import main
from sparsetune.models.loading import load_pipeline
from sparsetune.models.pipelines import demo_config
from sparsetune.models.sparsify import default_policy
from sparsetune.tracking.review import CHECKLIST, read_reviews
from sparsetune.tracking.review_server import ReviewServer
from tests.tracking.recorded import Place, World
from tests.tracking.review_client import page_data, post, reviewing


def run(*args: str, status: int, answers: str | None = None) -> Result:
    result = CliRunner().invoke(main, list(args), input=answers)
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.stderr
    return result


def test_dry_run_prints_each_condition_with_its_figures_and_changes_nothing(shared_place: Place, world: World) -> None:
    printed = run("promote", world.sparser.tuning[:8], "--dry-run", status=0).stdout
    head, gate, review, champion, enough, end = printed.splitlines()
    assert head == f"run {world.sparser.tuning} for demo-sparse@champion"
    assert gate.startswith("  met      gate on eval prompts: mean psnr 38.5 > 35 dB")
    assert review.startswith("  met      human review: ok by Ada")
    assert champion.startswith(
        "  met      no worse than the champion: against demo-sparse version 1 over 6 paired prompts: psnr +0.00 dB, "
        "at least +0.00 dB with 95% confidence, margin 0.5 dB; worst prompt +0.00 dB, margin 3 dB; sparsity +0.0500"
    )
    assert enough == (
        "  met      enough prompts to compare with the champion: 6 decide, where about 2 let an equal candidate pass; "
        "they can detect a mean loss of 0.00 dB"
    )
    assert end == "all checks passed; nothing was changed"
    assert shared_place.registry().aliased("champion") == "1"


def test_refusal_is_status_3_with_the_command_that_records_the_review(shared_place: Place, world: World) -> None:
    result = run("promote", "latest", "--model", "demo", status=3)
    assert f"run: sparsetune review {world.unreviewed.tuning[:8]}" in result.stdout
    assert "failed checks: human review; run `sparsetune review" in result.stderr
    assert run("promote", "latest", "--dry-run", status=3).stdout == result.stdout


def test_reviewed_promoted_and_rolled_back(place: Place, world: World) -> None:
    promoted = run("promote", world.sparser.tuning, status=0).stdout
    assert promoted.splitlines()[-1] == "models:/demo-sparse@champion is version 2, was version 1"
    listed = {row["run_id"]: row["aliases"] for row in json.loads(run("runs", "--json", status=0).stdout)}
    assert listed[world.sparser.tuning] == ["demo-sparse@champion"]
    assert listed[world.champion.tuning] == ["demo-sparse@previous"]
    back = run("rollback", status=0).stdout
    assert back == "models:/demo-sparse@champion is version 1, was version 2\n"
    assert json.loads(run("rollback", "--json", status=0).stdout) == {
        "uri": "models:/demo-sparse@champion", "version": "2", "replaced": "1",
    }  # fmt: skip


@pytest.mark.slow
def test_override_promotes_and_says_that_it_is_kept(place: Place, world: World) -> None:
    result = run("promote", world.unreviewed.tuning, "--override", "for Monday", "--alias", "staging", status=0)
    assert result.stdout.splitlines()[-2:] == [
        "models:/demo-sparse@staging is version 2",
        "the override is recorded",
    ]


def test_json_is_alone_on_stdout(shared_place: Place, world: World) -> None:
    verdict = json.loads(run("promote", "latest", "--json", status=3).stdout)
    assert verdict["passed"] is False and verdict["promoted"] is None
    assert [condition["met"] for condition in verdict["conditions"]] == [True, False, True, True]


def test_margins_are_options(shared_place: Place, world: World) -> None:
    printed = run("promote", world.sparser.tuning, "--dry-run", "--margin-db", "0.25", status=0).stdout
    assert "margin 0.25 dB" in printed
    error = run("promote", "latest", "--margin-speed", "2", status=2).stderr
    assert "--margin-speed must be less than 1, got 2" in error


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (("promote", "xyz"), 2, "'xyz' is not a run: give its id"),
        (("promote", "latest", "--name", "a:b"), 2, "-_.()+, got 'a:b'; choose another"),
        (("promote", "latest", "--model", "cogvideox-2b"), 2, "no tuning run of the model cogvideox-2b"),
        (("rollback", "--model", "cogvideox-2b"), 1, "there is no registered model cogvideox-2b-sparse"),
        (("rollback",), 1, "cannot roll back demo-sparse@champion: there is no alias previous"),
        (
            ("review", "latest"),
            2,
            "a review without a terminal or a display needs --ok or --reject, and --reviewer NAME",
        ),
        (("review", "latest", "--ok"), 2, "--ok and --reject need --reviewer NAME"),
        (("compare", "--before-after", "latest"), 1, "has no evaluation of SpargeAttn's default thresholds"),
        (("compare", "latest"), 2, "compare needs BEFORE and AFTER, or --before-after RUN"),
        (("compare", "a", "b", "--before-after", "c"), 2, "--before-after cannot be combined with BEFORE"),
        (("checkpoint", "show", "models:/demo-sparse@none"), 2, "has no alias none, only champion"),
        (("generate", "a circle", "--checkpoint", "runs:/" + "a" * 32), 2, "cannot find run"),
    ],
)
def test_what_cannot_be_done_is_one_line(shared_place: Place, args: tuple[str, ...], status: int, message: str) -> None:
    output = run(*args, status=status).stderr
    assert message in output and output.count("\n") == 1 and "unexpected" not in output


def test_review_without_questions_answers_every_item(place: Place) -> None:
    recorded = place.tuned(0.5, sparsity=0.6)
    output = run("review", "latest", "--reject", "--reviewer", "Ada", "--note", "flickers", status=0).stdout
    assert output.splitlines()[0] == f"review of run {recorded.tuning}: rejected by Ada, 2 videos"
    assert "prompt_1_compare.mp4: content, motion, detail, artifacts, colour" in output
    assert place.tags(recorded.tuning)["review.note"] == "flickers"
    assert "next: sparsetune promote" in run("review", "latest", "--ok", "--reviewer", "Bo", status=0).stdout


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Queue[str]:
    """The addresses that a browser is opened with, on a display."""
    addresses: Queue[str] = Queue()
    monkeypatch.setenv("DISPLAY", ":1")
    monkeypatch.setattr("click.launch", addresses.put)
    return addresses


def test_review_in_the_page_is_stored_and_ends_the_command(place: Place, launched: Queue[str]) -> None:
    recorded = place.tuned(0.5, sparsity=0.6)
    with reviewing(launched, "latest", "--note", "on a phone", "--reviewer", "Ada") as (link, running):
        assert "a red circle, number 1" in {one["prompt"] for one in page_data(link)["prompts"]}
        worse = [dict.fromkeys(CHECKLIST, letter) for letter in ("a", "none")]
        sparse = [one["sparse"] for one in page_data(link)["prompts"]]
        answers = [{"preferred": letter, "worse": one} for letter, one in zip(sparse, worse, strict=True)]
        assert post(link, {"reviewer": "Bo", "note": "fine", "answers": answers}) in ("ok", "rejected")
        done = running.result(timeout=60)
    verdict = "rejected" if sparse[0] == "a" else "ok"
    preferred = "preferred blind: sparse 2, dense 0, no difference 0"
    assert done.stdout.splitlines()[0] == f"review of run {recorded.tuning}: {verdict} by Bo, 2 videos, {preferred}"
    tags = place.tags(recorded.tuning)
    assert (tags["review"], tags["review.by"], tags["review.note"]) == (verdict, "Bo", "fine")
    (review,) = read_reviews(place.client, recorded.evaluation).values()
    assert [one.preferred for one in review.videos] == ["sparse", "sparse"]


def test_review_without_a_display_opens_nothing_and_says_how_to_forward_the_port(
    place: Place, launched: Queue[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = place.tuned(0.5, sparsity=0.6)
    monkeypatch.delenv("DISPLAY")
    monkeypatch.setattr("sparsetune.cli.review.is_terminal", lambda: True)

    def interrupt(server: ReviewServer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ReviewServer, "wait", interrupt)
    printed = run("review", "latest", status=130).stderr
    link = re.search(r"http://127\.0\.0\.1:(\d+)/[\w-]{32}/", printed)
    assert link is not None and f"ssh -N -L {link[1]}:127.0.0.1:{link[1]} " in printed
    assert printed.splitlines()[-1] == "sparsetune: interrupted; nothing was stored"
    assert launched.empty() and "review" not in place.tags(recorded.tuning)


def test_take_back_is_for_approvals(place: Place) -> None:
    place.reviewed(place.tuned(0.5, sparsity=0.6), ok=False)
    approval = ("review", "latest", "--ok", "--reviewer", "Cy")
    assert "the rejection by Ada still stands; use --take-back" in run(*approval, status=0).stdout
    assert "next: sparsetune promote" in run(*approval, "--take-back", "Ada", status=0).stdout
    assert "--take-back needs an approval" in run(*approval, "--take-back", "Ada", status=2).stderr


def test_runs_are_a_table_best_first(shared_place: Place, world: World) -> None:
    head, _, *rows = run("runs", "--limit", "3", status=0).stdout.splitlines()
    assert head.split() == [
        "run",
        "name",
        "model",
        "sparsity",
        "psnr",
        "(dB)",
        "worst",
        "score",
        "gate",
        "review",
        "aliases",
    ]
    assert [row.split()[0] for row in rows] == [
        one.tuning[:8] for one in (world.unreviewed, world.sparsest, world.sparser)
    ]
    assert "no runs are recorded" in run("runs", "--model", "cogvideox-2b", status=0).stderr


def test_runs_and_registered_models_are_compared(shared_place: Place, world: World) -> None:
    both = run("compare", "models:/demo-sparse@champion", world.sparsest.tuning, "--json", status=0).stdout
    change = json.loads(both)["changes"]["sparsity"]
    assert change["difference"]["mean"] == pytest.approx(0.15)
    tuning = json.loads(run("compare", "--before-after", world.sparser.tuning[:10], "--json", status=0).stdout)
    assert (tuning["before"]["use_tuned"], tuning["after"]["use_tuned"]) == (False, True)


@pytest.mark.slow  # renders the demo model four times
def test_real_evaluation_is_reviewed_promoted_evaluated_by_its_name_and_promoted_again(own_store: Path) -> None:
    pipe = load_pipeline(demo_config().model).pipe
    save_checkpoint(Checkpoint(default_policy(pipe), Manifest(tuner="manual", base_source="demo")), Path("mine"))
    small = ("--num-prompts", "1", "--num-inference-steps", "4", "--output-dir", "out")
    run("eval", "--checkpoint", "mine", *small, status=0)
    (row,) = json.loads(run("runs", "--json", status=0).stdout)
    assert (row["kind"], row["gate"], row["model"]) == ("evaluation", "passed", "demo")
    run("promote", row["run_id"], status=3)
    run("review", row["run_id"], "--ok", "--reviewer", "Ada", status=0)
    assert "@champion is version 1" in run("promote", row["run_id"], status=0).stdout
    run("eval", "--checkpoint", "models:/demo-sparse@champion", *small, status=0)
    again = next(one for one in json.loads(run("runs", "--json", status=0).stdout) if one["run_id"] != row["run_id"])
    assert again["sparsity"] == row["sparsity"] > 0
    assert again["review"] == "ok"  # of the policy, by the first run's review
    assert "is version 1 already, with the same policy" in run("promote", again["run_id"], status=0).stdout
    shown = json.loads(run("checkpoint", "show", "models:/demo-sparse@champion", "--json", status=0).stdout)
    assert shown["manifest"]["tuner"] == "manual"
