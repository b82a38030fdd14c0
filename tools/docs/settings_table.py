"""Tables of all settings, from the configuration's pydantic models."""

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from sparsetune.config.files import configs_folder
from sparsetune.config.models import Config
from sparsetune.config.resolver import config_fields


def settings_tables() -> str:
    """Return a table for each section of the configuration, and one for settings without a section."""
    return "\n".join(_tables())


def _tables() -> Iterator[str]:
    sections: dict[str, dict[str, FieldInfo]] = {}
    for key, field in config_fields().items():
        sections.setdefault(key.rpartition(".")[0], {})[key] = field
    for section, fields in sections.items():
        model = Config.model_fields[section].annotation if section else None
        about = (model.__doc__ or "") if model is not None else "Settings without a section."
        yield from (f"## {section or 'other settings'}", "", about, "")
        yield from ("| setting | values | default | meaning |", "| --- | --- | --- | --- |")
        for key, field in fields.items():
            meaning = (field.description or "").replace("|", "\\|")
            yield f"| `{key}` | {_kind(field.annotation)} | {_default(field)} | {meaning} |"
        yield ""


def _kind(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(part) for part in get_args(annotation))
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if origin is tuple:
        return f"list of {_kind(get_args(annotation)[0])}"
    if annotation is type(None):
        return "null"
    if metadata := getattr(annotation, "__metadata__", None):
        return _kind(get_args(annotation)[0]) if metadata else ""
    names = {bool: "yes, no", int: "whole number", float: "number", str: "text"}
    return names.get(annotation, "path" if isinstance(annotation, type) and issubclass(annotation, Path) else "text")


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(f"`{one}`" for one in value) or "none"
    if isinstance(value, Path) and value.is_relative_to(configs_folder()):
        return f"`configs/{value.relative_to(configs_folder())}`"
    return f"`{value}`" if value != "" else "empty"
