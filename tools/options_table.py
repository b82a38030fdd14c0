"""Generator of sparsetune/cli/options.json: type, help and default of every setting, from the configuration's models.

Run `python -m tools.options_table` (or `make options`) after a change to sparsetune/config/models.py or
configs/demo.yaml; a test fails until then.
"""

import json
import types
from collections import Counter
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from sparsetune.cli.options import OPTIONS_TABLE
from sparsetune.config.files import configs_folder, find_config, named_configs, published_models, read_config
from sparsetune.config.resolver import config_fields
from sparsetune.metrics import names


def options_json() -> str:
    """Return the content of options.json."""
    demo = read_config(find_config("demo"))
    published = [read_config(find_config(name)) for name in published_models()]
    table = {key: _entry(key, field, demo, published) for key, field in config_fields().items()}
    table["model.source"]["names"] = list(named_configs())
    table["eval.metrics"]["names"] = list(names())
    return json.dumps(table, indent=1, ensure_ascii=False) + "\n"


_NAMING = ("model.name", "model.source", "model.revision")
"""Settings that every packaged configuration has its own of."""


def _entry(key: str, field: FieldInfo, demo: dict[str, Any], published: list[dict[str, Any]]) -> dict[str, Any]:
    default = field.get_default(call_default_factory=True)
    text = _value_text(default)
    own = _value_text(demo.get(key, default))
    exceptions = [f"{own} for demo"] if own != text else []
    if key not in _NAMING:
        others = Counter(_value_text(config.get(key, default)) for config in published)
        ((usual, count),) = others.most_common(1)
        if count < 0.75 * others.total():
            exceptions.append("its own for a packaged model")
        elif usual != text:
            exceptions.append(f"{usual} for {'most' if len(others) > 1 else 'all'} packaged models")
    return {
        "type": _type(field.annotation),
        "help": (field.description or "").rstrip("."),
        "default": "; ".join([text, ", ".join(exceptions)] if exceptions else [text]),
    }


def _type(annotation: Any) -> str | list[str]:
    """Return a list of choices or the name of a type; types that click can't parse are text for the resolver."""
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    names = {bool: "bool", int: "int", float: "float", Path: "path"}
    return names.get(annotation, "str")


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


if __name__ == "__main__":
    OPTIONS_TABLE.write_text(options_json(), encoding="utf-8")
