"""Resolution of settings: explicit flag > `--set` > environment > file > default."""

import os
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from sparsetune.config.files import find_config, named_configs, nearest, read_config
from sparsetune.config.models import Config
from sparsetune.errors import ConfigError

ENVIRONMENT_PREFIX = "SPARSETUNE_"


class _Value(NamedTuple):
    """A value and its source, for messages."""

    value: Any
    source: str


_Layer = dict[str, _Value]


def resolve(
    config: str | Path | None = None,
    sets: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Config:
    """Build the configuration from all sources, the more explicit taking precedence.

    `config` overrides the model's packaged configuration: the one whose name `model.source` is or ends in
    (`cogvideox-2b`, `THUDM/CogVideoX-2b`, `/models/CogVideoX-2b`), and `demo` where no model is named.

    Args:
        config: a YAML file or the name of a packaged one.
        sets: `key=value` strings with dotted keys, e.g. `generation.num_frames=17`; the last of a key wins.
        environ: variables `SPARSETUNE_SECTION__KEY`, by default the process's; others are ignored.
        flags: values of explicitly given options, by dotted key.

    Raises:
        ConfigError: an unknown key (the nearest is named) or an invalid value.
    """
    explicit = {key: _Value(_from_text(key, value), "given as an option") for key, value in (flags or {}).items()}
    upper = _environment(os.environ if environ is None else environ) | _sets(sets) | explicit
    file = _file(find_config(config)) if config is not None else {}
    if "model.source" in upper:  # the file's name and revision are those of its own model
        file = {key: given for key, given in file.items() if key not in ("model.name", "model.revision")}
    given = _over(file, upper)
    return _validate(_random_weights(_over(_base(given), given), upper))


def _over(lower: _Layer, upper: _Layer) -> _Layer:
    """Lay one layer over another; a gate's preset replaces all bounds below it."""
    if "gate.preset" in upper:
        lower = {key: one for key, one in lower.items() if not key.startswith("gate.")}
    return lower | upper


def _base(given: _Layer) -> _Layer:
    """Read the model's packaged configuration, and replace a packaged model's name by its source."""
    source = given.get("model.source")
    if source is None:
        return _file(find_config("demo"))
    text = str(source.value)
    last = Path(text).name
    path = named_configs().get(last.lower())
    if path is None:
        return {"model.name": _Value(re.sub(r"[^A-Za-z0-9._-]+", "-", last).lstrip("-._"), source.source)}
    file = _file(path)
    if text == path.stem:
        del given["model.source"]
    elif text != file["model.source"].value:
        file.pop("model.revision", None)  # of another repository
    return file


def _random_weights(given: _Layer, upper: _Layer) -> _Layer:
    """Apply a file's section `tiny` to a tiny model, and give models with random weights a name of their own.

    `tiny` holds generation settings, `facts` notes on the model. A tiny model has dtype `auto`, to run on any machine.
    """
    tiny = {f"generation{key.removeprefix('tiny')}": value for key, value in given.items() if key.startswith("tiny.")}
    given = {key: value for key, value in given.items() if not key.startswith(("tiny.", "facts."))}
    size = given.get("model.random_weights")
    if size is None or size.value not in ("full", "tiny"):
        return given
    given = {key: value for key, value in given.items() if key != "model.lora" or key in upper}  # nothing is downloaded
    if size.value == "tiny":
        tiny["model.dtype"] = _Value("auto", size.source)
        given |= {key: value for key, value in tiny.items() if key not in upper}
    if "model.name" in given and "model.name" not in upper:
        name = given["model.name"]
        given["model.name"] = _Value(f"{name.value}-{'tiny' if size.value == 'tiny' else 'random'}", name.source)
    return given


def explicit_keys(sets: Sequence[str] = (), flags: Mapping[str, Any] | None = None) -> frozenset[str]:
    """Return the settings given by option, `--set` or environment, not by a file or a default."""
    return frozenset(_environment(os.environ) | _sets(sets) | dict.fromkeys(flags or {}))


def config_fields() -> dict[str, FieldInfo]:
    """Return every setting's field by its dotted key, e.g. `gate.min_psnr`."""
    found: dict[str, FieldInfo] = {}
    for name, field in Config.model_fields.items():
        section: dict[str, FieldInfo] = getattr(field.annotation, "model_fields", {})
        found |= {f"{name}.{key}": inner for key, inner in section.items()} or {name: field}
    return found


def _file(path: Path) -> _Layer:
    return {key: _Value(value, f"in {path}") for key, value in read_config(path).items()}


def _environment(environ: Mapping[str, str]) -> _Layer:
    layer = {}
    for variable, value in environ.items():
        if variable.startswith(ENVIRONMENT_PREFIX):
            key = variable.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
            layer[key] = _Value(_from_text(key, value), f"in the environment as {variable}")
    return layer


def _sets(sets: Iterable[str]) -> _Layer:
    layer = {}
    for text in sets:
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"--set must be KEY=VALUE, e.g. generation.num_frames=17, got {text!r}")
        layer[key.strip()] = _Value(_from_text(key.strip(), value.strip()), "given with --set")
    return layer


def _from_text(key: str, text: Any) -> Any:
    """Convert a text for its field: `null` to None where that is allowed, commas to a tuple.

    pydantic converts all else by the field's type; YAML would make a number of a revision such as 1234567.
    """
    field = config_fields().get(key)
    if field is None or not isinstance(text, str):
        return text
    union = get_origin(field.annotation) in (Union, types.UnionType)
    if text == "null" and union and type(None) in get_args(field.annotation):
        return None
    if get_origin(field.annotation) is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return text


def _validate(given: _Layer) -> Config:
    fields = config_fields()
    content: dict[str, Any] = {}
    for key, entry in given.items():
        if key not in fields:
            hint = nearest(key, fields)
            advice = f"did you mean {hint}?" if hint else f"sections are {', '.join(Config.model_fields)}"
            raise ConfigError(f"unknown setting {key} ({entry.source}); {advice}")
        section, _, name = key.rpartition(".")
        target = content.setdefault(section, {}) if section else content
        target[name] = entry.value
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise _explain(error, given, fields) from error


def _explain(error: ValidationError, given: _Layer, fields: Mapping[str, FieldInfo]) -> ConfigError:
    first = error.errors()[0]
    if first["type"] == "value_error" and len(first["loc"]) < 2:  # of a validator over several settings
        return ConfigError(str(first["ctx"]["error"]))
    keys = [".".join(map(str, first["loc"][:depth])) for depth in (2, 1)]
    key = next((key for key in keys if key in fields), keys[0])
    source = f" ({given[key].source})" if key in given else ""
    message, starts_with_subject = re.subn(r"^\w+ should", "must", first["msg"])
    about = f"; {fields[key].description}".rstrip(".") if first["type"] == "string_pattern_mismatch" else ""
    return ConfigError(f"{key}{'' if starts_with_subject else ':'} {message}, got {first['input']!r}{source}{about}")
