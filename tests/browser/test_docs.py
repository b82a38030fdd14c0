"""The documentation site, built and opened in a real browser without network access."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parents[2]
_LOADED = re.compile(
    r"<(?:script|img|iframe|video|source)[^>]+src=\"?(https?://[^\s\">]+)|<link[^>]+href=\"?(https?://[^\s\">]+)"
)


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def chrome(site: Path) -> Iterator[tuple[WebDriver, str]]:
    """A browser that resolves no name, and the address of the site."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("Chromium or its driver isn't installed (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    switches = ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1500,1000")
    for switch in (*switches, "host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(site)))
    Thread(target=server.serve_forever, daemon=True).start()
    with webdriver.Chrome(options, Service(driver)) as browser:
        yield browser, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    found = {
        page.name: [one or other for one, other in _LOADED.findall(page.read_text(encoding="utf-8"))]
        for page in site.rglob("*.html")
    }
    assert len(found) > 15
    assert {name: links for name, links in found.items() if links} == {}


def test_every_page_opens_without_an_error(chrome: tuple[WebDriver, str], site: Path) -> None:
    browser, link = chrome
    for page in sorted(site.glob("*.html")):
        if page.name == "404.html":  # its links are the root's, whatever was asked for
            continue
        browser.get(f"{link}/{page.name}")
        assert browser.find_element(By.TAG_NAME, "h1").text
        broken = "return [...document.images].filter(image => image.complete && !image.naturalWidth).length"
        assert browser.execute_script(broken) == 0, page.name
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == [], page.name


def test_the_diagram_is_drawn_and_the_generated_pages_are_full(chrome: tuple[WebDriver, str]) -> None:
    browser, link = chrome
    browser.get(f"{link}/architecture.html")
    diagram = browser.find_element(By.CSS_SELECTOR, "img.diagram")
    assert diagram.get_attribute("alt") and diagram.size["width"] > 400
    browser.get(f"{link}/cli-tune.html")
    assert "Search for the fastest thresholds" in browser.find_element(By.TAG_NAME, "article").text
    browser.get(f"{link}/python-sparsify.html")
    assert "handle.stats()" in browser.find_element(By.TAG_NAME, "article").text


def test_the_search_finds_a_setting(chrome: tuple[WebDriver, str]) -> None:
    browser, link = chrome
    browser.get(f"{link}/index.html")
    field = browser.find_element(By.CSS_SELECTOR, "input.md-search__input")
    field.click()
    field.send_keys("calibration_steps")
    WebDriverWait(browser, 30).until(lambda b: "Settings" in b.find_element(By.CSS_SELECTOR, ".md-search-result").text)
