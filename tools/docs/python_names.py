"""Table of the public names and the pages that describe them."""

import re
from pathlib import Path


def names_table(docs: Path) -> str:
    """Return a table of the pages `python-*.md` and the names that each describes, with links to them."""
    lines = ["| page | names |", "| --- | --- |"]
    for page in sorted(docs.glob("python-*.md")):
        text = page.read_text(encoding="utf-8")
        title = text.partition("\n")[0].removeprefix("# ")
        # The identifiers are those of the headings, which links to this page used before there were several.
        names = ", ".join(
            f"[`{path.rpartition('.')[2]}`]({page.name}#{path}){{ #{path} }}"
            for path in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)
        )
        lines.append(f"| [{title}]({page.name}) | {names} |")
    return "\n".join(lines)
