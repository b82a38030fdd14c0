"""Options of commands: settings of the configuration, global output options, and access to the tracking store."""

import functools
import json
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, get_args

import click
from click.core import ParameterSource

from sparsetune.cli import completion
from sparsetune.cli.console import LogFormat, global_options
from sparsetune.errors import ConfigError

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from sparsetune.api import TunedCheckpoint
    from sparsetune.config import Config, EvalConfig, TuneConfig
    from sparsetune.tracking import Store, TrackingListener

OPTIONS_TABLE: Final = Path(__file__).with_name("options.json")
"""Type, help and default text of every setting, written from config/models.py by `python -m tools.options_table`.

It spares `--help` the import of pydantic; a test compares it with the models.
"""

_NAMES: Final = {
    "cache.dir": "--cache-dir",
    "cache.max_gb": "--cache-max-gb",
    "engine.name": "--engine",
    "gate.preset": "--gate",
    "tracking.enabled": "--track/--no-track",
    "tracking.uri": "--tracking-uri",
}
"""Options that aren't called as the last part of their setting."""

_EXPLICIT = "sparsetune.explicit"
HELP_ALL: Final = "sparsetune.help_all"
"""Keys of a context's `meta`: options given by setting, and whether the help is to show all of them."""

_TYPES = {"int": int, "float": float, "str": str, "path": click.Path(path_type=Path)}

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


@functools.cache
def options_table() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = json.loads(OPTIONS_TABLE.read_text(encoding="utf-8"))
    return table


def setting(
    key: str,
    *names: str,
    help: str | None = None,
    metavar: str | None = None,
    multiple: bool = False,
    bare: str | None = None,
) -> Callable[[Decorated], Decorated]:
    """Add the option of a setting to a command, e.g. `--num-frames` for `generation.num_frames`.

    `help` replaces the setting's description; a `multiple` option adds one value each time it is given; `bare` is the
    value of an option that is given without one.
    """
    entry = options_table()[key]
    flag = key.rpartition(".")[2].replace("_", "-")
    kind = entry["type"]
    is_flag = kind == "bool"
    with_bare: dict[str, Any] = {} if bare is None else {"is_flag": False, "flag_value": bare}
    default_name = _NAMES.get(key, f"--{flag}/--no-{flag}" if is_flag else f"--{flag}")
    return click.option(
        *(names or (default_name,)),
        key.replace(".", "__"),
        # Ranges are checked by the configuration; `build_config` names the option in its error.
        type=None if is_flag else click.Choice(kind) if isinstance(kind, list) else _TYPES[kind],
        metavar=metavar,
        multiple=multiple,
        default=None,
        **with_bare,
        expose_value=False,
        callback=_store_explicit,
        shell_complete=_completion(key),
        help=f"{help or entry['help']}.  [default: {entry['default']}]",
    )


def _completion(key: str) -> completion.Complete | None:
    names = options_table()[key].get("names")
    if names is None:
        return None
    return completion.model_or_folder(names) if key == "model.source" else completion.from_names(names)


def _together(*decorators: Callable[[Decorated], Decorated]) -> Callable[[Decorated], Decorated]:
    def decorate(command: Decorated) -> Decorated:
        return functools.reduce(lambda decorated, decorator: decorator(decorated), reversed(decorators), command)

    return decorate


def settings(*keys: str) -> Callable[[Decorated], Decorated]:
    return _together(*map(setting, keys))


def _key(param: click.Parameter) -> str:
    """Return the key of a setting's option, e.g. gate.min_psnr for gate__min_psnr; other names stay."""
    return str(param.name).replace("__", ".")


def _store_explicit(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    """Store an option given on the command line, by its setting's key or its own name."""
    if ctx.get_parameter_source(str(param.name)) is ParameterSource.COMMANDLINE:
        ctx.meta.setdefault(_EXPLICIT, {})[_key(param)] = value


def _store_random_weights(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Store the requested size; `--tiny` wins over `--random-weights`."""
    explicit = ctx.meta.setdefault(_EXPLICIT, {})
    if value and param.name == "tiny":
        explicit["model.random_weights"] = "tiny"
    elif value:
        explicit.setdefault("model.random_weights", "full")


def _random_weights_option(name: str, help: str) -> Callable[[Decorated], Decorated]:
    return click.option(name, is_flag=True, expose_value=False, callback=_store_random_weights, help=help)


file_options = _together(
    click.option(
        "--config",
        "config_file",
        metavar="FILE",
        expose_value=False,
        callback=_store_explicit,
        help="YAML file of settings, or the name of a packaged one.  [default: the model's packaged one]",
    ),
    click.option(
        "--set",
        "sets",
        multiple=True,
        metavar="KEY=VALUE",
        expose_value=False,
        callback=_store_explicit,
        shell_complete=completion.from_names(f"{key}=" for key in options_table()),
        help="Any setting, e.g. gate.min_psnr=40; may be repeated.  [default: none]",
    ),
)
config_options = _together(
    setting("model.source", "--model", help="demo (included), cogvideox-2b, a local folder, or a hub id"),
    file_options,
)
store_options = _together(setting("tracking.uri"), file_options)
model_options = _together(
    settings(
        "model.device",
        "model.dtype",
        "model.offload",
        "model.vae_tiling",
        "model.vae_slicing",
        "model.lora",
        "model.compile",
        "backend",
    ),
    _random_weights_option(
        "--random-weights", "Build the full-size model with random weights, without a download.  [default: off]"
    ),
    _random_weights_option(
        "--tiny",
        "Build a small model of this type with random weights, which runs on any machine.  [default: off]",
    ),
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
gate_options = _together(
    settings("gate.preset", "gate.min_frame_cosine", "gate.min_psnr", "gate.min_psnr_worst", "gate.min_psnr_frame"),
    setting("gate.min_metrics", "--gate-min", metavar="NAME=VALUE", multiple=True),
    setting("gate.max_metrics", "--gate-max", metavar="NAME=VALUE", multiple=True),
)
metric_options = _together(
    setting("eval.metrics", help="Metrics to compute, by name, separated by commas"),
    setting("eval.lpips_weights", metavar="FILE"),
    setting(
        "eval.metric_modules",
        "--metric-module",
        metavar="FILE",
        multiple=True,
        help="Python file or module with custom metrics, which are always computed; may be repeated",
    ),
)
cache_options = settings("cache.dir", "cache.max_gb")
engine_options = settings(
    "engine.name", "engine.workers", "engine.gpus_per_worker", "engine.threads_per_worker", "engine.ray_address"
)
tracking_options = settings("tracking.enabled", "tracking.uri", "tracking.experiment")
run_options = _together(
    generation_options, model_options, gate_options, cache_options, engine_options, tracking_options
)
require_gate_option = click.option(
    "--require-gate", is_flag=True, help="Exit with status 3 if the gate is not met.  [default: off]"
)


def model_name_option(default: str) -> Callable[[Decorated], Decorated]:
    return click.option(
        "--model",
        metavar="MODEL",
        shell_complete=_completion("model.source"),
        help=f"Model, as for `sparsetune tune`.  [default: {default}]",
    )


def output_option(help: str) -> Callable[[Decorated], Decorated]:
    return click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help=help)


def checkpoint_option(purpose: str, default: str) -> Callable[[Decorated], Decorated]:
    kinds = "a folder or file, models:/NAME@ALIAS, runs:/ID, a run id or hf://OWNER/NAME"
    text = f"Checkpoint to {purpose}: {kinds}.  [default: {default}]"
    return click.option(
        "--checkpoint", "--tuned-path", "checkpoint", metavar="PATH", shell_complete=completion.checkpoint, help=text
    )


sparsity_option = click.option(
    "--sparsity",
    type=float,
    metavar="FRACTION",
    help="Another sparsity of the checkpoint, in (0, 1), read off its calibration.  [default: as it was tuned]",
)


def registry_options(alias_help: str) -> Callable[[Decorated], Decorated]:
    return _together(
        click.option("--alias", default="champion", help=f"{alias_help}.  [default: champion]"),
        click.option("--name", help="Name of the registered model.  [default: MODEL-sparse]"),
    )


def language_option(of: str) -> Callable[[Decorated], Decorated]:
    return click.option(
        "--lang", type=click.Choice(["en", "zh"]), default="en", help=f"Language of {of}.  [default: en]"
    )


def json_option(content: str) -> Callable[[Decorated], Decorated]:
    return click.option("--json", "as_json", is_flag=True, help=f"Print {content} as JSON.  [default: off]")


def output_options(*, hidden: bool = False) -> list[click.Parameter]:
    """Return the options of the whole program, which are accepted before and after a command's name."""

    def flag(*names: str, help: str) -> click.Option:
        return click.Option(
            names, is_flag=True, hidden=hidden, expose_value=False, callback=set_global, help=f"{help}.  [default: off]"
        )

    return [
        flag("-q", "--quiet", help="Print only results and errors"),
        flag("-v", "--verbose", help="Log every metric of each prompt"),
        flag("--debug", help="Show tracebacks and messages of other libraries"),
        click.Option(
            ["--log-format"],
            type=click.Choice(get_args(LogFormat)),
            hidden=hidden,
            expose_value=False,
            callback=set_global,
            help="Log progress to stderr as text, or as one JSON object a line.  [default: text]",
        ),
    ]


_GROUPS: Final = {
    "What to tune or evaluate": (
        "model.source", "config_file", "sets", "use_tuned", "checkpoint", "from_manifest", "random_weights", "tiny",
        "model.lora", "*.num_prompts", "*.prompt_file", "*.seed",
    ),
    "How to search": ("tune.*", "dry_run"),
    "Generation": ("generation.*",),
    "Quality": ("gate.*", "eval.*metric*", "eval.l*", "eval.yardstick_steps", "require_gate"),
    "Where it runs": ("model.*", "backend", "break_even", "engine.*", "cache.*"),
    "Tracking": ("tracking.*",),
    "Output": ("*",),
}  # fmt: skip
"""Headings of a long help, and the settings and options below each: the first that matches."""


def grouped(params: Iterable[click.Parameter]) -> dict[str, list[click.Parameter]]:
    """Sort options by the headings of `_GROUPS`; those without any are left out."""
    found: dict[str, list[click.Parameter]] = {heading: [] for heading in _GROUPS}
    for param in params:
        heading = next(
            heading for heading, keys in _GROUPS.items() if any(fnmatchcase(_key(param), key) for key in keys)
        )
        found[heading].append(param)
    return {heading: members for heading, members in found.items() if members}


def help_all_option() -> click.Option:
    """Return the option that prints the help with all options; `Command` says in its short help how many there are."""

    def show(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            ctx.meta[HELP_ALL] = True
            click.echo(ctx.get_help(), color=ctx.color)
            ctx.exit()

    return click.Option(["--help-all"], is_flag=True, is_eager=True, hidden=True, expose_value=False, callback=show)


def build_config(ctx: click.Context) -> "Config":
    from sparsetune.config import resolve

    explicit: dict[str, Any] = dict(ctx.meta.get(_EXPLICIT, {}))
    config_file, sets = explicit.pop("config_file", None), explicit.pop("sets", ())
    try:
        return resolve(config_file, sets, None, explicit)
    except ConfigError as error:
        for param in ctx.command.params:
            if _key(param) in explicit:
                error = _naming_option(error, _key(param), param.opts[0])
        raise error from None


def check_inputs(config: "Config", *prompts: "TuneConfig | EvalConfig", checkpoint: str | None = None) -> None:
    """Check the names and files that a command was given, before it imports PyTorch, which takes seconds."""
    from sparsetune.checkpoint import load_checkpoint
    from sparsetune.config.files import find_model
    from sparsetune.metrics import get, load_metrics
    from sparsetune.models.prompts import load_prompts

    find_model(config.model.source)
    for section in prompts:
        load_prompts(section.prompt_file, section.num_prompts)
    load_metrics(config.eval.metric_modules, config.eval.lpips_weights)
    for name in config.eval.metrics:
        get(name)
    if checkpoint is not None:
        load_checkpoint(checkpoint)


def given_bounds(ctx: click.Context, config: "Config") -> dict[str, Any]:
    """Return the bounds that were given: all of a --config's or preset's gate, or those of options and environment."""
    from sparsetune.config import explicit_keys

    explicit: dict[str, Any] = dict(ctx.meta.get(_EXPLICIT, {}))
    has_file = explicit.pop("config_file", None) is not None
    given = explicit_keys(explicit.pop("sets", ()), explicit)
    has_all = has_file or "gate.preset" in given
    bounds = {name: one for name, one in config.gate.bounds.items() if one not in (None, ())}
    return {name: one for name, one in bounds.items() if has_all or f"gate.{name}" in given}


def _naming_option(error: ConfigError, key: str, option: str) -> ConfigError:
    found = re.fullmatch(rf"{re.escape(key)}(:? .*) \(given as an option\)(.*)", str(error), re.DOTALL)
    return ConfigError(f"{option}{found[1]}{found[2]}") if found else error


def short_name(model: str | None) -> str | None:
    """Return the short name that runs have, e.g. cogvideox-2b for THUDM/CogVideoX-2b."""
    from sparsetune.config import resolve

    return None if model is None else resolve(flags={"model.source": model}).model.name


def open_store(config: "Config") -> "tuple[Store, MlflowClient]":
    from sparsetune.tracking import connect, resolve_store

    store = resolve_store(config.tracking)
    return store, connect(store)


def tracking_listeners(config: "Config") -> "list[TrackingListener]":
    """Return the listener that records the run, unless tracking is off."""
    if not config.tracking.enabled:
        return []
    from sparsetune.tracking import TrackingListener

    return [TrackingListener(config)]


def local_checkpoint(checkpoint: str | None, config: "Config", use_tuned: bool) -> str | None:
    """Return the path of a checkpoint, by default that of `tune`; one in MLflow or on the Hub is downloaded first."""
    from sparsetune.tracking.lookup import resolve_checkpoint

    if use_tuned and checkpoint is None:
        return str(config.model.results_folder / "checkpoint")
    return None if checkpoint is None else str(resolve_checkpoint(checkpoint, config))


def at_sparsity(checkpoint: str | None, sparsity: float | None) -> "TunedCheckpoint | str | None":
    """Return a checkpoint's path, or the checkpoint at another sparsity."""
    from sparsetune.errors import UsageError

    if sparsity is None:
        return checkpoint
    if checkpoint is None:
        raise UsageError("--sparsity needs --checkpoint or --use-tuned")
    from sparsetune.api import load_checkpoint

    return load_checkpoint(checkpoint).with_sparsity(sparsity)


def set_global(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if value:
        setattr(global_options(ctx), str(param.name), value)
