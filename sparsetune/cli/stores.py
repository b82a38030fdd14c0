"""How commands reach the tracking store, and checkpoints in it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sparsetune.cli.settings import file_options, setting
from sparsetune.config import Config, resolve

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from sparsetune.tracking import Store

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def store_options(command: Decorated) -> Decorated:
    """Add `--tracking-uri`, `--config` and `--set`."""
    return setting("tracking.uri", "--tracking-uri")(file_options(command))


def model_option(default: str) -> Callable[[Decorated], Decorated]:
    """Add `--model`; `default` tells in the help what holds without it."""
    return click.option("--model", metavar="MODEL", help=f"Model, as `sparsetune tune` takes it.  [default: {default}]")


def short_name(model: str | None) -> str | None:
    """Turn what `--model` takes into the short name that runs bear, e.g. THUDM/CogVideoX-2b into cogvideox-2b."""
    return None if model is None else resolve(flags={"model.source": model}).model.name


def open_store(config: Config) -> "tuple[Store, MlflowClient]":
    """Connect to the store of a configuration."""
    from sparsetune.tracking import connect, resolve_store

    store = resolve_store(config.tracking)
    return store, connect(store)


def local_checkpoint(checkpoint: str | None, config: Config) -> str | None:
    """Give the path of a checkpoint that may be in MLflow, downloaded if it is; a path stays as it was given."""
    from sparsetune.tracking.lookup import is_reference, resolve_checkpoint

    if checkpoint is None or not is_reference(checkpoint):
        return checkpoint
    return str(resolve_checkpoint(checkpoint, config))
