"""`sparsetune promote` and `sparsetune rollback`: the alias that servers load a checkpoint by."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from sparsetune.cli import completion, options
from sparsetune.cli.console import coloured_status, print_json
from sparsetune.cli.main import Command

if TYPE_CHECKING:
    from sparsetune.tracking.promotion import Move, Verdict


@click.command(cls=Command, name="promote")
@click.argument("run", metavar="RUN", shell_complete=completion.runs)
@options.registry_options("Alias to set")
@options.model_name_option("any; matters for `latest` only")
@click.option("--dry-run", is_flag=True, help="Print the checks and change nothing.  [default: off]")
@click.option(
    "--override", metavar="REASON", help="Promote despite failed checks; recorded on the version.  [default: none]"
)
@options.settings("promotion.margin_db", "promotion.margin_worst_db", "promotion.margin_speed")
@options.json_option("the checks")
@options.store_options
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
    """Register the checkpoint of RUN as a model version, and set the alias that servers load by.

    RUN is the id of a tuning or evaluation run, its first characters, or `latest`, the newest tuning with a winner.
    Checks must pass, else the exit status is 3: the gate on eval prompts, an OK review (`sparsetune review`), and
    comparisons, prompt by prompt, with the version that has the alias now and the first one under the same gate, which
    must show that quality and speed are no worse by more than the margins. The version that loses the alias gets
    `previous` for `sparsetune rollback`, or `previous-ALIAS` for an alias other than champion.

    \b
    Examples:
      sparsetune promote latest --dry-run
      sparsetune promote 3f2a9c1b --margin-db 1
      sparsetune promote 3f2a9c1b --alias staging --override "demo for the board, until Monday"
    """
    from sparsetune.errors import GateError
    from sparsetune.tracking.promotion import judge, promote
    from sparsetune.tracking.registry import open_registry
    from sparsetune.tracking.results import find_candidate

    config = options.build_config(ctx)
    store, client = options.open_store(config)
    candidate = find_candidate(client, run, options.short_name(model))
    registry = open_registry(client, store, candidate.model, name)
    verdict = judge(registry, candidate, alias, config.promotion)
    if not as_json:
        _print(verdict)
    move = promote(registry, verdict, override) if not dry_run and (verdict.passed or override is not None) else None
    if as_json:
        print_json(_as_json(verdict, move))
    elif move is not None:
        click.echo(_move_text(move))
        if override is not None:
            click.echo(
                "all checks passed; the override is not recorded" if verdict.passed else "the override is recorded"
            )
    elif verdict.passed:
        click.echo("all checks passed; nothing was changed")
    if not verdict.passed and override is None:
        advice = f"run `sparsetune review {candidate.run_id[:8]}`, or " if "human review" in verdict.unmet else ""
        raise GateError(
            f"cannot promote run {candidate.run_id[:8]}, failed checks: {', '.join(verdict.unmet)}; {advice}use "
            "--override REASON"
        )


@click.command(cls=Command, name="rollback")
@options.registry_options("Alias to move back")
@options.model_name_option("the configuration's, demo")
@options.json_option("what changed")
@options.store_options
@click.pass_context
def rollback_command(ctx: click.Context, alias: str, model: str | None, name: str | None, as_json: bool) -> None:
    """Swap the versions of an alias and of `previous`; a second rollback swaps them back.

    \b
    Examples:
      sparsetune rollback
      sparsetune rollback --model cogvideox-2b --alias staging
    """
    from sparsetune.tracking.promotion import rollback
    from sparsetune.tracking.registry import open_registry

    config = options.build_config(ctx)
    store, client = options.open_store(config)
    move = rollback(open_registry(client, store, options.short_name(model) or config.model.name, name), alias)
    if as_json:
        print_json({"uri": move.uri, "version": move.version, "replaced": move.replaced})
    else:
        click.echo(_move_text(move))


def _move_text(move: "Move") -> str:
    if not move.changed:
        return f"{move.uri} is version {move.version} already, with the same policy; nothing was changed"
    before = f", was version {move.replaced}" if move.replaced is not None else ""
    return f"{move.uri} is version {move.version}{before}"


def _print(verdict: "Verdict") -> None:
    candidate = verdict.candidate
    click.echo(f"run {candidate.run_id} for {verdict.name}@{verdict.alias}")
    for condition in verdict.conditions:
        met = coloured_status("met    " if condition.met else "NOT MET")
        click.echo(f"  {met}  {condition.name}: {condition.says}")


def _as_json(verdict: "Verdict", move: "Move | None") -> dict[str, Any]:
    return {
        "run_id": verdict.candidate.run_id,
        "evaluation_run_id": verdict.candidate.evaluation_id,
        "model": verdict.name,
        "alias": verdict.alias,
        "champion": verdict.champion,
        "first": verdict.first,
        "passed": verdict.passed,
        "conditions": [asdict(condition) for condition in verdict.conditions],
        "promoted": None if move is None else {"version": move.version, "replaced": move.replaced, "uri": move.uri},
    }
