from pathlib import Path

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
    video_names,
)
from tests.tracking.recorded import Place


def test_review_is_kept_as_tags_and_behind_earlier_ones_on_both_runs(place: Place) -> None:
    recorded = place.tuned(0.5)
    place.reviewed(recorded, ok=False)
    place.reviewed(recorded)
    for run_id in (recorded.evaluation, recorded.tuning):
        tags = place.tags(run_id)
        assert (tags["review"], tags["review.by"], tags["review.rejected"]) == ("ok", "Ada", "")
        assert tags["review.run_id"] == recorded.evaluation
        first, second = read_reviews(place.client, run_id)
        assert (first.verdict, second.verdict) == ("rejected", "ok")
        assert second.policy_digest == recorded.result.config.policy.digest


def test_one_item_that_does_not_hold_rejects() -> None:
    answers = dict.fromkeys(CHECKLIST, True)
    videos = (VideoReview(video="videos/a.mp4", answers=answers | {"motion": False}), *answer_all(["b"], ok=True))
    review = Review(evaluation_id="1", policy_digest="2", reviewer="Ada", videos=videos)
    assert review.verdict == "rejected"
    assert review.rejected == ("a.mp4: motion",)


@pytest.mark.slow
def test_videos_come_in_the_prompts_order(place: Place, tmp_path: Path) -> None:
    recorded = place.tuned(videos=11)
    names = video_names(place.client, recorded.evaluation)
    assert list(names) == [f"videos/prompt_{index}_compare.mp4" for index in range(11)]
    files = download_videos(place.client, recorded.evaluation, tmp_path)
    assert files[names[10]].read_text() == "video 10"


def test_evaluation_without_videos_cannot_be_reviewed(place: Place) -> None:
    recorded = place.tuned(videos=0)
    with pytest.raises(TrackingError, match=r"side-by-side videos to be reviewed, but has none.*--save-videos"):
        video_names(place.client, recorded.evaluation)


def test_damaged_review_is_said(place: Place) -> None:
    recorded = place.tuned(0.5)
    place.client.log_text(recorded.evaluation, "{}x", "review.json")
    with pytest.raises(TrackingError, match=r"review\.json of run .* must be as `sparsetune review` wrote it"):
        read_reviews(place.client, recorded.evaluation)


def test_review_of_nobody_is_refused() -> None:
    assert check_reviewer(" Ada ") == "Ada"
    with pytest.raises(UsageError, match="a review must name who looked"):
        check_reviewer("  ")
