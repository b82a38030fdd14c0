"""`sparsetune compare`: two evaluations side by side."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparsetune.cli.command import Command

if TYPE_CHECKING:
    from sparsetune.evaluation.comparison import Comparison


@click.command(cls=Command, name="compare", short_help="Set two evaluations side by side.")
@click.argument("before")
@click.argument("after")
@click.option(
    "--force", is_flag=True, help="Compare results of different models, settings or prompts.  [default: off, refuse]"
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the comparison to this .md or .json file too.  [default: none]",
)
@click.option("--markdown", is_flag=True, help="Print Markdown.  [default: off]")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON, alone on stdout.  [default: off]")
def command(before: str, after: str, force: bool, output: Path | None, markdown: bool, as_json: bool) -> None:
    """Compare the evaluations BEFORE and AFTER, paired by prompt and seed.

    Each is the JSON file of a result, or the folder that `sparsetune eval` left it in.

    \b
    Examples:
      sparsetune compare results/demo/before results/demo/after
      sparsetune compare before.json after.json --output comparison.md
    """
    from sparsetune.cli.tables import before_after_text
    from sparsetune.evaluation.compare import compare

    comparison = compare(before, after, force=force)
    if output is not None:
        _write(comparison, output)
    if as_json:
        click.echo(_json(comparison))
    elif markdown:
        click.echo(comparison.to_markdown(), nl=False)
    else:
        click.echo(before_after_text(comparison))


def _write(comparison: "Comparison", path: Path) -> None:
    from sparsetune.errors import UsageError
    from sparsetune.files import write_text

    if path.suffix not in (".md", ".json"):
        raise UsageError(f"--output must end in .md or .json, but is {path}; choose one of the two")
    write_text(path, comparison.to_markdown() if path.suffix == ".md" else _json(comparison) + "\n")


def _json(comparison: "Comparison") -> str:
    return json.dumps(comparison.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
