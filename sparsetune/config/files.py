"""Configuration files: paths of the packaged ones, and YAML to dotted keys."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsetune.documents import DocumentError, read_text, read_yaml
from sparsetune.errors import ConfigError, ModelError
from sparsetune.files import expand, similar_path

DEMO = "demo"
"""The source of the embedded model."""

# Keys whose relative paths in a file are relative to the file's folder
INPUT_PATHS = ("tune.prompt_file", "eval.prompt_file", "model.source")


def configs_folder() -> Path:
    """The packaged configurations: inside a wheel, or at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    shipped = package / "_configs"
    return shipped if shipped.is_dir() else package.parent / "configs"


def named_configs() -> dict[str, Path]:
    return {path.stem: path for path in sorted(configs_folder().glob("*.yaml"))}


def published_models() -> list[str]:
    """Return the names of packaged configurations of models on the hub: all but the demo model's."""
    return [name for name, path in named_configs().items() if read_config(path).get("model.source") != DEMO]


def find_config(config: str | Path) -> Path:
    """Return the file of a configuration given by its path or by a packaged one's name."""
    text, path, named = str(config), expand(config), named_configs()
    if text in named:
        return named[text]
    if path.is_file():
        return path
    hint = nearest(text, named)
    raise ConfigError(
        f"no configuration {text!r}; "
        + (f"did you mean {hint}?" if hint else f"use the path of a YAML file, or one of {', '.join(named)}")
    )


def read_config(path: Path) -> dict[str, Any]:
    """Read a YAML file of sections into a flat mapping of dotted keys, e.g. `generation.num_frames`."""
    try:
        content = read_yaml(read_text(path))
    except DocumentError as error:
        raise ConfigError(f"{path} is {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} must hold sections such as `model:`, got a {type(content).__name__}")
    flat = {key: value for key, value in flatten(content).items() if "." in key or value not in (None, {})}
    return {key: _from_file(path, key, value) for key, value in flat.items()}


def find_model(source: str) -> str:
    """Return a model's source: `demo`, an existing folder with `~` expanded, or what may be a hub id.

    ModelError, of usage, where it is none of these; the nearest packaged model is named.
    """
    folder = expand(source)
    if source == DEMO or (source.count("/") == 1 and not source.startswith((".", "~", "/"))) or folder.is_dir():
        return str(folder) if folder.is_dir() else source
    if "/" in source or source.startswith(("~", ".")):
        raise ModelError(f"there is no folder {folder}{similar_path(folder)}", is_usage=True)
    hint = nearest(source.lower(), named_configs())
    advice = f"did you mean {hint}?" if hint else "list them with `sparsetune models`"
    raise ModelError(f"unknown model {source}; {advice}", is_usage=True)


def nearest(word: str, known: Mapping[str, Any]) -> str | None:
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def _from_file(path: Path, key: str, value: Any) -> Any:
    if key not in INPUT_PATHS or not isinstance(value, str):
        return value
    if key == "model.source" and not value.startswith((".", "~")):
        return value  # a hub id, `demo`, or an absolute path
    return str(path.resolve().parent / expand(value))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted names, e.g. `model.source`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
