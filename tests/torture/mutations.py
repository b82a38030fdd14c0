"""Random damage to files: of their bytes, and of the values in JSON and YAML."""

import json
import random
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, -1, 0, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", " ", "a" * 5000, "\ud800", "a\0b",
    "~nobody/x", "../../../etc/passwd", "\u2028", "2026-13-45", [], {}, [[]], [None], {"": None}, [10**400], "no",
)  # fmt: skip


def damaged_bytes(data: bytes, draw: random.Random) -> bytes:
    """Cut, flip, overwrite, insert, repeat or drop some bytes; sometimes leave nothing."""
    at = draw.randrange(len(data) + 1)
    length = draw.choice((1, 4, 64, 1024))
    noise = draw.choice((draw.randbytes(length), bytes(length), b"\xff" * length))
    kind = draw.randrange(8)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + noise + data[at:]
    if kind == 2:
        return data[:at] + noise + data[at + length :]
    if kind == 3:
        return data[:at] + data[at + length :]
    if kind == 4:
        return data[: at + length] + data[at:]
    if kind == 5:
        return draw.choice((b"", noise, data + noise))
    changed = bytearray(data)
    for _ in range(draw.choice((1, 2, 8)) if data else 0):
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def damaged_value(value: Any, draw: random.Random) -> Any:
    """Replace, drop or add one value somewhere in nested lists and mappings."""
    inside = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not inside or draw.random() < 0.2:
        return draw.choice(ODD)
    changed, key = value.copy(), draw.choice(inside)
    kind = draw.randrange(6)
    if kind == 0:
        del changed[key]
    elif kind == 1 and isinstance(changed, dict):
        changed[draw.choice(("", "a\0b", "\ud800", "schema_version", "x" * 300))] = draw.choice(ODD)
    else:
        changed[key] = damaged_value(changed[key], draw)
    return changed


def damaged_metadata(data: bytes, draw: random.Random) -> bytes:
    """Damage the JSON that a safetensors file has as its only metadata."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = {
        name: damaged_json(text.encode(), draw).decode(errors="replace")
        for name, text in header["__metadata__"].items()
    }
    written = json.dumps(header).encode()
    return len(written).to_bytes(8, "little") + written + data[end:]


def damaged_json(data: bytes, draw: random.Random) -> bytes:
    """Damage a value of a JSON text, or its bytes; JSON is YAML too."""
    if draw.random() < 0.3:
        return damaged_bytes(data, draw)
    if draw.random() < 0.05:
        depth = draw.choice((100, 100_000))
        return b"[" * depth + b"]" * depth
    value = json.loads(data)
    for _ in range(draw.choice((1, 1, 3))):
        value = damaged_value(value, draw)
    return json.dumps(value).encode()
