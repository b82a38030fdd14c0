"""`sparsetune review`: a human review of a checkpoint's videos."""

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparsetune.cli import completion
from sparsetune.cli.main import Command
from sparsetune.cli.options import build_config, model_name_option, open_store, short_name, store_options

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from sparsetune.evaluation.result import EvaluationResult
    from sparsetune.tracking.review import VideoReview


@click.command(cls=Command, name="review")
@click.argument("run", metavar="RUN", shell_complete=completion.runs)
@click.option(
    "--ok/--reject", "ok", default=None, help="Give every item of every video this answer.  [default: ask for each]"
)
@click.option("--reviewer", metavar="NAME", help="Name of the reviewer.  [default: asked for]")
@click.option("--note", default="", metavar="TEXT", help="A remark to record.  [default: none]")
@click.option(
    "--take-back",
    metavar="NAME",
    multiple=True,
    help="Another reviewer whose rejection this approval takes back; may be repeated.  [default: only your own]",
)
@click.option("--open/--no-open", "opens", default=True, help="Open the videos, at a terminal.  [default: open]")
@model_name_option("any; matters for `latest` only")
@store_options
@click.pass_context
def command(
    ctx: click.Context,
    run: str,
    ok: bool | None,
    reviewer: str | None,
    note: str,
    take_back: tuple[str, ...],
    opens: bool,
    model: str | None,
) -> None:
    """Review the side-by-side videos of RUN and record the answers; `sparsetune promote` requires it.

    A rejection stands until its reviewer approves, or another one does with --take-back NAME.

    For each video: whether content, motion, detail, artifacts and colour match the dense one. RUN is the id of a
    tuning or evaluation run, its first characters, or `latest`.

    \b
    Examples:
      sparsetune review latest
      sparsetune review 3f2a9c1b --ok --reviewer "Ada L." --note "slightly softer grass"
    """
    from sparsetune.errors import UsageError
    from sparsetune.tracking.results import find_candidate
    from sparsetune.tracking.review import (
        Review,
        answer_all,
        check_reviewer,
        record_review,
        reviews_of_policy,
        standing_rejections,
        video_names,
    )
    from sparsetune.tracking.run_logger import user_name

    terminal = _is_terminal()
    if not terminal and (ok is None or reviewer is None):
        raise UsageError("a review without a terminal needs --ok or --reject, and --reviewer NAME")
    reviewer = check_reviewer(reviewer) if reviewer is not None else None
    _, client = open_store(build_config(ctx))
    candidate = find_candidate(client, run, short_name(model))
    if terminal and (opens or ok is None):
        answers = _ask(client, candidate.evaluation_id, candidate.result, ok, opens)
    else:
        answers = answer_all(video_names(client, candidate.evaluation_id), ok=bool(ok))
    review = Review(
        evaluation_id=candidate.evaluation_id,
        policy_digest=candidate.result.config.policy.digest,
        reviewer=reviewer or check_reviewer(click.prompt("reviewer", default=user_name(), err=True)),
        note=note,
        videos=answers,
    )
    record_review(client, review, list(dict.fromkeys((candidate.evaluation_id, candidate.run_id))), take_back)
    click.echo(f"review of run {candidate.run_id}: {review.verdict} by {review.reviewer}, {len(answers)} videos")
    for rejected in review.rejected:
        click.echo(f"  {rejected}")
    for rejection in standing_rejections(reviews_of_policy(client, review.policy_digest, candidate.model)).values():
        if rejection.reviewer != review.reviewer:
            click.echo(f"the rejection by {rejection.reviewer} still stands; use --take-back to take it back")
    if review.ok:
        click.echo(f"next: sparsetune promote {candidate.run_id[:8]}")


def _ask(
    client: "MlflowClient", evaluation_id: str, result: "EvaluationResult", ok: bool | None, opens: bool
) -> "tuple[VideoReview, ...]":
    """Open the videos one by one, and ask every question that `ok` doesn't answer.

    The files stay in the temporary folder, since a player may still have them open.
    """
    from sparsetune.tracking.review import CHECKLIST, VideoReview, download_videos

    files = download_videos(client, evaluation_id, Path(tempfile.mkdtemp(prefix="sparsetune-review-")))
    prompts = {f"prompt_{row.index}_compare.mp4": row.prompt for row in result.detailed_results}
    click.echo("each video shows dense on the left, sparse on the right", err=True)
    answers = []
    for number, (name, path) in enumerate(files.items(), 1):
        click.echo(f"\n{number}/{len(files)}  {prompts.get(path.name, '')}\n      {path}", err=True)
        if opens:
            click.launch(str(path))
        items = {
            item: ok if ok is not None else click.confirm(f"  {item}: {meaning}?", err=True)
            for item, meaning in CHECKLIST.items()
        }
        answers.append(VideoReview(video=name, answers=items))
    return tuple(answers)


def _is_terminal() -> bool:
    return sys.stdin.isatty()
