"""`sparsetune rollback`: the checkpoint that served before serves again."""

import json

import click

from sparsetune.cli.command import Command
from sparsetune.cli.settings import build_config
from sparsetune.cli.stores import model_option, open_store, short_name, store_options


@click.command(cls=Command, name="rollback", short_help="Let the checkpoint before the last promotion serve again.")
@click.option("--alias", default="champion", help="Alias to move back.  [default: champion]")
@model_option("the configuration's, demo")
@click.option("--name", help="Registered model's name.  [default: MODEL-sparse]")
@click.option("--json", "as_json", is_flag=True, help="Print what changed as JSON.  [default: off]")
@store_options
@click.pass_context
def command(ctx: click.Context, alias: str, model: str | None, name: str | None, as_json: bool) -> None:
    """Swap the versions behind an alias and behind `previous`; a second rollback swaps them back.

    \b
    Examples:
      sparsetune rollback
      sparsetune rollback --model cogvideox-2b --alias staging
    """
    from sparsetune.cli.promote import moved_text
    from sparsetune.tracking.promotion import rollback
    from sparsetune.tracking.registry import open_registry

    config = build_config(ctx)
    store, client = open_store(config)
    move = rollback(open_registry(client, store, short_name(model) or config.model.name, name), alias)
    if as_json:
        click.echo(json.dumps({"uri": move.uri, "version": move.version, "replaced": move.replaced}, indent=2))
    else:
        click.echo(moved_text(move))
