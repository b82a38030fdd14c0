"""Files of the repository root as pages of the site, with rewritten links."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

_LINK = re.compile(r"\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")


def as_page(file: Path, pages: Mapping[str, str], warn: Callable[[str], None]) -> str:
    """Read a Markdown file of the root and rewrite its links to pages of the site.

    Args:
        file: the file.
        pages: the page for each root file that has one, e.g. `CHANGELOG.md`: `changelog.md`.
        warn: called for each link without a page.
    """

    def rewritten(link: re.Match[str]) -> str:
        target, anchor = link["target"], link["anchor"] or ""
        if re.match(r"[a-z]+:", target):
            return link[0]
        page = pages.get(target, target.removeprefix("docs/") if target.startswith("docs/") else None)
        if page is None:
            warn(f"{file.name} links to {target}, which is not a page of the site")
            return link[0]
        return f"]({page}{anchor})"

    return _LINK.sub(rewritten, file.read_text(encoding="utf-8"))
