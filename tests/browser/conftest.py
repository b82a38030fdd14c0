import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.common.by import By

from sparsetune.attention.policy import Policy
from sparsetune.attention.thresholds import HeadThresholds
from sparsetune.checkpoint import Checkpoint, Manifest, save_checkpoint
from sparsetune.cli.main import main
from sparsetune.config import Config, resolve
from sparsetune.evaluation.evaluate import evaluate_config
from sparsetune.tracking import TrackingListener, connect, resolve_store
from sparsetune.tracking.ui import page_of, running_ui
from tests.tracking.servers import free_port

WAIT_SECONDS = 60.0
SCREENSHOTS = os.environ.get("SCREENSHOTS")
"""Folder to write screenshots of the pages to, e.g. docs/images; none are written where it is empty."""


@dataclass(frozen=True)
class Recorded:
    """A store with an evaluation before and one after, and a registered version of the latter's checkpoint."""

    config: Config
    before: str
    after: str
    experiment_id: str
    model: str


class Browser:
    """MLflow's UI in Chromium."""

    def __init__(self, driver: WebDriver, link: str) -> None:
        self.driver = driver
        self.link = link

    def open(self, page: str) -> None:
        self.driver.get("about:blank")  # pages differ in their fragment alone, which loads nothing
        self.driver.get(self.link + page)
        # MLflow's assistant takes a quarter of the page until it is closed.
        find = self.driver.find_elements
        self.wait(lambda: find(By.TAG_NAME, "main") or find(By.TAG_NAME, "nav"), "the page must load")
        for close in find(By.CSS_SELECTOR, "button[aria-label='Close']"):
            self.driver.execute_script("arguments[0].click()", close)

    def text(self) -> str:
        return self.driver.find_element(By.TAG_NAME, "body").text

    def wait(self, condition: Callable[[], object], what: str) -> None:
        end = time.monotonic() + WAIT_SECONDS
        while not condition():
            if time.monotonic() > end:
                pytest.fail(f"{what} within {WAIT_SECONDS:g} s; the page says: {self.text()}")
            time.sleep(0.1)

    def wait_for(self, *words: str) -> None:
        for word in words:
            self.wait(lambda word=word: word in self.text(), f"{word!r} must be shown")  # type: ignore[misc]

    def screenshot(self, name: str) -> None:
        """Save a screenshot."""
        if not SCREENSHOTS:
            return
        time.sleep(2)  # charts draw
        image = Image.open(BytesIO(self.driver.get_screenshot_as_png())).convert("RGB")
        colours = image.quantize(96, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        colours.save(Path(SCREENSHOTS) / f"mlflow-{name}.png", optimize=True)


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Two short evaluations of the demo model: SpargeAttn's default thresholds, and a careful checkpoint."""
    folder = tmp_path_factory.mktemp("recorded")
    sets = {
        "tracking.root": str(folder / "mlruns"),
        "cache.dir": str(folder / "cache"),
        "eval.num_prompts": "2",
        "generation.num_inference_steps": "4",
    }
    return record(resolve("demo", (), {}, sets), folder)


def record(config: Config, folder: Path) -> Recorded:
    listener = TrackingListener(config)
    evaluate_config(config, None, folder / "before", [listener])
    before = listener.run_id
    layers = [(f"transformer.transformer_blocks.{index}.attn1", 3) for index in range(8)]
    policy = Policy.uniform(layers, HeadThresholds(-1.0, cdfthreshd=0.99), keep_text=True)
    checkpoint = save_checkpoint(Checkpoint(policy, Manifest(tuner="manual")), folder / "checkpoint")
    evaluate_config(config, checkpoint, folder / "after", [listener])
    after = listener.run_id
    assert before is not None and after is not None
    reason = "shown in the documentation"
    store = resolve_store(config.tracking)
    promoted = CliRunner().invoke(main, ["promote", after, "--override", reason, "--tracking-uri", store.uri])
    assert promoted.exit_code == 0, promoted.output
    run = connect(store).get_run(after)
    return Recorded(config, before, after, run.info.experiment_id, run.data.tags["promoted"].partition("/")[0])


@pytest.fixture(scope="session")
def chrome() -> Iterator[WebDriver]:
    """Headless Chromium."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        assert not os.environ.get("CI"), "CI must have Chromium and its driver"
        pytest.skip("Chromium or its driver isn't installed (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    switches = ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-background-networking")
    for switch in (*switches, "window-size=1500,1000", "autoplay-policy=no-user-gesture-required"):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = Service(driver)  # an explicit path, so that selenium doesn't search the network
    with webdriver.Chrome(options, service) as started:
        yield started


@pytest.fixture(scope="session")
def browser(chrome: WebDriver, recorded: Recorded) -> Iterator[Browser]:
    store = resolve_store(recorded.config.tracking)
    with running_ui(store.uri, port=free_port()) as (link, _):
        yield Browser(chrome, link)


@pytest.fixture(scope="session")
def page(browser: Browser, recorded: Recorded) -> str:
    return page_of(browser.link, recorded.config.tracking)
