"""Templates, scripts and styles of HTML pages."""

import json
from functools import cache
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent


@cache
def environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def style(*names: str) -> str:
    return "\n".join((_HERE / "templates" / f"{name}.css").read_text(encoding="utf-8") for name in names)


def script(*names: str) -> str:
    return "\n".join((_HERE / "scripts" / f"{name}.js").read_text(encoding="utf-8") for name in names)


def script_json(value: Any) -> str:
    """JSON that is safe in a script element: no text in it can end the element or open a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
