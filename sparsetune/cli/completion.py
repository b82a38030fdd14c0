"""Completion of values on Tab: names of models, metrics and settings, runs of the local store, and checkpoints.

It imports neither pydantic nor MLflow: a shell waits for it.
"""

import os
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path

import click
from click.shell_completion import CompletionItem

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def from_names(names: Iterable[str]) -> Complete:
    """Complete one of the names; of a list with commas its last one."""
    known = sorted(names)

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        before, comma, last = incomplete.rpartition(",")
        return [CompletionItem(before + comma + name) for name in known if name.startswith(last)]

    return complete


def model_or_folder(names: Iterable[str]) -> Complete:
    """Complete a name, or a folder where none begins so."""
    complete_name = from_names(names)

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return complete_name(ctx, param, incomplete) or [CompletionItem(incomplete, type="dir")]

    return complete


def runs(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete `latest` and the ids of the local store's runs, the newest first."""
    found = [CompletionItem(run_id[:8], help=name) for run_id, name in _runs()]
    return [item for item in (CompletionItem("latest"), *found) if item.value.startswith(incomplete)]


def run_or_file(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete a run, or a path where none begins so."""
    return (runs(ctx, param, incomplete) if incomplete else []) or [CompletionItem(incomplete, type="file")]


def checkpoint(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the checkpoints below results/, runs of the local store, and paths where none begins so."""
    folders = [str(path.parent) for path in sorted(Path("results").glob("*/checkpoint/manifest.json"))]
    found = [CompletionItem(folder) for folder in folders if folder.startswith(incomplete)]
    return found + run_or_file(ctx, param, incomplete)


def _runs() -> list[tuple[str, str]]:
    from sparsetune.tracking.local_runs import read_names
    from sparsetune.urls import sqlite_path

    root = Path(os.environ.get("SPARSETUNE_TRACKING__ROOT", "mlruns"))
    database = sqlite_path(os.environ.get("MLFLOW_TRACKING_URI", "")) or root.absolute() / "mlflow.db"
    try:
        return read_names(database)
    except sqlite3.Error:
        return []  # there is no store yet, or none that can be read
