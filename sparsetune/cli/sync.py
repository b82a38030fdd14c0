"""`sparsetune sync`: what a tracking server missed, sent."""

import json
from typing import TYPE_CHECKING

import click

from sparsetune.cli.command import Command
from sparsetune.cli.settings import build_config, file_options, setting

if TYPE_CHECKING:
    from sparsetune.tracking.sync import SessionSent


@click.command(cls=Command, name="sync", short_help="Send what a tracking server missed.")
@setting("tracking.uri", "--tracking-uri")
@file_options
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON, alone on stdout.  [default: off]")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Send what waits in mlruns/spool because its tracking server was away.

    Each write is sent to the server that it was meant for, and forgotten when that has it. It may be interrupted,
    and run as often as you like: nothing is recorded twice. What is damaged is set aside in mlruns/spool/damaged.

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
        click.echo(json.dumps([_row(session) for session in done], indent=2, ensure_ascii=False))
    else:
        for session in done:
            click.echo(_line(session))
        if not done:
            click.echo(f"nothing waits in {spool}")
    damaged = [path for session in done for path in session.damaged]
    if damaged and not left:
        raise TrackingError(
            f"all writes must be readable, but {len(damaged)} are damaged and were set aside, the first as "
            f"{damaged[0]}; all others were sent: look at them, or delete them"
        )
    if left:
        raise TrackingError(
            f"all writes must reach their server, but {sum(session.left for session in left)} still wait: "
            f"{left[0].reason}; run `sparsetune sync` again, or delete {left[0].folder} to give them up"
        )


def _row(session: "SessionSent") -> dict[str, object]:
    return {
        "folder": str(session.folder),
        "server": session.server,
        "sent": session.sent,
        "left": session.left,
        "reason": session.reason,
        "damaged": [str(path) for path in session.damaged],
    }


def _line(session: "SessionSent") -> str:
    line = f"{session.folder.name}: {session.sent} writes sent to {session.server}"
    line += f", {len(session.damaged)} damaged and set aside" if session.damaged else ""
    return f"{line}, {session.left} left ({session.reason})" if session.left else line
