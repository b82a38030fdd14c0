"""JSON and YAML from anybody's files: size, depth and aliases are bounded before anything is built of them."""

import errno
import json
import stat
from pathlib import Path
from typing import Any

MAX_BYTES, MAX_YAML, MAX_NODES, MAX_DEPTH = 64 * 10**6, 4 * 10**6, 500_000, 64


class DocumentError(ValueError):
    """A text isn't valid, or is nested too deeply or too large; the message begins with `not valid YAML` or JSON."""


def read_text(path: Path, max_bytes: int = MAX_BYTES) -> str:
    """Read a UTF-8 file, without a byte order mark; OSError where it is no regular file (a FIFO would never end)."""
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "Is a directory", str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    if status.st_size > max_bytes:
        raise OSError(errno.EFBIG, f"it is larger than {max_bytes / 1e6:g} MB", str(path))
    return path.read_text(encoding="utf-8-sig")


def read_json(text: str) -> Any:
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():  # half a surrogate pair can be neither printed nor written
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"not valid JSON: {_reason(error)}") from error
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for one in level for inner in _inner(one)]
        if not level:
            return value
    raise DocumentError(f"not valid JSON: it is nested deeper than {MAX_DEPTH} levels")


def read_yaml(text: str) -> Any:
    import yaml

    try:
        try:
            return _load_yaml(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except yaml.YAMLError:
            if len(text) >= 100_000:
                raise
            return _load_yaml(text, yaml.SafeLoader)  # ten times slower, but it names the right line of an error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "not parsable"
        raise DocumentError(f"not valid YAML{where}: {reason}") from error
    except DocumentError:
        raise
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError, OverflowError) as error:
        raise DocumentError(f"not valid YAML: {_reason(error)}") from error  # e.g. the date 2026-13-45


def _load_yaml(text: str, loader: Any) -> Any:
    import yaml

    _check_yaml(text, loader)
    return yaml.load(text, Loader=loader)


def _check_yaml(text: str, loader: Any) -> None:
    """Raise DocumentError where a YAML text is too large, also with its aliases written out, or nested too deeply."""
    import yaml

    if len(text) > MAX_YAML:
        raise DocumentError(f"not valid YAML: it is larger than {MAX_YAML / 1e6:g} MB")
    sizes: dict[str, int] = {}  # nodes below an anchor, its aliases written out
    open_nodes: list[tuple[str | None, int]] = []  # (anchor, nodes before it)
    nodes = 0
    for event in yaml.parse(text, Loader=loader):
        nodes += 1
        if isinstance(event, yaml.AliasEvent):
            nodes += sizes.get(str(event.anchor), 0)
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, nodes))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = nodes - before
        if len(open_nodes) > MAX_DEPTH:
            raise DocumentError(f"not valid YAML: it is nested deeper than {MAX_DEPTH} levels")
        if nodes > MAX_NODES:
            raise DocumentError(f"not valid YAML: it has more than {MAX_NODES} values, its aliases written out")


def _inner(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _reason(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())[:200]
