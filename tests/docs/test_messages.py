"""Messages that the documentation quotes are ones that the program prints."""

import ast
import re

import pytest

from tests.docs.blocks import ROOT, blocks_of

LEAST_LITERAL = 20
"""A pattern with fewer letters of its own would fit anything."""

QUOTED = [
    line
    for block in blocks_of("docs/troubleshooting.md")
    if block.language == "text"
    for line in block.text.splitlines()
]


@pytest.fixture(scope="module")
def patterns() -> list[re.Pattern[str]]:
    """Make a pattern of every text in the source that may be quoted; its values may be anything."""
    found, page = [], "\n".join(QUOTED)
    for path in (ROOT / "sparsetune").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = _parts(node)
            if sum(map(len, parts)) >= LEAST_LITERAL and max(parts, key=len) in page:
                found.append(re.compile(".*?".join(map(re.escape, parts)), re.DOTALL))
    return found


def _parts(node: ast.AST) -> list[str]:
    """Take the fixed parts of a text: those around an f-string's values, or around %s."""
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
    assert any(pattern.match(message) for pattern in patterns), "the program has no text like it"
