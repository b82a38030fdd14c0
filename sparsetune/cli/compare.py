"""`sparsetune compare`: comparison of two evaluations."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparsetune.cli import completion
from sparsetune.cli.console import print_json
from sparsetune.cli.main import Command
from sparsetune.cli.options import (
    build_config,
    json_option,
    language_option,
    model_name_option,
    open_store,
    short_name,
    store_options,
)

if TYPE_CHECKING:
    from sparsetune.evaluation.compare import Comparison
    from sparsetune.evaluation.result import EvaluationResult


@click.command(cls=Command, name="compare")
@click.argument("before", required=False, shell_complete=completion.run_or_file)
@click.argument("after", required=False, shell_complete=completion.run_or_file)
@click.option(
    "--before-after",
    metavar="RUN",
    help="Compare a tuning run's two evaluations: SpargeAttn's default thresholds, the winner.  [default: none]",
)
@model_name_option("any; matters for `latest` only")
@click.option(
    "--force", is_flag=True, help="Compare results of different models, settings or prompts.  [default: off, refuse]"
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write the comparison to this .md or .json file.  [default: none]",
)
@click.option("--markdown", is_flag=True, help="Print Markdown.  [default: off]")
@language_option("the printed comparison; zh is shorter")
@json_option("the comparison")
@store_options
@click.pass_context
def command(
    ctx: click.Context,
    before: str | None,
    after: str | None,
    before_after: str | None,
    model: str | None,
    force: bool,
    output: Path | None,
    markdown: bool,
    lang: str,
    as_json: bool,
) -> None:
    """Compare the evaluations BEFORE and AFTER, paired by prompt and seed.

    Each is the JSON file of a result, the folder that `sparsetune eval` wrote, the id of a run or its first
    characters, `latest`, or a registered model as models:/NAME@ALIAS.

    \b
    Examples:
      sparsetune compare results/demo/before results/demo/after
      sparsetune compare before.json after.json --output comparison.md
      sparsetune compare models:/demo-sparse@champion 3f2a9c1b
      sparsetune compare --before-after latest
    """
    from sparsetune.cli.tables import before_after_text, gain_lines, summary_text
    from sparsetune.evaluation.compare import compare

    first, second = _sides(ctx, before, after, before_after, model)
    comparison = compare(first, second, force=force)
    if output is not None:
        _write(comparison, output)
    if as_json:
        print_json(comparison.to_dict())
    elif markdown:
        click.echo(comparison.to_markdown(), nl=False)
    elif lang == "zh":
        from sparsetune.report.summary import comparison_summary
        from sparsetune.report.words import words

        click.echo(summary_text(comparison_summary(comparison, words("zh"))))
    else:
        if not isinstance(second, str) and before_after is not None:
            click.echo("\n".join([*gain_lines(second), ""]))
        click.echo(before_after_text(comparison))


def _sides(
    ctx: click.Context, before: str | None, after: str | None, before_after: str | None, model: str | None
) -> "tuple[EvaluationResult | str, EvaluationResult | str]":
    """Return the two results, or their paths; connects to the store only if one of them is there."""
    from sparsetune.errors import UsageError
    from sparsetune.tracking.results import before_and_after, is_run, result_of

    if before_after is not None:
        if before is not None:
            raise UsageError("--before-after cannot be combined with BEFORE; omit one")
        _, client = open_store(build_config(ctx))
        return before_and_after(client, before_after, short_name(model))
    if before is None or after is None:
        raise UsageError("compare needs BEFORE and AFTER, or --before-after RUN")
    if not is_run(before) and not is_run(after):
        return before, after
    _, client = open_store(build_config(ctx))
    first, second = (result_of(client, side, short_name(model)) if is_run(side) else side for side in (before, after))
    return first, second


def _write(comparison: "Comparison", path: Path) -> None:
    from sparsetune.errors import UsageError
    from sparsetune.files import write_json, write_text

    if path.suffix not in (".md", ".json"):
        raise UsageError(f"--output must end in .md or .json, got {path}")
    if path.suffix == ".md":
        write_text(path, comparison.to_markdown())
    else:
        write_json(path, comparison.to_dict())
