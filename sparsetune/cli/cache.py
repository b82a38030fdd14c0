"""`sparsetune cache`: dense baselines on disk."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from sparsetune.cli.console import log_note, print_json
from sparsetune.cli.main import Command, CommandGroup
from sparsetune.cli.options import build_config, cache_options, file_options, json_option

if TYPE_CHECKING:
    from sparsetune.evaluation.baseline import BaselineCache, CacheEntry


@click.group(cls=CommandGroup, name="cache")
def command() -> None:
    """List or clear the dense baselines, the videos that every evaluation compares with.

    \b
    Examples:
      sparsetune cache ls
      sparsetune cache clear --cache-dir /data/baselines
    """


@command.command(cls=Command, name="ls")
@cache_options
@file_options
@json_option("the list")
@click.pass_context
def ls(ctx: click.Context, as_json: bool) -> None:
    """List the baselines, the most recently used first.

    \b
    Example:
      sparsetune cache ls --json
    """
    cache = _cache(ctx)
    entries = cache.ls()
    if as_json:
        print_json([_as_dict(entry) for entry in entries])
        return
    for entry in entries:
        row = _as_dict(entry)
        click.echo(f"{entry.digest[:12]}  {_size(entry.size_bytes):>9}  {row['last_used']}  {row['prompt']}")
    total = sum(entry.size_bytes for entry in entries)
    log_note(f"{len(entries)} baselines, {_size(total)}, in {cache.folder}")


@command.command(cls=Command, name="clear")
@cache_options
@file_options
@click.pass_context
def clear(ctx: click.Context) -> None:
    """Delete every baseline that no other process is using.

    \b
    Example:
      sparsetune cache clear
    """
    cache = _cache(ctx)
    cleared = cache.clear()
    in_use = f"; kept {cleared.num_in_use} in use" if cleared.num_in_use else ""
    click.echo(f"deleted {cleared.num_entries} baselines, {_size(cleared.size_bytes)}, in {cache.folder}{in_use}")


def _cache(ctx: click.Context) -> "BaselineCache":
    from sparsetune.evaluation.baseline import BaselineCache

    settings = build_config(ctx).cache
    return BaselineCache(settings.folder, settings.max_gb)


def _size(num_bytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes / 1e3:.1f} kB"


def _as_dict(entry: "CacheEntry") -> dict[str, str | int | None]:
    key = entry.info.key
    return {
        "digest": entry.digest,
        "source": key.get("source"),
        "prompt": key.get("prompt"),
        "seed": key.get("seed"),
        "size_bytes": entry.size_bytes,
        "last_used": datetime.fromtimestamp(entry.last_used, UTC).isoformat(timespec="seconds"),
        "path": str(entry.path),
    }
