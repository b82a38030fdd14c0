"""mkdocs hooks: generated reference tables, and files of the repository root as pages.

In a page, `<!-- generate: NAME -->` inserts a generated table and `<!-- include: FILE -->` a file of the root.
"""

import json
import logging
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from cli_reference import PAGES, overview, reference
from diagrams import with_pictures
from metrics_tables import metrics_table, score_tables
from mkdocs.structure.files import File, Files
from python_names import names_table
from root_files import as_page
from schema_tables import NAMES, schema_tables, schemas
from settings_table import settings_tables

_LOG = logging.getLogger("mkdocs.hooks.sparsetune")  # a warning fails a strict build
_ROOT = Path(__file__).resolve().parents[2]
_ROOT_FILES = {
    "CHANGELOG.md": "changelog.md",
    "CODE_OF_CONDUCT.md": "code-of-conduct.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
}
_DIRECTIVE = re.compile(r"^<!-- (?P<kind>generate|include): (?P<name>[\w ./-]+) -->$", re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Add the JSON Schemas and the examples that pages link to."""
    for name, schema in _schemas().items():
        text = json.dumps(schema, indent=2) + "\n"
        files.append(File.generated(config, f"schemas/{name}.schema.json", content=text))
    for example in sorted((_ROOT / "examples").rglob("*.*")):
        if "__pycache__" not in example.parts:
            name = example.relative_to(_ROOT).as_posix()
            files.append(File.generated(config, name, content=example.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Insert generated tables, included files and diagrams."""

    def insert(directive: re.Match[str]) -> str:
        if directive["kind"] == "include":
            return as_page(_ROOT / directive["name"], _ROOT_FILES, _LOG.warning)
        return _GENERATED[directive["name"]]()

    name = Path(page.file.src_uri).stem
    markdown = _DIRECTIVE.sub(insert, markdown.replace("](../examples/", "](examples/"))
    return with_pictures(markdown, name, _ROOT / "docs" / "images", _LOG.warning)


@cache
def _schemas() -> dict[str, dict[str, Any]]:
    return schemas()


def _commands(page: str | None = None) -> str:
    from sparsetune.cli.main import main

    return overview(main, "sparsetune") if page is None else reference(main, "sparsetune", page)


_GENERATED: dict[str, Callable[[], str]] = {
    "cli": _commands,
    **{page: lambda page=page: _commands(page) for page in PAGES},
    "metrics": metrics_table,
    "python names": lambda: names_table(_ROOT / "docs"),
    "score": score_tables,
    "settings": settings_tables,
    **{f"schema {name}": lambda name=name: schema_tables(_schemas()[name]) for name in NAMES},
}
