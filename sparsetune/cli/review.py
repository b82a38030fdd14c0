"""`sparsetune review`: a human review of a checkpoint's videos."""

import os
import platform
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from sparsetune.cli import completion
from sparsetune.cli.main import Command
from sparsetune.cli.options import (
    build_config,
    language_option,
    model_name_option,
    open_store,
    short_name,
    store_options,
)
from sparsetune.files import scratch_folder

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlflow import MlflowClient

    from sparsetune.report.words import Words
    from sparsetune.tracking.results import Candidate
    from sparsetune.tracking.review import Review, VideoReview


@click.command(cls=Command, name="review")
@click.argument("run", metavar="RUN", shell_complete=completion.runs)
@click.option(
    "--ok/--reject",
    "ok",
    default=None,
    help="Record this answer to everything, for scripts, without the page; needs --reviewer.  [default: the page]",
)
@click.option("--reviewer", metavar="NAME", help="Name of the reviewer.  [default: asked for in the page]")
@click.option("--note", default="", metavar="TEXT", help="A remark to record.  [default: none]")
@click.option(
    "--take-back",
    metavar="NAME",
    multiple=True,
    help="Another reviewer whose rejection this approval takes back; may be repeated.  [default: only your own]",
)
@click.option(
    "--open/--no-open",
    "opens",
    default=True,
    help="Open the page in a browser, where there is a display.  [default: open]",
)
@language_option("the page")
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
    lang: str,
    model: str | None,
) -> None:
    """Review the videos of RUN blind in a local page, and record the answers; `sparsetune promote` requires it.

    For each prompt, the page shows the dense and the sparse video as A and B in random order, and asks which you
    prefer, and whether one is worse in content, motion, detail, artifacts or colour. The review approves where the
    sparse video is worse in nothing for every prompt. It counts for every run with the same policy. A rejection stands
    until its reviewer approves, or another one does with --take-back NAME.

    RUN is the id of a tuning or evaluation run, its first characters, or `latest`. The page is served on this machine
    only, at the printed address, until it stores the review; Ctrl-C ends it with nothing stored.

    \b
    Examples:
      sparsetune review latest
      sparsetune review 3f2a9c1b --no-open --lang zh
      sparsetune review 3f2a9c1b --reject --reviewer "Ada L." --note "flickers"
    """
    from sparsetune.errors import UsageError
    from sparsetune.report.words import words
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

    if ok is None and not (is_terminal() or has_display(os.environ)):
        raise UsageError("a review without a terminal or a display needs --ok or --reject, and --reviewer NAME")
    if ok is not None and reviewer is None:
        raise UsageError("--ok and --reject need --reviewer NAME")
    reviewer = check_reviewer(reviewer) if reviewer is not None else None
    _, client = open_store(build_config(ctx))
    candidate = find_candidate(client, run, short_name(model))

    def record(name: str, remark: str, videos: "tuple[VideoReview, ...]", skipped: tuple[str, ...] = ()) -> Review:
        review = Review(
            evaluation_id=candidate.evaluation_id,
            policy_digest=candidate.result.config.policy.digest,
            reviewer=check_reviewer(name),
            note=remark,
            videos=videos,
            skipped=skipped,
        )
        runs = list(dict.fromkeys((candidate.evaluation_id, candidate.run_id)))
        return record_review(client, review, runs, take_back)

    if ok is not None:
        videos = answer_all(video_names(client, candidate.evaluation_id).values(), ok=ok)
        review = record(str(reviewer), note, videos)
    else:
        texts = words("zh" if lang == "zh" else "en")
        review = _serve(client, candidate, record, texts, reviewer, note, opens and has_display(os.environ))
    click.echo(f"review of run {candidate.run_id}: {review.verdict} by {review.reviewer}, {review.summary}")
    for rejected in review.rejected:
        click.echo(f"  {rejected}")
    standing = standing_rejections(reviews_of_policy(client, review.policy_digest, candidate.model))
    for rejection in standing.values():
        if rejection.reviewer != review.reviewer:
            click.echo(f"the rejection by {rejection.reviewer} still stands; use --take-back to take it back")
    if review.ok:
        click.echo(f"next: sparsetune promote {candidate.run_id[:8]}")


def is_terminal() -> bool:
    return sys.stdin.isatty()


def has_display(environ: Mapping[str, str]) -> bool:
    """Whether a browser's window can open; xdg-open without a display starts a browser in the terminal, or hangs."""
    return sys.platform in ("darwin", "win32") or bool(environ.get("DISPLAY") or environ.get("WAYLAND_DISPLAY"))


def _serve(
    client: "MlflowClient",
    candidate: "Candidate",
    record: "Callable[..., Review]",
    texts: "Words",
    reviewer: str | None,
    note: str,
    opens: bool,
) -> "Review":
    """Serve the page until it stores a review; click.Abort on Ctrl-C before that."""
    import secrets

    from sparsetune.report.review_page import render_review
    from sparsetune.tracking.review import CHECKLIST, download_videos, video_names
    from sparsetune.tracking.review_server import Submission, blind_letters, reviewed, serving
    from sparsetune.tracking.run_logger import user_name

    names = video_names(client, candidate.evaluation_id)
    sparse = blind_letters(names, secrets.randbits(64))

    def store(submission: Submission) -> "Review":
        return record(submission.reviewer, submission.note, *reviewed(submission, names, sparse))

    page = render_review(
        candidate.result,
        sparse,
        CHECKLIST,
        texts,
        run_id=candidate.run_id,
        reviewer=reviewer or user_name(),
        note=note,
    )
    try:
        with (
            scratch_folder() as folder,
            serving(page, download_videos(client, candidate.evaluation_id, names, folder), store) as server,
        ):
            click.echo(f"the review is at {server.link} (Ctrl-C ends it, with nothing stored)", err=True)
            if opens:
                click.launch(server.link)
            else:
                port = server.server_port
                forward = f"ssh -N -L {port}:127.0.0.1:{port} {platform.node()}"
                click.echo(f"to open it on another machine, first run there: {forward}", err=True)
            return server.wait()
    except KeyboardInterrupt:
        raise click.Abort("nothing was stored") from None
