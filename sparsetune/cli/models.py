"""`sparsetune models`: models with a packaged configuration."""

from typing import Any

import click

from sparsetune.cli import completion
from sparsetune.cli.console import print_json
from sparsetune.cli.main import Command, CommandGroup
from sparsetune.cli.options import json_option, options_table


@click.group(cls=CommandGroup, name="models", invoke_without_command=True)
@json_option("the list")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List the models with a packaged configuration; others work by their hub id.

    \b
    Examples:
      sparsetune models
      sparsetune models show wan2.1-t2v-1.3b
    """
    if ctx.invoked_subcommand is not None:
        return
    rows = [_row(name) for name in _names()]
    if as_json:
        print_json(rows)
        return
    from sparsetune.cli.tables import print_table

    cells = [[str(value) for value in row.values()] for row in rows]
    print_table((tuple(key.replace("_", " ") for key in rows[0]), cells))


@command.command(cls=Command, name="show")
@click.argument("name", shell_complete=completion.from_names(options_table()["model.source"]["names"]))
@json_option("it")
def show(name: str, as_json: bool) -> None:
    """Print facts of the model NAME: tokens, attention's share of the work, whether sparsity can save time, weights.

    NAME is one from `sparsetune models`. Nothing is downloaded.

    \b
    Example:
      sparsetune models show hunyuanvideo --json
    """
    shown = _shown(name)
    if as_json:
        print_json(shown)
        return
    for key, value in shown.items():
        click.echo(f"{key.replace('_', ' ')}: {value}")


def _names() -> list[str]:
    from sparsetune.config.files import named_configs

    return list(named_configs())


def _row(name: str) -> dict[str, Any]:
    from sparsetune.config import resolve
    from sparsetune.config.files import find_config, read_config

    facts = read_config(find_config(name))
    config = resolve(name, (), {})
    size = config.generation
    return {
        "name": config.model.name,
        "source": config.model.source,
        "size": f"{size.num_frames} x {size.height} x {size.width}",
        "steps": size.num_inference_steps,
        "tokens": facts["facts.tokens"],
        "layers": facts["facts.layers"],
        "heads": facts["facts.heads"],
        "head_dim": facts["facts.head_dim"],
    }


def _shown(name: str) -> dict[str, Any]:
    from sparsetune.config import resolve
    from sparsetune.config.files import find_config, nearest, read_config
    from sparsetune.errors import UsageError
    from sparsetune.models.model_shape import ModelShape

    if name not in _names():
        hint = nearest(name, dict.fromkeys(_names()))
        raise UsageError(
            f"unknown model {name!r}; " + (f"did you mean {hint}?" if hint else f"choose one of {', '.join(_names())}")
        )
    config = resolve(name, (), {})
    facts, size = read_config(find_config(name)), config.generation
    shape = ModelShape.of_facts(facts)
    frames, height, width = shape.grid
    return {
        "name": name,
        "source": config.model.source,
        "revision": config.model.revision or "not pinned",
        "lora": config.model.lora or "none",
        "pipeline": facts["facts.pipeline"],
        "transformers": shape.num_transformers,
        "layers": shape.num_layers,
        "heads": shape.num_heads,
        "head_dim": shape.head_dim,
        "video": f"{size.num_frames} x {size.height} x {size.width}, {size.num_inference_steps} steps, "
        f"guidance {size.guidance_scale:g}"
        + ("" if size.guidance_scale_2 is None else f", then {size.guidance_scale_2:g}"),
        "tokens": shape.num_tokens,
        "token_grid": f"{frames} x {height} x {width}",
        "text_tokens": shape.num_text_tokens,
        "attention_share": round(shape.attention_share, 3),
        "gain_from_sparsity": shape.sparsity_gain,
        "transformer_parameters": shape.num_parameters,
        "transformer_gb": round(shape.transformer_gb, 2),
        "vae_gb": round(shape.vae_gb, 2),
    }
