"""MLflow's own UI, opened on recorded runs in a real browser."""

import json
from urllib.parse import quote

import pytest
from selenium.webdriver.common.by import By

from tests.browser.conftest import Browser, Recorded

pytestmark = pytest.mark.browser


def test_the_runs_are_listed_with_the_columns_that_matter(browser: Browser, page: str) -> None:
    assert "?viewStateShareKey=sparsetune" in page
    browser.open(page)
    browser.wait_for("eval default", "eval tuned", "sparsity/overall", "psnr/mean", "psnr/min", "score", "verdict")
    assert "Source" not in browser.text()  # a column that MLflow shows by default
    browser.screenshot("runs")


def test_before_and_after_are_compared(browser: Browser, recorded: Recorded) -> None:
    runs = quote(json.dumps([recorded.before, recorded.after]))
    browser.open(f"#/compare-runs?runs={runs}&experiments={quote(json.dumps([recorded.experiment_id]))}")
    browser.wait_for("Comparing 2 Runs", "Run details", "eval default", "eval tuned", "Show diff only")
    find = browser.driver.find_element
    browser.driver.execute_script("arguments[0].click()", find(By.CSS_SELECTOR, "button[role='switch']"))
    browser.wait_for("policy.digest", "policy.keep_text", "use_tuned")
    assert "guidance_scale" not in browser.text()  # the same in both


def test_charts_show_before_and_after_beside_each_other(browser: Browser, page: str) -> None:
    browser.open(f"{page}&compareRunsMode=CHART")
    browser.wait_for("eval default", "eval tuned", "psnr/mean", "sparsity/overall")
    assert "frame_l1" not in browser.text()
    browser.screenshot("compare")


def test_a_side_by_side_video_plays(browser: Browser, recorded: Recorded) -> None:
    path = "videos/prompt_0_compare.mp4"
    browser.open(f"#/experiments/{recorded.experiment_id}/runs/{recorded.after}/artifacts/{path}")
    browser.wait(lambda: browser.driver.find_elements(By.TAG_NAME, "video"), "a video must be shown")
    (video,) = browser.driver.find_elements(By.TAG_NAME, "video")
    browser.driver.execute_script("arguments[0].muted = true; arguments[0].loop = true; arguments[0].play()", video)
    browser.wait(lambda: float(video.get_property("currentTime") or 0) > 0.3, "the video must play")
    assert video.get_property("error") is None
    browser.screenshot("video")


def test_a_model_version_shows_its_alias(browser: Browser, recorded: Recorded) -> None:
    browser.open(f"#/models/{recorded.model}/versions/1")
    browser.wait_for(recorded.model, "Version 1", "champion")
    browser.open(f"#/models/{recorded.model}")
    browser.wait_for(recorded.model, "champion")
    browser.screenshot("version")
