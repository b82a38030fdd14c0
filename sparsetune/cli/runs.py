"""`sparsetune runs`: what was recorded, at a glance."""

import dataclasses
import json
from typing import TYPE_CHECKING

import click

from sparsetune.cli.colour import outcome
from sparsetune.cli.command import Command
from sparsetune.cli.failures import say
from sparsetune.cli.settings import build_config
from sparsetune.cli.stores import model_option, open_store, short_name, store_options

if TYPE_CHECKING:
    from sparsetune.tracking.results import RunRow


@click.command(cls=Command, name="runs", short_help="List the recorded runs, the best first.")
@model_option("all models")
@click.option("--limit", default=20, type=click.IntRange(1), help="Runs to list at most.  [default: 20]")
@click.option("--json", "as_json", is_flag=True, help="Print the runs as JSON, with whole ids.  [default: off]")
@store_options
@click.pass_context
def command(ctx: click.Context, model: str | None, limit: int, as_json: bool) -> None:
    """List tunings and evaluations: those that meet the gate first, the sparser the higher.

    Figures are those on the eval prompts.

    \b
    Examples:
      sparsetune runs
      sparsetune runs --model cogvideox-2b --limit 5 --json
    """
    from sparsetune.cli.tables import print_table
    from sparsetune.tracking.results import list_runs

    _, client = open_store(build_config(ctx))
    rows = list_runs(client, short_name(model))
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(row) for row in rows[:limit]], indent=2, ensure_ascii=False))
        return
    if not rows:
        say("no runs are recorded; make one: sparsetune tune")
        return
    heads = ("run", "name", "model", "sparsity", "psnr (dB)", "score", "gate", "review", "aliases")
    print_table((heads, [_cells(row) for row in rows[:limit]]))
    if len(rows) > limit:
        say(f"{len(rows) - limit} more; see them with --limit {len(rows)}")


def _cells(row: "RunRow") -> list[str]:
    name = row.name if row.status == "FINISHED" else f"{row.name} ({row.status.lower()})"
    return [
        row.run_id[:8],
        name,
        row.model or "-",
        "-" if row.sparsity is None else f"{row.sparsity:.3f}",
        "-" if row.psnr is None else f"{row.psnr:.2f}",
        "-" if row.score is None else f"{row.score:.0f}",
        outcome(row.gate or "-"),
        outcome(row.review or "-"),
        ", ".join(row.aliases) or "-",
    ]
