"""Generator of sparsetune/cli/options.json: type, help and default of every setting, from the configuration's models.

Run `python -m tools.options_table` (or `make options`) after a change to sparsetune/config/models.py or
configs/demo.yaml; a test fails until then.
"""

import json
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from sparsetune.cli.options import OPTIONS_TABLE
from sparsetune.config.files import configs_folder, find_config, read_config
from sparsetune.config.resolver import config_fields


def options_json() -> str:
    """Return the content of options.json."""
    demo = read_config(find_config("demo"))
    table = {key: _entry(field, demo.get(key)) for key, field in config_fields().items()}
    return json.dumps(table, indent=1, ensure_ascii=False) + "\n"


def _entry(field: FieldInfo, demo: Any) -> dict[str, Any]:
    default = _value_text(field.get_default(call_default_factory=True))
    own = default if demo is None else _value_text(demo)
    return {
        "type": _type(field.annotation),
        "help": (field.description or "").rstrip("."),
        "default": default if own == default else f"{default}; {own} for demo",
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
