"""Parser for the code blocks of the documentation, with their markers and titles."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

COMMANDS = ("sh", "python")
"""Languages of blocks that the tests run."""

SHOWN = ("console", "json", "mermaid", "text", "yaml")
"""Languages of output, data and usage lines."""

_FENCE = re.compile(
    r'^(?P<indent> *)```(?:(?P<plain>\w*)| \{ \.(?P<classed>\w+)(?: \.\w+)*)(?: title="(?P<title>[^"]+)")?(?: \})?$'
)
_NOT_RUN = re.compile(r"<!-- not run: (?P<reason>\S.*) -->")
_UNTIL_STOPPED = "<!-- runs until Ctrl-C -->"
_SNIPPET = re.compile(r'--8<-- "(?P<file>[^":]+)"')


@dataclass(frozen=True)
class Block:
    """A fenced code block.

    Args:
        page: its file, relative to the checkout.
        line: line of its opening fence, from 1.
        language: as named in the fence.
        text: its lines, without the indentation of the fence.
        title: the file that it shows, if any.
        not_run: why the tests don't run it; None if they do.
        until_stopped: whether it runs until Ctrl-C.
    """

    page: str
    line: int
    language: str
    text: str
    title: str | None = None
    not_run: str | None = None
    until_stopped: bool = False

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_command(self) -> bool:
        """Whether the tests run it; a block with a title is a file."""
        return self.language in COMMANDS and self.title is None and self.not_run is None

    @property
    def shows(self) -> str | None:
        """The file of the checkout that it includes, if any."""
        found = _SNIPPET.fullmatch(self.text.strip())
        return None if found is None else found["file"]


def pages() -> list[str]:
    """Return the pages in reading order: later ones depend on earlier ones."""
    names = ("index", "install", "tutorial", "examples")
    first = ["README.md", "README.zh-CN.md", *(f"docs/{name}.md" for name in names)]
    rest = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
    return [*first, *(page for page in rest if page not in first), "CONTRIBUTING.md"]


def blocks_of(page: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page, in order."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        if fence is None:
            number += 1
            continue
        indent, end = fence["indent"], number + 1
        while lines[end] != f"{indent}```":
            end += 1
        text = "".join(f"{line.removeprefix(indent)}\n" for line in lines[number + 1 : end])
        before = lines[number - 1].strip() if number else ""
        reason = _NOT_RUN.fullmatch(before)
        yield Block(
            page, number + 1, fence["plain"] or fence["classed"] or "", text, fence["title"],
            None if reason is None else reason["reason"], before == _UNTIL_STOPPED,
        )  # fmt: skip
        number = end + 1


def all_blocks() -> list[Block]:
    """Return the blocks of all pages."""
    return [block for page in pages() for block in blocks_of(page)]
