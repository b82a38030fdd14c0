"""`sparsetune sync`: upload of what a tracking server missed."""

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from sparsetune.cli.console import print_json
from sparsetune.cli.main import Command
from sparsetune.cli.options import build_config, json_option, store_options

if TYPE_CHECKING:
    from sparsetune.tracking.sync import SessionSent


@click.command(cls=Command, name="sync")
@store_options
@json_option("the outcome")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Upload what is stored in mlruns/spool because the tracking server was down.

    Each write goes to the server that it was meant for, and is deleted once that has it. The command may be interrupted
    and repeated: nothing is recorded twice. Damaged files are moved to mlruns/spool/damaged.

    \b
    Examples:
      sparsetune sync
      sparsetune sync --json
    """
    from sparsetune.errors import TrackingError
    from sparsetune.tracking import resolve_store
    from sparsetune.tracking.spool import spool_folder
    from sparsetune.tracking.sync import sync

    config = build_config(ctx)
    spool = spool_folder(config.tracking)
    done = sync(spool, resolve_store(config.tracking))
    left = [session for session in done if session.left]
    if as_json:
        rows = [
            asdict(session) | {"folder": str(session.folder), "damaged": [str(path) for path in session.damaged]}
            for session in done
        ]
        print_json(rows)
    else:
        for session in done:
            click.echo(_line(session))
        if not done:
            click.echo(f"nothing to upload in {spool}")
    damaged = [path for session in done for path in session.damaged]
    if damaged and not left:
        raise TrackingError(
            f"{len(damaged)} writes are damaged and were moved, the first to {damaged[0]}; all others were uploaded; "
            "inspect or delete the damaged files"
        )
    if left:
        raise TrackingError(
            f"{sum(session.left for session in left)} writes were not uploaded: {left[0].reason}; run `sparsetune "
            f"sync` again, or delete {left[0].folder} to discard them"
        )


def _row(session: "SessionSent") -> dict[str, object]:
    paths = {"folder": str(session.folder), "damaged": [str(path) for path in session.damaged]}
    return asdict(session) | paths


def _line(session: "SessionSent") -> str:
    line = f"{session.folder.name}: {session.sent} writes uploaded to {session.server}"
    line += f", {len(session.damaged)} damaged" if session.damaged else ""
    return f"{line}, {session.left} left ({session.reason})" if session.left else line
