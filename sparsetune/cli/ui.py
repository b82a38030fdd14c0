"""`sparsetune ui`: MLflow's user interface on the recorded runs."""

import click

from sparsetune.cli.console import log_note
from sparsetune.cli.main import Command
from sparsetune.cli.options import build_config, file_options, setting


@click.command(cls=Command, name="ui")
@click.option("--host", default="127.0.0.1", help="Address to listen on.  [default: 127.0.0.1, this machine only]")
@click.option("--port", default=5000, type=click.IntRange(1, 65535), help="Port to listen on.  [default: 5000]")
@setting("tracking.uri", "--tracking-uri")
@setting("tracking.experiment", "--experiment", help="Experiment to open; null is that of the newest run")
@file_options
@click.pass_context
def command(ctx: click.Context, host: str, port: int) -> None:
    """Serve MLflow's user interface until Ctrl-C; the printed link opens the newest runs.

    \b
    Examples:
      sparsetune ui
      sparsetune ui --port 8080
    """
    from functools import partial

    from sparsetune.tracking import resolve_store, serve
    from sparsetune.tracking.ui import page_of

    tracking = build_config(ctx).tracking
    store = resolve_store(tracking)
    if not store.is_server:
        log_note("starting the MLflow UI, which takes some seconds ...")
    registry = store.registry_uri if store.registry_is_apart and not store.registry_is_server else None
    serve(store.uri, host, port, registry_uri=registry, page=partial(page_of, config=tracking), say=log_note)
