"""Mermaid diagrams as stored SVG files, so that the site needs neither scripts nor network access.

The source of a diagram is in the page; GitHub and GitLab render it there. Chromium renders it to
`docs/images/PAGE-NUMBER.svg` with a digest of the source; the build warns if the digest is out of date. After a change:

    npm pack mermaid@11 && tar xzf mermaid-11*.tgz package/dist/mermaid.min.js
    python -m tools.docs.diagrams package/dist/mermaid.min.js
"""

import hashlib
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"^```mermaid\n(?P<source>.*?)^```$", re.MULTILINE | re.DOTALL)
_TITLE = re.compile(r"accTitle:\s*(?P<title>.+)")
_PAGE = """<!doctype html><meta charset="utf-8"><script src="{mermaid}"></script><script>
async function draw(source) {{
    mermaid.initialize({{startOnLoad: false, theme: "neutral", htmlLabels: false, fontFamily: "sans-serif",
                        flowchart: {{htmlLabels: false, wrappingWidth: 420}}}});
    document.body.innerHTML = (await mermaid.render("diagram", source)).svg;
    for (const cluster of document.querySelectorAll(".cluster")) {{  // titles left: arrows cross the middle
        const box = cluster.querySelector("rect"), label = cluster.querySelector(".cluster-label");
        const [left, top] = ["x", "y"].map(name => Number(box.getAttribute(name)));
        const words = label.getBBox();
        label.setAttribute("transform", `translate(${{left + 8 - words.x}}, ${{top + 4 - words.y}})`);
    }}
    return new XMLSerializer().serializeToString(document.querySelector("svg"));
}}
</script><body></body>"""


def with_pictures(markdown: str, page: str, images: Path, warn: Callable[[str], None]) -> str:
    """Replace the source of each diagram by its stored SVG file.

    Args:
        markdown: the page's text.
        page: its name without suffix.
        images: folder of the SVG files; the page links to it as `images/`.
        warn: called for each file that is missing or out of date.
    """
    number = 0

    def picture(block: re.Match[str]) -> str:
        nonlocal number
        number += 1
        name, title = f"{page}-{number}.svg", _TITLE.search(block["source"])
        stored = images / name
        if not stored.is_file() or _digest(block["source"]) not in stored.read_text(encoding="utf-8"):
            warn(f"{stored} doesn't match the source in {page}.md; see tools/docs/diagrams.py")
        return f"![{title['title'].strip() if title else page}](images/{name}){{ .diagram }}"

    return _BLOCK.sub(picture, markdown)


def render_all(mermaid: Path) -> None:
    """Render all diagrams whose SVG file is missing or out of date."""
    for page in sorted((ROOT / "docs").glob("*.md")):
        for number, block in enumerate(_BLOCK.finditer(page.read_text(encoding="utf-8")), 1):
            target = ROOT / "docs" / "images" / f"{page.stem}-{number}.svg"
            digest = _digest(block["source"])
            if target.is_file() and digest in target.read_text(encoding="utf-8"):
                continue
            target.write_text(f"{_render(block['source'], mermaid)}<!-- {digest} -->\n", encoding="utf-8")
            print(target)


def _digest(source: str) -> str:
    return f"source {hashlib.sha256(source.encode()).hexdigest()[:16]}"


def _render(source: str, mermaid: Path) -> str:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for switch in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1400,1000"):
        options.add_argument(f"--{switch}")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "draw.html"
        page.write_text(_PAGE.format(mermaid=mermaid.resolve().as_uri()), encoding="utf-8")
        with webdriver.Chrome(options, Service("/usr/bin/chromedriver")) as chrome:
            chrome.get(page.as_uri())
            chrome.set_script_timeout(60)
            svg = chrome.execute_async_script(
                "const done = arguments[1]; draw(arguments[0]).then(done, error => done('failed: ' + error))", source
            )
    if not svg.startswith("<svg"):
        raise SystemExit(f"mermaid failed: {svg}")
    svg = re.sub(r' data-[a-z-]+="[^"]*"', "", svg)
    return re.sub(r"\d+\.\d\d+", lambda number: f"{float(number[0]):.1f}", svg)


if __name__ == "__main__":
    render_all(Path(sys.argv[1]))
