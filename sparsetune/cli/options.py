"""Options of commands: settings of the configuration, global output options, and access to the tracking store."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, get_args

import click
from click.core import ParameterSource

from sparsetune.cli.console import LogFormat, global_options

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from sparsetune.config import Config
    from sparsetune.tracking import Store

OPTIONS_TABLE: Final = Path(__file__).with_name("options.json")
"""Type, help and default text of every setting, written from config/models.py by `python -m tools.options_table`.

It spares `--help` the import of pydantic; a test compares it with the models.
"""

_EXPLICIT = "sparsetune.explicit"
_TYPES = {"int": int, "float": float, "str": str, "path": click.Path(path_type=Path)}

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


@functools.cache
def options_table() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = json.loads(OPTIONS_TABLE.read_text(encoding="utf-8"))
    return table


class SettingOption(click.Option):
    """An option for the setting `key`; commands get its value through `build_config` only."""

    def __init__(self, *args: Any, key: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.key = key


def setting(
    key: str, *names: str, help: str | None = None, metavar: str | None = None, multiple: bool = False
) -> Callable[[Decorated], Decorated]:
    """Add the option of a setting to a command.

    Args:
        key: the setting, e.g. `generation.num_frames`.
        names: option names; by default made from the key, e.g. `--num-frames`.
        help: replaces the setting's description.
        metavar: placeholder of the value in the help.
        multiple: whether the option may be repeated, each adding one value.
    """
    entry = options_table()[key]
    flag = key.rpartition(".")[2].replace("_", "-")
    kind = entry["type"]
    is_flag = kind == "bool"
    default_names = (f"--{flag}/--no-{flag}",) if is_flag else (f"--{flag}",)
    return click.option(
        *(names or default_names),
        key.replace(".", "__"),
        cls=SettingOption,
        key=key,
        # Ranges are checked by the configuration, whose error names the setting.
        type=None if is_flag else click.Choice(kind) if isinstance(kind, list) else _TYPES[kind],
        metavar=metavar,
        multiple=multiple,
        default=None,
        expose_value=False,
        callback=_store_explicit,
        help=f"{help or entry['help']}.  [default: {entry['default']}]",
    )


def settings(*keys: str) -> Callable[[Decorated], Decorated]:
    """Add the options of several settings, in this order."""

    def decorate(command: Decorated) -> Decorated:
        for key in reversed(keys):
            command = setting(key)(command)
        return command

    return decorate


def file_options(command: Decorated) -> Decorated:
    """Add `--config` and `--set`."""
    command = click.option(
        "--set",
        "sets",
        multiple=True,
        metavar="KEY=VALUE",
        expose_value=False,
        callback=_store_explicit,
        help="Any setting, e.g. gate.min_psnr=40; may be repeated.  [default: none]",
    )(command)
    return click.option(
        "--config",
        "config_file",
        metavar="FILE",
        expose_value=False,
        callback=_store_explicit,
        help="YAML file of settings, or the name of a packaged one.  [default: the model's packaged one]",
    )(command)


def config_options(command: Decorated) -> Decorated:
    """Add `--model`, `--config` and `--set`."""
    model = setting("model.source", "--model", help="demo (included), cogvideox-2b, a local folder, or a hub id")
    return model(file_options(command))


def model_options(command: Decorated) -> Decorated:
    """Add how a model is loaded, or built with random weights."""
    command = click.option(
        "--tiny", is_flag=True, expose_value=False, callback=_store_random_weights,
        help="Build a small model of this type with random weights, which runs on any machine.  [default: off]",
    )(command)  # fmt: skip
    command = click.option(
        "--random-weights", is_flag=True, expose_value=False, callback=_store_random_weights,
        help="Build the full-size model with random weights, without a download.  [default: off]",
    )(command)  # fmt: skip
    return settings("model.device", "model.dtype", "model.offload", "model.vae_tiling", "model.vae_slicing", "backend")(
        command
    )


generation_options = settings(
    "generation.num_inference_steps",
    "generation.num_frames",
    "generation.height",
    "generation.width",
    "generation.guidance_scale",
    "generation.guidance_scale_2",
    "generation.fps",
)
gate_options = settings("gate.min_frame_cosine", "gate.min_psnr", "gate.min_psnr_worst", "gate.min_psnr_frame")


def metric_options(command: Decorated) -> Decorated:
    """Add which metrics are computed, and modules of custom metrics."""
    command = setting(
        "eval.metric_modules", "--metric-module", metavar="FILE", multiple=True,
        help="Python file or module with custom metrics, which are always computed; may be repeated",
    )(command)  # fmt: skip
    return setting("eval.metrics", "--metrics", help="Metrics to compute, by name, separated by commas")(command)


def cache_options(command: Decorated) -> Decorated:
    """Add folder and size of the baseline cache."""
    command = setting("cache.max_gb", "--cache-max-gb")(command)
    return setting("cache.dir", "--cache-dir")(command)


def engine_options(command: Decorated) -> Decorated:
    """Add the executor and its workers."""
    command = settings("engine.workers", "engine.gpus_per_worker", "engine.threads_per_worker", "engine.ray_address")(
        command
    )
    return setting("engine.name", "--engine")(command)


def tracking_options(command: Decorated) -> Decorated:
    """Add whether and where runs are recorded."""
    command = setting("tracking.experiment", "--experiment")(command)
    command = setting("tracking.uri", "--tracking-uri")(command)
    return setting("tracking.enabled", "--track/--no-track")(command)


def run_options(command: Decorated) -> Decorated:
    """Add what `tune` and `eval` share: generation, model, gate, cache, executor, tracking."""
    for options in (tracking_options, engine_options, cache_options, gate_options, model_options, generation_options):
        command = options(command)
    return command


def store_options(command: Decorated) -> Decorated:
    """Add `--tracking-uri`, `--config` and `--set`."""
    return setting("tracking.uri", "--tracking-uri")(file_options(command))


def model_name_option(default: str) -> Callable[[Decorated], Decorated]:
    """Add a `--model` that only selects runs; `default` says in the help what applies without it."""
    return click.option("--model", metavar="MODEL", help=f"Model, as for `sparsetune tune`.  [default: {default}]")


def json_option(content: str) -> Callable[[Decorated], Decorated]:
    """Add `--json` as the argument `as_json`; `content` says what it prints."""
    return click.option("--json", "as_json", is_flag=True, help=f"Print {content} as JSON.  [default: off]")


def output_options(*, hidden: bool = False) -> list[click.Parameter]:
    """Return `--quiet` and `--log-format`, which set the global options as soon as they are parsed."""
    return [
        click.Option(
            ["-q", "--quiet"],
            is_flag=True,
            hidden=hidden,
            expose_value=False,
            callback=_set_quiet,
            help="Print only results and errors.  [default: off]",
        ),
        click.Option(
            ["--log-format"],
            type=click.Choice(get_args(LogFormat)),
            hidden=hidden,
            expose_value=False,
            callback=_set_log_format,
            help="Log progress to stderr as text, or as one JSON object a line.  [default: text]",
        ),
    ]


def build_config(ctx: click.Context) -> "Config":
    """Resolve a command's configuration: explicit options over `--set`, environment, file, defaults."""
    from sparsetune.config import resolve

    explicit: dict[str, Any] = dict(ctx.meta.get(_EXPLICIT, {}))
    config_file, sets = explicit.pop("config_file", None), explicit.pop("sets", ())
    return resolve(config_file, sets, None, explicit)


def short_name(model: str | None) -> str | None:
    """Return the short name that runs have, e.g. cogvideox-2b for THUDM/CogVideoX-2b."""
    from sparsetune.config import resolve

    return None if model is None else resolve(flags={"model.source": model}).model.name


def open_store(config: "Config") -> "tuple[Store, MlflowClient]":
    """Connect to the tracking store of a configuration."""
    from sparsetune.tracking import connect, resolve_store

    store = resolve_store(config.tracking)
    return store, connect(store)


def local_checkpoint(checkpoint: str | None, config: "Config") -> str | None:
    """Return the path of a checkpoint, downloaded first if it is in MLflow."""
    from sparsetune.tracking.lookup import is_reference, resolve_checkpoint

    if checkpoint is None or not is_reference(checkpoint):
        return checkpoint
    return str(resolve_checkpoint(checkpoint, config))


def _store_explicit(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    """Store an option given on the command line, by its setting's key or its own name."""
    assert param.name is not None
    if ctx.get_parameter_source(param.name) is ParameterSource.COMMANDLINE:
        key = param.key if isinstance(param, SettingOption) else param.name
        ctx.meta.setdefault(_EXPLICIT, {})[key] = value


def _store_random_weights(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Store the requested size; `--tiny` wins over `--random-weights`."""
    explicit = ctx.meta.setdefault(_EXPLICIT, {})
    if value and param.name == "tiny":
        explicit["model.random_weights"] = "tiny"
    elif value:
        explicit.setdefault("model.random_weights", "full")


def _set_quiet(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        global_options(ctx).quiet = True


def _set_log_format(ctx: click.Context, _param: click.Parameter, value: LogFormat | None) -> None:
    if value is not None:
        global_options(ctx).log_format = value
