"""`sparsetune promote`: a run's checkpoint becomes the one that serves."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from sparsetune.cli.colour import outcome
from sparsetune.cli.command import Command
from sparsetune.cli.settings import build_config
from sparsetune.cli.stores import model_option, open_store, short_name, store_options

if TYPE_CHECKING:
    from sparsetune.tracking.promotion import Move, Verdict


@click.command(cls=Command, name="promote", short_help="Let a run's checkpoint serve, if it may.")
@click.argument("run", metavar="RUN")
@click.option("--alias", default="champion", help="Alias to move to it.  [default: champion]")
@click.option("--name", help="Registered model's name.  [default: MODEL-sparse]")
@model_option("any; matters for `latest` only")
@click.option("--dry-run", is_flag=True, help="Print the verdict, change nothing.  [default: off]")
@click.option("--override", metavar="REASON", help="Promote all the same; kept on the version.  [default: none]")
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as JSON, alone on stdout.  [default: off]")
@store_options
@click.pass_context
def command(
    ctx: click.Context,
    run: str,
    alias: str,
    name: str | None,
    model: str | None,
    dry_run: bool,
    override: str | None,
    as_json: bool,
) -> None:
    """Register the checkpoint of RUN, and move to it the alias that servers load by.

    RUN is the id of a tuning or evaluation run, its first characters, or `latest`, the newest tuning with a winner.
    Three conditions must hold, else the exit status is 3: the gate on eval prompts, a review that says OK
    (`sparsetune review`), and a comparison with the version that has the alias now, which mustn't be better. That
    version keeps the alias `previous`, for `sparsetune rollback`; that of another alias than champion is
    `previous-ALIAS`.

    \b
    Examples:
      sparsetune promote latest --dry-run
      sparsetune promote 3f2a9c1b
      sparsetune promote 3f2a9c1b --alias staging --override "demo for the board, taken back on Monday"
    """
    from sparsetune.errors import GateError
    from sparsetune.tracking.promotion import judge, promote
    from sparsetune.tracking.registry import open_registry
    from sparsetune.tracking.results import find_candidate

    store, client = open_store(build_config(ctx))
    candidate = find_candidate(client, run, short_name(model))
    registry = open_registry(client, store, candidate.model, name)
    verdict = judge(registry, candidate, alias)
    go = not dry_run and (verdict.passed or override is not None)
    if not as_json:
        _print(verdict)
    move = promote(registry, verdict, override) if go else None
    if as_json:
        click.echo(json.dumps(_as_json(verdict, move), indent=2, ensure_ascii=False))
    elif move is not None:
        click.echo(moved_text(move))
        if override is not None:
            click.echo("the override wasn't needed and isn't kept" if verdict.passed else "the override is kept on it")
    elif verdict.passed:
        click.echo("it may be promoted; nothing was changed")
    if not verdict.passed and override is None:
        raise GateError(
            f"every condition must be met to promote run {candidate.run_id[:8]}, but not met: "
            f"{', '.join(verdict.unmet)}; mend that, or give --override a reason"
        )


def moved_text(move: "Move") -> str:
    """Say in one line what an alias names now."""
    before = f", before it version {move.replaced}" if move.replaced is not None else ""
    return f"{move.uri} is version {move.version}{before}"


def _print(verdict: "Verdict") -> None:
    candidate = verdict.candidate
    click.echo(f"run {candidate.run_id} for {verdict.name}@{verdict.alias}")
    for condition in verdict.conditions:
        met = outcome("met    " if condition.met else "NOT MET")
        click.echo(f"  {met}  {condition.name}: {condition.says}")


def _as_json(verdict: "Verdict", move: "Move | None") -> dict[str, Any]:
    return {
        "run_id": verdict.candidate.run_id,
        "evaluation_run_id": verdict.candidate.evaluation_id,
        "model": verdict.name,
        "alias": verdict.alias,
        "champion": verdict.champion,
        "passed": verdict.passed,
        "conditions": [asdict(condition) for condition in verdict.conditions],
        "promoted": None if move is None else {"version": move.version, "replaced": move.replaced, "uri": move.uri},
    }
