"""`sparsetune ui`: the recorded runs in MLflow's user interface."""

import click

from sparsetune.cli.command import Command
from sparsetune.cli.failures import say
from sparsetune.cli.settings import build_config, file_options, setting


@click.command(cls=Command, name="ui", short_help="Open the MLflow UI on the recorded runs.")
@click.option("--host", default="127.0.0.1", help="Address to listen on.  [default: 127.0.0.1, this machine only]")
@click.option("--port", default=5000, type=click.IntRange(1, 65535), help="Port to listen on.  [default: 5000]")
@setting("tracking.uri", "--tracking-uri")
@setting("tracking.experiment", "--experiment", help="Experiment to open; null is that of the newest run")
@file_options
@click.pass_context
def command(ctx: click.Context, host: str, port: int) -> None:
    """Serve MLflow's user interface until Ctrl-C; its link shows the newest runs, and what was decided about them.

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
        say("starting MLflow's UI, which takes some seconds ...")
    registry = store.registry_uri if store.registry_is_apart and not store.registry_is_server else None
    serve(store.uri, host, port, registry_uri=registry, page=partial(page_of, config=tracking), say=say)
