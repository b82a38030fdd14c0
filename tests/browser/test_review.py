"""A review in a real browser, from the command to what is stored."""

import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from queue import Queue

import pytest
from click.testing import Result
from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from sparsetune.tracking.review import read_reviews
from tests.report.synthetic import write_videos
from tests.tracking.recorded import Place, Recorded
from tests.tracking.review_client import reviewing

pytestmark = pytest.mark.browser

WAIT_SECONDS = 60.0
GREY = "return document.getElementById(arguments[0]).getContext('2d').getImageData(9, 9, 1, 1).data[1]"


class ReviewPage:
    """A running review, opened in Chromium."""

    def __init__(self, driver: WebDriver, running: "Future[Result]") -> None:
        self.driver, self.running = driver, running

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.find(selector).text

    def click(self, selector: str) -> None:
        self.find(selector).click()

    def choose(self, name: str, value: str) -> None:
        self.click(f"[name={name}][value={value}]")

    def wait_for(self, selector: str, text: str) -> None:
        end = time.monotonic() + WAIT_SECONDS
        while text not in self.text(selector):
            assert time.monotonic() < end, f"{selector} must have {text!r}, but has {self.text(selector)!r}"
            time.sleep(0.02)

    def sparse_letter(self) -> str:
        """The letter of the brighter video, which is the sparse one of `coded_frames`."""
        end = time.monotonic() + WAIT_SECONDS
        while (left := self.driver.execute_script(GREY, "pane-dense")) == 0:
            assert time.monotonic() < end, "the players must show a frame"
            time.sleep(0.02)
        return "a" if left > self.driver.execute_script(GREY, "pane-sparse") else "b"


@pytest.fixture
def recorded(place: Place, tmp_path: Path) -> Recorded:
    """A tuning with playable videos of three prompts, 17 frames of 64 × 64."""
    tuned = place.tuned(0.5, sparsity=0.6, videos=0, num_frames=17, height=64, width=64)
    for path in write_videos(tmp_path, 3).videos.values():
        place.client.log_artifact(tuned.evaluation, str(path), "videos")
    return tuned


@pytest.fixture
def page(chrome: WebDriver, recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> Iterator[ReviewPage]:
    addresses: Queue[str] = Queue()
    monkeypatch.setenv("DISPLAY", ":1")
    monkeypatch.setattr("click.launch", addresses.put)
    with reviewing(addresses, recorded.tuning, "--reviewer", "Ada") as (link, running):
        chrome.get_log("browser")  # left by earlier pages
        chrome.get(link)
        yield ReviewPage(chrome, running)
    assert [entry for entry in chrome.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_a_review_with_back_and_skip_stores_what_was_answered(
    page: ReviewPage, place: Place, recorded: Recorded
) -> None:
    page.wait_for("#progress", "Prompt 1 of 3")
    assert "dense" not in page.text("#panes") and page.text("#reveal") == ""
    sparse = page.sparse_letter()
    page.driver.switch_to.active_element.send_keys(Keys.ENTER)
    assert page.text("#missing") == "Choose an answer in every row, or skip this prompt."
    page.choose("preferred", sparse)
    page.choose("motion", sparse)
    page.click("#rest")
    page.click("#go")
    assert page.text("#reveal").startswith(f"{sparse.upper()} is the sparse video")
    assert f"{sparse.upper()} (sparse)" in page.text("#panes")
    assert not page.find("[name=preferred][value=none]").is_enabled()
    page.click("#go")

    page.wait_for("#progress", "Prompt 2 of 3")
    assert "dense" not in page.text("#panes")
    page.click("#skip")
    page.wait_for("#progress", "Prompt 3 of 3")
    third = page.sparse_letter()
    page.find("body").send_keys("n")  # by keys alone: no difference
    page.click("#rest")
    page.find("[name=colour][value=none]").send_keys(Keys.ENTER)
    page.wait_for("#reveal", f"{third.upper()} is the sparse video")
    page.click("#back")
    page.wait_for("#progress", "Prompt 2 of 3")
    page.driver.refresh()  # what was answered is kept
    page.wait_for("#progress", "Prompt 1 of 3")
    page.choose("motion", "none")  # corrected after it was revealed
    page.click("#go")
    page.click("#skip")
    page.wait_for("#progress", "Prompt 3 of 3")
    page.click("#go")

    rows = [row.text for row in page.driver.find_elements(By.CSS_SELECTOR, "#rows tr")]
    assert [row.rsplit("number", 1)[-1] for row in rows] == [
        " 0 sparse nothing",
        " 1 skipped –",
        " 2 no difference nothing",
    ]
    assert page.text("#verdict-text").startswith("Incomplete: 1 of 3 prompts are skipped.")
    assert page.find("#reviewer").get_attribute("value") == "Ada"
    page.find("#note").send_keys("softer grass")
    page.click("#submit")
    page.wait_for("#stored", "The review is stored")

    assert page.running.result(timeout=WAIT_SECONDS).exit_code == 0
    (review,) = read_reviews(place.client, recorded.tuning).values()
    assert [one.preferred for one in review.videos] == ["sparse", "none"]
    assert review.skipped == ("videos/prompt_1_compare.mp4",)
    assert (review.verdict, review.reviewer, review.note) == ("incomplete", "Ada", "softer grass")


def test_what_the_sparse_video_is_worse_in_rejects_in_any_order(
    page: ReviewPage, place: Place, recorded: Recorded
) -> None:
    for number in (1, 2, 3):
        page.wait_for("#progress", f"Prompt {number} of 3")
        sparse = page.sparse_letter()
        page.choose("preferred", "none")
        page.choose("detail", sparse)
        page.choose("colour", "a" if sparse == "b" else "b")
        page.click("#rest")
        page.click("#go")
        page.click("#go")
    page.wait_for("#verdict-text", "Rejected: a sparse video is worse.")
    page.click("#submit")
    page.wait_for("#stored", "The review is stored")
    assert page.running.result(timeout=WAIT_SECONDS).exit_code == 0
    (review,) = read_reviews(place.client, recorded.evaluation).values()
    assert review.rejected == tuple(f"prompt_{index}_compare.mp4: detail" for index in range(3))


def test_a_phone_needs_no_sideways_scrolling(page: ReviewPage) -> None:
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    page.wait_for("#progress", "Prompt 1 of 3")
    assert page.driver.execute_script("return document.documentElement.scrollWidth") == 390
    for _ in range(2):
        page.click("#skip")
    page.choose("preferred", "a")
    page.click("#rest")
    page.click("#go")
    page.click("#go")
    assert page.driver.execute_script("return document.documentElement.scrollWidth") == 390
    page.click("#submit")
    page.wait_for("#stored", "The review is stored")
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
