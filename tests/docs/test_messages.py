"""Messages quoted in the documentation exist in the source."""

import ast
import re

import pytest

from tests.docs.blocks import ROOT, blocks_of

MIN_LITERAL = 20
"""Patterns with fewer literal characters would match anything."""

QUOTED = [
    line
    for block in blocks_of("docs/troubleshooting.md")
    if block.language == "text"
    for line in block.text.splitlines()
]


@pytest.fixture(scope="module")
def patterns() -> list[re.Pattern[str]]:
    """Return a pattern for every text in the source that may be quoted, with wildcards for values."""
    found, page = [], "\n".join(QUOTED)
    for path in (ROOT / "sparsetune").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = _parts(node)
            if sum(map(len, parts)) >= MIN_LITERAL and max(parts, key=len) in page:
                found.append(re.compile(".*?".join(map(re.escape, parts)), re.DOTALL))
    return found


def _parts(node: ast.AST) -> list[str]:
    """Return the literal parts of a text, around the values of an f-string or around %s."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.split(r"%[sd]", node.value)
    if not isinstance(node, ast.JoinedStr):
        return []
    parts = [""]
    for value in node.values:
        if isinstance(value, ast.Constant):
            parts[-1] += str(value.value)
        else:
            parts.append("")
    return parts


def test_the_troubleshooting_page_quotes_messages() -> None:
    assert len(QUOTED) >= 10


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_quoted_message_is_the_program_s(quoted: str, patterns: list[re.Pattern[str]]) -> None:
    message = re.sub(r"^(sparsetune|warning): ", "", quoted)
    assert any(pattern.match(message) for pattern in patterns), "no such message in the source"
