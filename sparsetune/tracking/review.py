"""Human reviews of a policy's videos, each stored with the run of the evaluation that was looked at."""

import itertools
import re
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparsetune.errors import TrackingError, UsageError
from sparsetune.files import scratch_folder, write_text
from sparsetune.tracking.lookup import check_files_host, evaluations_of_policy, model_of, parent_of
from sparsetune.tracking.store import store_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHECKLIST: Final = ("content", "motion", "detail", "artifacts", "colour")
"""What a reviewer compares the sparse video with the dense one in."""

FOLDER: Final = "reviews"
"""Artifact folder with one file per review."""

TAG: Final = "review"
VIDEOS: Final = "videos"

_TRIES = 20
_SIDES: Final[Mapping[Literal["dense", "sparse", "none"], str]] = {
    "sparse": "sparse", "dense": "dense", "none": "no difference",
}  # fmt: skip

_COMPARED = re.compile(r"(?:.*/)?prompt_(\d+)_compare\.mp4")


class VideoReview(BaseModel):
    """Answers on one side-by-side video: for each item of the checklist, whether the sparse one is no worse.

    `preferred` is the one that the reviewer preferred without knowing which is which; None where it wasn't asked.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    video: str
    answers: dict[str, bool]
    preferred: Literal["dense", "sparse", "none"] | None = None

    @property
    def ok(self) -> bool:
        return all(self.answers.values())


class Review(BaseModel):
    """A human review of an evaluation's videos.

    `at` is UTC in ISO 8601 by the reviewer's clock, which nothing is ordered by but lists. `takes_back` has the
    artifact names of the rejections that an approval takes back. With a video in `skipped`, a review without a
    rejection is incomplete: it neither approves nor rejects.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    evaluation_id: str
    policy_digest: str
    reviewer: str = Field(min_length=1)
    at: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="microseconds"))
    note: str = ""
    videos: tuple[VideoReview, ...] = Field(min_length=1)
    takes_back: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.rejected and not self.skipped

    @property
    def verdict(self) -> str:
        return "rejected" if self.rejected else "incomplete" if self.skipped else "ok"

    @property
    def summary(self) -> str:
        """How many videos were answered and skipped, and which were preferred, if that was asked."""
        text = "1 video" if len(self.videos) == 1 else f"{len(self.videos)} videos"
        text += f", {len(self.skipped)} skipped" if self.skipped else ""
        preferred = Counter(video.preferred for video in self.videos if video.preferred is not None)
        if preferred:
            sides = (f"{name} {preferred[side]}" for side, name in _SIDES.items())
            text += f", preferred blind: {', '.join(sides)}"
        return text

    @property
    def rejected(self) -> tuple[str, ...]:
        """List what doesn't hold, e.g. `prompt_0_compare.mp4: motion`."""
        return tuple(
            f"{Path(video.video).name}: {', '.join(item for item, holds in video.answers.items() if not holds)}"
            for video in self.videos
            if not video.ok
        )


def answer_all(videos: Iterable[str], *, ok: bool) -> tuple[VideoReview, ...]:
    return tuple(VideoReview(video=video, answers=dict.fromkeys(CHECKLIST, ok)) for video in videos)


def download_videos(
    client: "MlflowClient", evaluation_id: str, names: Mapping[int, str], folder: Path
) -> dict[int, Path]:
    """Download side-by-side videos, as `video_names` lists them; return each file by its prompt's index."""
    with store_errors(f"read the videos of run {evaluation_id}"):
        return {
            index: Path(client.download_artifacts(evaluation_id, name, str(folder))) for index, name in names.items()
        }


def video_names(client: "MlflowClient", evaluation_id: str) -> dict[int, str]:
    """List an evaluation's side-by-side videos: the artifact's path by the prompt's index, in order."""
    with store_errors(f"read the artifacts of run {evaluation_id}"):
        found = [_COMPARED.fullmatch(one.path) for one in client.list_artifacts(evaluation_id, VIDEOS)]
    names = dict(sorted((int(match[1]), match[0]) for match in found if match is not None))
    if not names:
        raise TrackingError(
            f"run {evaluation_id} has no side-by-side videos to review; evaluate again with --save-videos"
        )
    return names


def record_review(
    client: "MlflowClient", review: Review, run_ids: Sequence[str], take_back: Sequence[str] = ()
) -> Review:
    """Store a review as a file of its own on each run, so that none is lost, and tag the runs of the policy.

    An approval takes back the reviewer's own standing rejections of the policy, whatever run they are stored on, and
    those of the reviewers named in `take_back`; UsageError where one of them has none. Returns the review with what it
    took back.
    """
    with store_errors(f"find run {run_ids[0]}"):
        model = model_of(client.get_run(run_ids[0]))
    rejections = standing_rejections(reviews_of_policy(client, review.policy_digest, model))
    by = {rejection.reviewer for rejection in rejections.values()}
    missing = [name for name in take_back if name not in by]
    if missing or (take_back and not review.ok):
        there = ", ".join(sorted(by)) or "nobody"
        raise UsageError(
            f"--take-back needs an approval, and a reviewer who rejected ({there}), got {', '.join(take_back)}"
        )
    if review.ok:
        ours = {review.reviewer, *take_back}
        taken = tuple(name for name, rejection in rejections.items() if rejection.reviewer in ours)
        review = review.model_copy(update={"takes_back": taken})
    name = f"{re.sub('[^0-9T]', '', review.at)[:15]}-{uuid.uuid4().hex}.json"
    for run_id in run_ids:
        with store_errors(f"write the review to run {run_id}"), scratch_folder() as folder:
            write_text(folder / name, review.model_dump_json(indent=2) + "\n")
            client.log_artifact(run_id, str(folder / name), FOLDER)
    _tag(client, review.policy_digest, model, run_ids)
    return review


def reviews_of_policy(client: "MlflowClient", digest: str, model: str | None) -> dict[str, Review]:
    """Read the reviews of a policy on a model, from all its evaluations, as `read_reviews` does."""
    found: dict[str, Review] = {}
    for run in evaluations_of_policy(client, digest, model):
        check_files_host(run.info.artifact_uri, client.tracking_uri)
        found |= read_reviews(client, str(run.info.run_id))
    return _by_time({name: review for name, review in found.items() if review.policy_digest == digest})


def read_reviews(client: "MlflowClient", run_id: str) -> dict[str, Review]:
    """Read the reviews of a run by artifact name, in the order of the reviewers' clocks."""
    with (
        store_errors(f"read the artifacts of run {run_id}"),
        scratch_folder() as folder,
    ):
        names = [one.path for one in client.list_artifacts(run_id, FOLDER)]
        texts = {
            name: Path(client.download_artifacts(run_id, name, str(folder))).read_text(encoding="utf-8")
            for name in names
        }
    return _by_time({name: _parsed(run_id, name, text) for name, text in texts.items()})


def _by_time(reviews: Mapping[str, Review]) -> dict[str, Review]:
    return dict(sorted(reviews.items(), key=lambda item: (item[1].at, not item[1].ok)))


def standing_rejections(reviews: Mapping[str, Review]) -> dict[str, Review]:
    """Return the rejections that no approval takes back, whatever clock said when."""
    taken = {name for review in reviews.values() if review.ok for name in review.takes_back}
    return {name: review for name, review in reviews.items() if review.rejected and name not in taken}


def deciding_review(reviews: Mapping[str, Review]) -> Review | None:
    """Return the review that decides: a rejection that stands, else the last approval, else the last incomplete one.

    None where there is none.
    """
    by_verdict = [[one for one in reviews.values() if one.verdict == verdict] for verdict in ("incomplete", "ok")]
    ranked = [*itertools.chain(*by_verdict), *standing_rejections(reviews).values()]
    return ranked[-1] if ranked else None


def _parsed(run_id: str, name: str, text: str) -> Review:
    try:
        return Review.model_validate_json(text)
    except ValidationError as error:
        first: Any = error.errors(include_url=False)[0]
        raise TrackingError(f"{name} of run {run_id} is damaged: {first['msg']}; remove it and review again") from error


def _tag(client: "MlflowClient", digest: str, model: str | None, run_ids: Sequence[str]) -> None:
    """Write the review that decides as tags of the policy's runs, again if another was recorded meanwhile."""
    from mlflow.entities import RunTag

    evaluations = tuple(evaluations_of_policy(client, digest, model))
    tunings = (parent_of(run) for run in evaluations if run.data.tags.get("policy", "tuned") == "tuned")
    tagged = dict.fromkeys((*run_ids, *(str(run.info.run_id) for run in evaluations), *filter(None, tunings)))
    for _ in range(_TRIES):
        decides = deciding_review(reviews_of_policy(client, digest, model))
        if decides is None:
            return
        for run_id in tagged:
            with store_errors(f"write the review to run {run_id}"):
                client.log_batch(run_id, tags=[RunTag(name, value) for name, value in _tags(decides).items()])
        if deciding_review(reviews_of_policy(client, digest, model)) == decides:
            return
    raise TrackingError(
        f"the review of run {run_ids[0]} is kept, but tags are not up to date: the policy was reviewed {_TRIES} more "
        "times meanwhile; review again"
    )


def _tags(review: Review) -> dict[str, str]:
    return {
        "review.by": review.reviewer,
        "review.at": review.at,
        "review.note": review.note,
        "review.rejected": "; ".join(review.rejected)[:5000],
        "review.summary": review.summary,
        "review.run_id": review.evaluation_id,
        TAG: review.verdict,
    }


def check_reviewer(reviewer: str) -> str:
    name = reviewer.strip()
    if not name:
        raise UsageError("--reviewer must be a name, but is empty")
    return name
