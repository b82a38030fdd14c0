"""`sparsetune checkpoint`: tuned policies on disk."""

import dataclasses
import json
from pathlib import Path

import click

from sparsetune.cli.command import Command


@click.group(name="checkpoint", short_help="Show or convert a tuned checkpoint.")
def command() -> None:
    """Show a tuned checkpoint, or convert it from or to SpargeAttn's form.

    \b
    Examples:
      sparsetune checkpoint show results/demo/checkpoint
      sparsetune checkpoint convert CogVideoX-2b_0.06_0.07.pt results/upstream
    """


@command.command(cls=Command, name="show")
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print manifest and layers as JSON.  [default: off]")
def show(path: str, as_json: bool) -> None:
    """Print what the checkpoint PATH holds: its manifest, and each layer's thresholds.

    PATH is a checkpoint folder, a .safetensors file or SpargeAttn's .pt.

    \b
    Example:
      sparsetune checkpoint show results/demo/checkpoint --json
    """
    from sparsetune.checkpoint import load_checkpoint, summarize
    from sparsetune.cli.tables import checkpoint_table, print_table

    checkpoint = load_checkpoint(path)
    layers = summarize(checkpoint)
    policy = checkpoint.policy
    manifest = checkpoint.manifest.model_dump(mode="json")
    rules = {
        "dense_fraction": policy.schedule.dense_fraction,
        "order": policy.order,
        "keep_text": policy.keep_text,
    }
    if as_json:
        rows = [dataclasses.asdict(layer) for layer in layers]
        click.echo(json.dumps({"manifest": manifest, "policy": rules, "layers": rows}, indent=2, ensure_ascii=False))
        return
    for name, value in (manifest | rules).items():
        if value not in (None, {}, []):
            click.echo(f"{name}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
    print_table(checkpoint_table(layers))


@command.command(cls=Command, name="convert")
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--allow-loss",
    is_flag=True,
    help="Write a .pt even where it can't hold all of the policy (dense steps, token order).  [default: off]",
)
def convert(source: str, target: Path, allow_loss: bool) -> None:
    """Write the checkpoint SOURCE as TARGET, in the form that TARGET's suffix names.

    `.pt` is SpargeAttn's form, `.safetensors` a lone policy file, anything else a checkpoint folder.

    \b
    Example:
      sparsetune checkpoint convert results/demo/checkpoint tuned.pt --allow-loss
    """
    from sparsetune.checkpoint import convert as convert_checkpoint

    click.echo(convert_checkpoint(source, target, allow_loss=allow_loss))
