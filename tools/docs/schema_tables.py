"""JSON Schemas of the file formats, and their tables."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

Schema = Mapping[str, Any]

NAMES = ("result", "tuning", "manifest", "break-even", "prompt")


def schemas() -> dict[str, dict[str, Any]]:
    """Return the JSON Schema of each file format, by name (`NAMES`)."""
    from sparsetune.attention.breakeven import BreakEvenTable
    from sparsetune.checkpoint.manifest import Manifest
    from sparsetune.evaluation.result import SCHEMA_PATH
    from sparsetune.models.prompts import _Entry
    from sparsetune.tuning.record import record_schema

    return {
        "result": json.loads(SCHEMA_PATH.read_text(encoding="utf-8")),
        "tuning": record_schema(),
        "manifest": Manifest.model_json_schema(),
        "break-even": BreakEvenTable.model_json_schema(),
        "prompt": _Entry.model_json_schema(),
    }


def schema_tables(schema: Schema) -> str:
    """Return a table of a schema's fields, and one for each definition that it refers to, in order of reference."""
    lines = list(_table(schema))
    for name in _definitions_in_order(schema):
        part = schema["$defs"][name]
        about = str(part.get("description", "")).partition("\n")[0]
        lines += [f"**{name}**" + (f": {about}" if about else ""), "", *_table(part)]
    return "\n".join(lines)


def _table(schema: Schema) -> Iterator[str]:
    yield from ("| field | type | meaning |", "| --- | --- | --- |")
    described = _arguments(str(schema.get("description", "")))
    for name, field in schema.get("properties", {}).items():
        meaning = str(field.get("description", described.get(name, ""))).replace("\n", " ").replace("|", "\\|")
        yield f"| `{name}` | {_type(field)} | {meaning} |"
    yield ""


def _arguments(docstring: str) -> dict[str, str]:
    """Return the description of each field from a docstring's Args; several fields may share one entry."""
    _, _, arguments = docstring.partition("Args:\n")
    entries = re.findall(r"^    (?P<names>[\w, ]+): (?P<meaning>.*(?:\n {5,}.*)*)", arguments, re.MULTILINE)
    return {name: " ".join(meaning.split()) for names, meaning in entries for name in names.split(", ")}


def _type(field: Schema) -> str:
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if "anyOf" in field:
        return " or ".join(_type(option) for option in field["anyOf"])
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    kind = str(field.get("type", "any"))
    if kind == "array" and isinstance(field.get("items"), Mapping):
        return f"array of {_type(field['items'])}"
    if kind == "object" and isinstance(field.get("additionalProperties"), Mapping):
        return f"object of {_type(field['additionalProperties'])}"
    return kind


def _definitions_in_order(schema: Schema) -> list[str]:
    """Return the names of all definitions, each after the first one that refers to it."""
    found: list[str] = []
    waiting = [schema]
    while waiting:
        for name in _references(waiting.pop(0)):
            if name not in found:
                found.append(name)
                waiting.append(schema["$defs"][name])
    return found


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key == "$ref":
                yield str(inner).rpartition("/")[2]
            elif key != "$defs":
                yield from _references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner)
