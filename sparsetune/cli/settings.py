"""Options that are settings: their type, help and default come from the configuration's models."""

import functools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import click
from click.core import ParameterSource
from pydantic.fields import FieldInfo

from sparsetune.config import Config, resolve
from sparsetune.config.files import configs_folder, find_config, read_config
from sparsetune.config.resolver import config_fields

_GIVEN = "sparsetune.given"

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


class SettingOption(click.Option):
    """An option that stands for the setting `key`; its value reaches a command through `build_config` only."""

    def __init__(self, *args: Any, key: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.key = key


def setting(
    key: str, *names: str, help: str | None = None, metavar: str | None = None, multiple: bool = False
) -> Callable[[Decorated], Decorated]:
    """Add the option of a setting to a command.

    Args:
        key: the setting, e.g. `generation.num_frames`.
        names: the option's names; `--num-frames` is made of the key where none are given.
        help: in place of the setting's description.
        metavar: what the value is called in the help.
        multiple: whether the option may be given again, each time with one more value.
    """
    field = config_fields()[key]
    flag = key.rpartition(".")[2].replace("_", "-")
    is_flag = field.annotation is bool
    default_names = (f"--{flag}/--no-{flag}",) if is_flag else (f"--{flag}",)
    text = (help or field.description or "").rstrip(".")
    return click.option(
        *(names or default_names),
        key.replace(".", "__"),
        cls=SettingOption,
        key=key,
        type=None if is_flag else _click_type(field.annotation),
        metavar=metavar,
        multiple=multiple,
        default=None,
        expose_value=False,
        callback=_remember,
        help=f"{text}.  [default: {_default_text(key, field)}]",
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
        callback=_remember,
        help="Any setting, e.g. gate.min_psnr=40; may be given again.  [default: none]",
    )(command)
    return click.option(
        "--config",
        "config_file",
        metavar="FILE",
        expose_value=False,
        callback=_remember,
        help="A YAML file of settings, or a packaged one's name.  [default: the packaged one of the model]",
    )(command)


def config_options(command: Decorated) -> Decorated:
    """Add `--model`, `--config` and `--set`, which every command that loads a model has."""
    model = setting("model.source", "--model", help="demo (embedded), cogvideox-2b, a local folder, or a hub id")
    return model(file_options(command))


def model_options(command: Decorated) -> Decorated:
    """Add how a model is loaded, or built with random weights."""
    command = click.option(
        "--tiny", is_flag=True, expose_value=False, callback=_remember_random,
        help="Build the model with random weights and a few layers: what runs on any machine.  [default: off]",
    )(command)  # fmt: skip
    command = click.option(
        "--random-weights", is_flag=True, expose_value=False, callback=_remember_random,
        help="Build the model with random weights at full size, without a download.  [default: off]",
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
    """Add which metrics are computed, and where a user's own ones are."""
    command = setting(
        "eval.metric_modules", "--metric-module", metavar="FILE", multiple=True,
        help="Python file or module with metrics of your own, which are always computed; may be given again",
    )(command)  # fmt: skip
    return setting("eval.metrics", "--metrics", help="Metrics to compute, by name, with commas between")(command)


def cache_options(command: Decorated) -> Decorated:
    """Add where the dense baselines are kept."""
    command = setting("cache.max_gb", "--cache-max-gb")(command)
    return setting("cache.dir", "--cache-dir")(command)


def engine_options(command: Decorated) -> Decorated:
    """Add where work is done, and by how many."""
    command = settings("engine.workers", "engine.gpus_per_worker", "engine.threads_per_worker", "engine.ray_address")(
        command
    )
    return setting("engine.name", "--engine")(command)


def tracking_options(command: Decorated) -> Decorated:
    """Add whether and where runs are recorded."""
    command = setting("tracking.experiment", "--experiment")(command)
    command = setting("tracking.uri", "--tracking-uri")(command)
    return setting("tracking.enabled", "--track/--no-track")(command)


def build_config(ctx: click.Context) -> Config:
    """Resolve the configuration of a command: its explicit options over `--set`, environment, file, defaults."""
    given: dict[str, Any] = dict(ctx.meta.get(_GIVEN, {}))
    config_file, sets = given.pop("config_file", None), given.pop("sets", ())
    return resolve(config_file, sets, None, given)


def _remember(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    """Keep an option that was explicitly given, by its setting's key or its own name."""
    assert param.name is not None
    if ctx.get_parameter_source(param.name) is ParameterSource.COMMANDLINE:
        key = param.key if isinstance(param, SettingOption) else param.name
        ctx.meta.setdefault(_GIVEN, {})[key] = value


def _remember_random(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Keep the size that was asked for; `--tiny` decides, given together with `--random-weights` or alone."""
    given = ctx.meta.setdefault(_GIVEN, {})
    if value and param.name == "tiny":
        given["model.random_weights"] = "tiny"
    elif value:
        given.setdefault("model.random_weights", "full")


def _click_type(annotation: Any) -> Any:
    """Translate a field's annotation; ranges are left to the configuration, which names the setting."""
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is Literal:
        return click.Choice(get_args(annotation))
    if annotation is Path:
        return click.Path(path_type=Path)
    return annotation if annotation in (int, float, str) else str


def _default_text(key: str, field: FieldInfo) -> str:
    """Tell a setting's default, and the demo model's own value where it has one."""
    text = _value_text(field.get_default(call_default_factory=True))
    demo = _demo_settings().get(key)
    own = _value_text(demo) if demo is not None else text
    return text if own == text else f"{text}; {own} for demo"


def _value_text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ",".join(value) or "none"
    path = Path(str(value))
    folder = configs_folder()
    return f"configs/{path.relative_to(folder)}" if path.is_absolute() and path.is_relative_to(folder) else str(value)


@functools.cache
def _demo_settings() -> dict[str, Any]:
    return read_config(find_config("demo"))
