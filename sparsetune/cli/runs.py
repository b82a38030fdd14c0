"""`sparsetune runs`: a list of the recorded runs."""

import dataclasses
from typing import TYPE_CHECKING

import click

from sparsetune.cli.console import coloured_status, log_note, print_json
from sparsetune.cli.main import Command
from sparsetune.cli.options import build_config, json_option, model_name_option, short_name, store_options

if TYPE_CHECKING:
    from sparsetune.tracking.results import RunRow


@click.command(cls=Command, name="runs")
@model_name_option("all models")
@click.option("--limit", default=20, type=click.IntRange(1), help="Maximum number of runs.  [default: 20]")
@json_option("the runs, with full ids,")
@store_options
@click.pass_context
def command(ctx: click.Context, model: str | None, limit: int, as_json: bool) -> None:
    """List tunings and evaluations: those that pass the gate first, then by sparsity.

    Figures are those on the eval prompts.

    \b
    Examples:
      sparsetune runs
      sparsetune runs --model cogvideox-2b --limit 5 --json
    """
    from sparsetune.cli.tables import number_text, print_table
    from sparsetune.tracking.results import list_runs
    from sparsetune.tracking.store import resolve_store

    rows = list_runs(resolve_store(build_config(ctx).tracking), short_name(model))
    if as_json:
        print_json([dataclasses.asdict(row) for row in rows[:limit]])
        return
    if not rows:
        log_note("no runs are recorded; start with `sparsetune tune`")
        return

    def cells(row: "RunRow") -> list[str]:
        return [
            row.run_id[:8],
            row.name if row.status == "FINISHED" else f"{row.name} ({row.status.lower()})",
            row.model or "-",
            number_text(row.sparsity, ".3f"),
            number_text(row.psnr, ".2f"),
            number_text(row.psnr_worst, ".2f"),
            number_text(row.score, ".0f"),
            coloured_status(row.gate or "-"),
            coloured_status(row.review or "-"),
            ", ".join(row.aliases) or "-",
        ]

    heads = ("run", "name", "model", "sparsity", "psnr (dB)", "worst", "score", "gate", "review", "aliases")
    print_table((heads, [cells(row) for row in rows[:limit]]))
    if len(rows) > limit:
        log_note(f"{len(rows) - limit} more; list them with --limit {len(rows)}")
