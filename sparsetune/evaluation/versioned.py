"""A JSON file whose `schema_version` says how to read it: read whole, or refused."""

import json
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ValidationError

from sparsetune.errors import ResultError

Model = TypeVar("Model", bound=BaseModel)


def read_versioned(path: Path, model: type[Model], version: int, kind: Literal["evaluation", "tuning"]) -> Model:
    """Read a file that sparsetune wrote.

    Args:
        path: the file.
        model: what it holds.
        version: the `schema_version` that this sparsetune knows.
        kind: what the file says of itself, for messages.

    Raises:
        ResultError: it can't be read, is something else, or a newer sparsetune wrote it.
    """
    article, command = {"evaluation": ("an", "sparsetune eval"), "tuning": ("a", "sparsetune tune")}[kind]
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ResultError(
            f"{path} must be the JSON of {article} {kind}, but: {reason}; run `{command}` anew"
        ) from error
    found = value.get("schema_version") if isinstance(value, dict) else None
    if found != version:
        newer = isinstance(found, int) and found > version
        raise ResultError(
            f"{path} must be {article} {kind} with schema_version {version}, but has {found}; "
            f"{'update sparsetune' if newer else f'run `{command}`'}"
        )
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ResultError(
            f"{path} must hold a whole {kind}, but {where}: {first['msg']}; run `{command}` anew"
        ) from error
