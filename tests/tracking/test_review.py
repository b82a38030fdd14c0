import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from sparsetune.errors import TrackingError, UsageError
from sparsetune.tracking.review import (
    CHECKLIST,
    Review,
    VideoReview,
    answer_all,
    check_reviewer,
    download_videos,
    read_reviews,
    record_review,
    reviews_of_policy,
    video_names,
)
from tests.tracking.recorded import Place, Recorded


def review_of(recorded: Recorded, reviewer: str, *, ok: bool = True, **fields: str) -> Review:
    return Review(
        evaluation_id=recorded.evaluation,
        policy_digest=recorded.result.config.policy.digest,
        reviewer=reviewer,
        videos=answer_all(["videos/prompt_0_compare.mp4"], ok=ok),
        **fields,
    )


def test_review_is_kept_as_tags_and_behind_earlier_ones_on_both_runs(place: Place) -> None:
    recorded = place.tuned(0.5)
    place.reviewed(recorded, ok=False)
    place.reviewed(recorded)
    for run_id in (recorded.evaluation, recorded.tuning):
        tags = place.tags(run_id)
        assert (tags["review"], tags["review.by"], tags["review.rejected"]) == ("ok", "Ada", "")
        assert tags["review.run_id"] == recorded.evaluation
        first, second = read_reviews(place.client, run_id).values()
        assert (first.verdict, second.verdict) == ("rejected", "ok")
        assert second.policy_digest == recorded.result.config.policy.digest


def test_one_item_that_does_not_hold_rejects() -> None:
    answers = dict.fromkeys(CHECKLIST, True)
    videos = (VideoReview(video="videos/a.mp4", answers=answers | {"motion": False}), *answer_all(["b"], ok=True))
    review = Review(evaluation_id="1", policy_digest="2", reviewer="Ada", videos=videos)
    assert review.verdict == "rejected"
    assert review.rejected == ("a.mp4: motion",)


def test_incomplete_review_decides_only_where_there_is_no_other(place: Place) -> None:
    recorded = place.tuned(0.5)
    runs = [recorded.evaluation]
    incomplete = review_of(recorded, "Ada").model_copy(update={"skipped": ("videos/prompt_1_compare.mp4",)})
    assert record_review(place.client, incomplete, runs).verdict == "incomplete"
    assert place.tags(recorded.evaluation)["review"] == "incomplete"
    record_review(place.client, review_of(recorded, "Bo", ok=False), runs)
    assert record_review(place.client, incomplete.model_copy(update={"reviewer": "Bo"}), runs).takes_back == ()
    assert place.tags(recorded.evaluation)["review"] == "rejected"
    record_review(place.client, review_of(recorded, "Bo"), runs)
    record_review(place.client, incomplete, runs)
    assert place.tags(recorded.evaluation)["review"] == "ok"


def test_review_of_an_earlier_version_is_read() -> None:
    video = {"video": "videos/prompt_0_compare.mp4", "answers": dict.fromkeys(CHECKLIST, True)}
    stored = {
        "evaluation_id": "1", "policy_digest": "2", "reviewer": "Ada", "at": "2026-11-25T12:00:00+00:00", "note": "",
        "videos": [video], "takes_back": [],
    }  # fmt: skip
    review = Review.model_validate_json(json.dumps(stored))
    assert (review.verdict, review.summary, review.videos[0].preferred) == ("ok", "1 video", None)


@pytest.mark.slow
def test_videos_come_in_the_prompts_order(place: Place, tmp_path: Path) -> None:
    recorded = place.tuned(videos=11)
    names = video_names(place.client, recorded.evaluation)
    assert list(names.items()) == [(index, f"videos/prompt_{index}_compare.mp4") for index in range(11)]
    files = download_videos(place.client, recorded.evaluation, names, tmp_path)
    assert files[10].read_text() == "video 10"


def test_evaluation_without_videos_cannot_be_reviewed(place: Place) -> None:
    recorded = place.tuned(videos=0)
    with pytest.raises(TrackingError, match=r"no side-by-side videos to review.*--save-videos"):
        video_names(place.client, recorded.evaluation)


def test_damaged_review_is_said(place: Place) -> None:
    recorded = place.tuned(0.5)
    place.client.log_text(recorded.evaluation, "{}x", "reviews/20261122T101637-1.json")
    with pytest.raises(TrackingError, match=r"reviews/.*\.json of run .* is damaged"):
        read_reviews(place.client, recorded.evaluation)


def test_of_two_reviews_in_one_second_the_rejection_is_the_last(place: Place) -> None:
    recorded, now = place.tuned(0.5), "2026-11-25T12:00:00+00:00"
    for reviewer, ok in (("Ada", False), ("Bo", True)):
        record_review(place.client, review_of(recorded, reviewer, ok=ok, at=now), [recorded.evaluation])
    assert [one.reviewer for one in read_reviews(place.client, recorded.evaluation).values()] == ["Bo", "Ada"]
    assert place.tags(recorded.evaluation)["review"] == "rejected"


def test_a_review_that_another_one_overtakes_while_it_is_tagged_leaves_the_last_one_s_tags(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded, write = place.tuned(0.5), place.client.log_batch
    overtaking = review_of(recorded, "Bo", ok=False, at="2026-11-25T12:00:01+00:00")

    def overtaken(*args: Any, **options: Any) -> None:
        """Another process records a complete review between reading the reviews and writing the tags."""
        monkeypatch.setattr(place.client, "log_batch", write)
        record_review(place.client, overtaking, [recorded.evaluation])
        write(*args, **options)

    monkeypatch.setattr(place.client, "log_batch", overtaken)
    first = review_of(recorded, "Ada", at="2026-11-25T12:00:00+00:00")
    record_review(place.client, first, [recorded.evaluation])
    assert tuple(read_reviews(place.client, recorded.evaluation).values()) == (first, overtaking)
    tags = place.tags(recorded.evaluation)
    assert (tags["review"], tags["review.by"]) == ("rejected", "Bo")


def test_a_rejection_stands_whatever_an_approvals_clock_says(place: Place) -> None:
    recorded = place.tuned(0.5)
    ahead = review_of(recorded, "Ada", at="2126-11-25T12:00:00+00:00")
    record_review(place.client, ahead, [recorded.evaluation])
    record_review(place.client, review_of(recorded, "Ada", ok=False), [recorded.evaluation])
    assert place.tags(recorded.evaluation)["review"] == "rejected"
    record_review(place.client, review_of(recorded, "Bo", at="2127-11-25T12:00:00+00:00"), [recorded.evaluation])
    assert place.tags(recorded.evaluation)["review"] == "rejected"
    taken = record_review(place.client, review_of(recorded, "Ada"), [recorded.evaluation])
    assert len(taken.takes_back) == 1
    assert place.tags(recorded.evaluation)["review"] == "ok"


def test_another_reviewer_takes_a_rejection_back_by_its_reviewers_name(place: Place) -> None:
    recorded = place.tuned(0.5)
    runs = [recorded.evaluation]
    record_review(place.client, review_of(recorded, "Ada", ok=False), runs)
    with pytest.raises(UsageError, match=r"a reviewer who rejected \(Ada\), got Bo"):
        record_review(place.client, review_of(recorded, "Cy"), runs, ["Bo"])
    with pytest.raises(UsageError, match="--take-back needs an approval"):
        record_review(place.client, review_of(recorded, "Cy", ok=False), runs, ["Ada"])
    record_review(place.client, review_of(recorded, "Cy"), runs, ["Ada"])
    assert place.tags(recorded.evaluation)["review"] == "ok"
    record_review(place.client, review_of(recorded, "Ada", ok=False), runs)  # a new one stands again
    assert place.tags(recorded.evaluation)["review"] == "rejected"


def test_a_review_counts_for_every_evaluation_of_the_policy_on_the_model(place: Place) -> None:
    reviewed, again = place.reviewed(place.tuned(0.5), ok=False), place.evaluated(0.5)
    other_policy, other_model = place.tuned(0.4), place.evaluated(0.5, model="other")
    digest = reviewed.result.config.policy.digest
    (found,) = reviews_of_policy(place.client, digest, "demo").values()
    assert (found.evaluation_id, found.verdict) == (reviewed.evaluation, "rejected")
    assert reviews_of_policy(place.client, digest, "other") == {}
    taken = record_review(place.client, review_of(again, "Ada"), [again.evaluation])
    assert len(taken.takes_back) == 1
    for run_id in (reviewed.evaluation, reviewed.tuning, again.evaluation):
        assert place.tags(run_id)["review"] == "ok"
    for run_id in (other_policy.tuning, other_policy.evaluation, other_model.evaluation):
        assert "review" not in place.tags(run_id)


def _review_in_a_process(database: Path, folder: Path, review: Review, run_ids: list[str], start: Any) -> None:
    place = Place(database, folder)
    start.wait(90)
    record_review(place.client, review, run_ids)


@pytest.mark.slow  # two more processes import MLflow and PyTorch
def test_of_two_processes_that_review_at_the_same_moment_both_are_kept(place: Place, own_store: Path) -> None:
    recorded = place.tuned(0.5)
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    reviews = [review_of(recorded, name, ok=name == "Ada") for name in ("Ada", "Bo")]
    run_ids = [recorded.evaluation, recorded.tuning]
    workers = [
        context.Process(target=_review_in_a_process, args=(own_store, place.folder, review, run_ids, start))
        for review in reviews
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    for run_id in run_ids:
        kept = tuple(read_reviews(place.client, run_id).values())
        assert sorted(one.reviewer for one in kept) == ["Ada", "Bo"]
        tags = place.tags(run_id)
        assert (tags["review"], tags["review.by"]) == (kept[-1].verdict, kept[-1].reviewer)


def test_review_of_nobody_is_refused() -> None:
    assert check_reviewer(" Ada ") == "Ada"
    with pytest.raises(UsageError, match="--reviewer must be a name"):
        check_reviewer("  ")
