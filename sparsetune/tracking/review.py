"""A person's review of a checkpoint's videos, kept on the evaluation's run."""

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparsetune.checkpoint.manifest import utc_now
from sparsetune.errors import TrackingError, UsageError
from sparsetune.files import write_text
from sparsetune.tracking.asking import asking

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHECKLIST: Final[Mapping[str, str]] = {
    "content": "the same things happen as in the dense video",
    "motion": "they move the same way, without jumps",
    "detail": "edges and textures are as sharp",
    "artifacts": "no flicker, blocks, ghosts or smears",
    "colour": "colours and brightness are the same",
}
"""What is looked at in every video."""

ARTIFACT: Final = "review.json"
TAG: Final = "review"
VIDEOS: Final = "videos"

_COMPARED = re.compile(r"(?:.*/)?prompt_(\d+)_compare\.mp4")


class VideoReview(BaseModel):
    """One side-by-side video's answers: for each item of the checklist, whether it holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    video: str
    answers: dict[str, bool]

    @property
    def ok(self) -> bool:
        """Whether every item holds."""
        return all(self.answers.values())


class Review(BaseModel):
    """What a person says of an evaluation's videos.

    Args:
        evaluation_id: run id of the evaluation that made the videos.
        policy_digest: of the policy that was judged.
        reviewer: who looked.
        at: when, in UTC.
        note: anything to add.
        videos: one entry a video.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    evaluation_id: str
    policy_digest: str
    reviewer: str = Field(min_length=1)
    at: str = Field(default_factory=utc_now)
    note: str = ""
    videos: tuple[VideoReview, ...] = Field(min_length=1)

    @property
    def ok(self) -> bool:
        """Whether every item of every video holds."""
        return all(video.ok for video in self.videos)

    @property
    def verdict(self) -> str:
        """`ok` or `rejected`."""
        return "ok" if self.ok else "rejected"

    @property
    def rejected(self) -> tuple[str, ...]:
        """What doesn't hold, e.g. `prompt_0_compare.mp4: motion`."""
        return tuple(
            f"{Path(video.video).name}: {', '.join(item for item, holds in video.answers.items() if not holds)}"
            for video in self.videos
            if not video.ok
        )


class _Reviews(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    reviews: tuple[Review, ...] = ()


def answer_all(videos: Sequence[str], *, ok: bool) -> tuple[VideoReview, ...]:
    """Give every item of every video the same answer."""
    return tuple(VideoReview(video=video, answers=dict.fromkeys(CHECKLIST, ok)) for video in videos)


def download_videos(client: "MlflowClient", evaluation_id: str, folder: Path) -> dict[str, Path]:
    """Download an evaluation's side-by-side videos to a folder.

    Returns:
        The file of each video by its artifact's path, by prompt.

    Raises:
        TrackingError: there are none, or the store fails.
    """
    names = video_names(client, evaluation_id)
    with asking(f"the videos of run {evaluation_id} must be readable"):
        return {name: Path(client.download_artifacts(evaluation_id, name, str(folder))) for name in names}


def video_names(client: "MlflowClient", evaluation_id: str) -> tuple[str, ...]:
    """List an evaluation's side-by-side videos, by prompt.

    Raises:
        TrackingError: there are none, or the store fails.
    """
    with asking(f"the artifacts of run {evaluation_id} must be readable"):
        found = [_COMPARED.fullmatch(one.path) for one in client.list_artifacts(evaluation_id, VIDEOS)]
    names = [match[0] for match in sorted(filter(None, found), key=lambda match: int(match[1]))]
    if not names:
        raise TrackingError(
            f"run {evaluation_id} must have side-by-side videos to be reviewed, but has none; "
            "evaluate again with --save-videos"
        )
    return tuple(names)


def record_review(client: "MlflowClient", review: Review, run_ids: Sequence[str]) -> None:
    """Keep a review as tags and, behind earlier ones, in the artifact review.json of each run.

    Args:
        client: of the runs' store.
        review: what was said.
        run_ids: the evaluation's first, then its tuning's.

    Raises:
        TrackingError: the store fails.
    """
    tags = {
        "review.by": review.reviewer,
        "review.at": review.at,
        "review.note": review.note,
        "review.rejected": "; ".join(review.rejected)[:5000],
        "review.run_id": review.evaluation_id,
        TAG: review.verdict,
    }
    for run_id in run_ids:
        earlier = read_reviews(client, run_id)
        whole = _Reviews(reviews=(*earlier, review))
        with asking(f"the review must be written to run {run_id}"), tempfile.TemporaryDirectory() as folder:
            write_text(Path(folder) / ARTIFACT, whole.model_dump_json(indent=2) + "\n")
            client.log_artifact(run_id, str(Path(folder) / ARTIFACT))
            for name, value in tags.items():  # the verdict last: what it rests on is there before it
                client.set_tag(run_id, name, value)


def read_reviews(client: "MlflowClient", run_id: str) -> tuple[Review, ...]:
    """Read the reviews of a run, the first one first.

    Raises:
        TrackingError: the artifact is damaged, or the store fails.
    """
    with asking(f"the artifacts of run {run_id} must be readable"):
        if not any(one.path == ARTIFACT for one in client.list_artifacts(run_id)):
            return ()
        with tempfile.TemporaryDirectory() as folder:
            content = Path(client.download_artifacts(run_id, ARTIFACT, folder)).read_text(encoding="utf-8")
    try:
        return _Reviews.model_validate_json(content).reviews
    except ValidationError as error:
        first: Any = error.errors(include_url=False)[0]
        raise TrackingError(
            f"{ARTIFACT} of run {run_id} must be as `sparsetune review` wrote it, but: {first['msg']}; review anew "
            "after removing it"
        ) from error


def check_reviewer(reviewer: str) -> str:
    """Give a reviewer's name without blanks around it.

    Raises:
        UsageError: nothing is left.
    """
    name = reviewer.strip()
    if not name:
        raise UsageError("a review must name who looked, but --reviewer is empty; give a name")
    return name
