"""Reports, opened from disk in a real browser."""

import base64
import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image
from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from sparsetune.cli.main import main
from sparsetune.config import resolve
from sparsetune.report.build import LIMIT, build_report
from sparsetune.tuning import tune
from tests.report.synthetic import NUM_FRAMES, source_of

pytestmark = pytest.mark.browser

WAIT_SECONDS = 60.0
INTERACTIVE_SECONDS = 2.0
"""Time limit for a report of 50 prompts and 200 trials to respond, on two cores."""

IMAGES = Path(__file__).parents[2] / "docs" / "images"
WRITE_DOCS = os.environ.get("WRITE_DOCS") == "1"
"""Whether to regenerate docs/images/report-*.png."""

TALLEST = 2400
"""Height in pixels to which screenshots for the documentation are cropped."""

QUICK = {
    "tune.n_trials": "4", "tune.num_prompts": "1", "tune.calibration_steps": "2", "tune.probe_prompts": "0",
    "tune.caches": "none", "eval.num_prompts": "2", "eval.metrics": "ssim,psnr_frame_min",
    "generation.num_inference_steps": "4",
    "gate.min_psnr": "30", "gate.min_psnr_worst": "25", "tune.margin_db": "5",
}  # fmt: skip
"""A search of the demo model that takes some tens of seconds."""

PIXEL = """
const canvas = document.getElementById(arguments[0]);
return [...canvas.getContext("2d").getImageData(arguments[1] * canvas.width, canvas.height / 2, 1, 1).data];
"""


class ReportPage:
    """One report in Chromium."""

    def __init__(self, driver: WebDriver) -> None:
        self.driver = driver

    def open(self, path: Path, width: int = 1400, height: int = 1000) -> None:
        self.driver.get_log("browser")  # left by earlier pages
        self.resize(width, height)
        self.driver.get("about:blank")
        self.driver.get(path.as_uri())
        self.wait(lambda: self.run("return document.documentElement.dataset.ready") == "yes", "the page must start")

    def resize(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def wait(self, condition: Callable[[], object], what: str) -> None:
        end = time.monotonic() + WAIT_SECONDS
        while not condition():
            assert time.monotonic() < end, f"{what} within {WAIT_SECONDS:g} s; the console says {self.errors()}"
            time.sleep(0.02)

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def see_all_charts(self) -> None:
        for chart in self.all(".plot"):
            self.run("arguments[0].scrollIntoView({block: 'center'})", chart)
            self.wait(lambda chart=chart: chart.find_elements(By.CSS_SELECTOR, ".main-svg"), "a chart must be drawn")  # type: ignore[misc]

    def frame(self) -> int | None:
        """The frame that all canvases show; None if they differ or show none yet."""
        shown = set(self.run("return [...document.querySelectorAll('canvas')].map((c) => c.dataset.frame)"))
        return int(shown.pop()) if len(shown) == 1 and None not in shown else None

    def wait_for_frame(self, frame: int) -> None:
        self.wait(lambda: self.frame() == frame, f"frame {frame} must be shown, but {self.frame()} is")

    def grey(self, canvas: str, at: float = 0.25) -> int:
        """The grey of a canvas at a fraction of its width."""
        return int(self.run(PIXEL, f"pane-{canvas}", at)[1])

    def slide(self, selector: str, value: int) -> None:
        script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))"
        self.run(script, self.find(selector), value)

    def screenshot(self, name: str, width: int = 1400, selector: str | None = None) -> Image.Image:
        """Take a screenshot of the page or a part of it; with WRITE_DOCS, write it to the documentation's images."""
        height = self.run("return document.documentElement.scrollHeight")
        self.resize(width, height)
        time.sleep(1.5)  # charts take their new width
        taken = base64.b64decode(self.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"])
        image = Image.open(BytesIO(taken)).convert("RGB")
        if selector is not None:
            box = self.run("const b = arguments[0].getBoundingClientRect(); return [b.x, b.y, b.right, b.bottom]",
                           self.find(selector))  # fmt: skip
            image = image.crop(tuple(round(side) for side in box))
        if WRITE_DOCS:
            shown = image.crop((0, 0, image.width, min(image.height, TALLEST)))
            colours = shown.quantize(192, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
            colours.save(IMAGES / f"report-{name}.png", optimize=True)
        return image


@pytest.fixture
def report(chrome: WebDriver) -> Iterator[ReportPage]:
    page = ReportPage(chrome)
    yield page
    assert page.errors() == []
    chrome.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real tuning of the demo model, and its reports in both languages."""
    folder = tmp_path_factory.mktemp("tuned")
    places = {"tracking.root": str(folder / "mlruns"), "cache.dir": str(folder / "cache")}
    results = Path("results") / "demo"
    with contextlib.chdir(folder):  # the report contains the path of the checkpoint
        tune(resolve("demo", (), {}, QUICK | places), output_dir=results)
        for language in ("en", "zh"):
            done = CliRunner().invoke(main, ["report", str(results), "--lang", language])
            assert done.exit_code == 0, done.output
    return folder / results


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report whose videos encode the frame number as a grey level."""
    folder = tmp_path_factory.mktemp("coded")
    return build_report(source_of(folder), folder / "report.html").path


def test_a_real_report_draws_everything_without_an_error(report: ReportPage, tuned: Path) -> None:
    report.open(tuned / "report.html")
    report.see_all_charts()
    assert len(report.all(".plot .main-svg")) >= 9
    record = json.loads((tuned / "tuning.json").read_text())
    score = record["evaluation"]["overall_score"]
    assert f"({score}/100)" in report.find(".sentence").text
    assert report.find("#command").text.startswith("sparsetune tune --model demo")
    report.wait(lambda: report.frame() is not None, "the players must show a frame")
    worst = min(record["evaluation"]["detailed_results"], key=lambda row: row["psnr"])
    assert report.frame() == worst["worst_frame"]
    report.screenshot("tuning")
    report.screenshot("players", selector="#videos")
    report.screenshot("search", selector="#search")


def test_the_theme_can_be_chosen_and_is_kept(report: ReportPage, tuned: Path) -> None:
    report.open(tuned / "report.html")
    ground = "return getComputedStyle(document.body).backgroundColor"
    for wanted in ("light", "dark"):
        report.wait(lambda: report.find("#theme"), "the button must be there")
        while report.find("#theme").get_attribute("data-value") != wanted:
            report.find("#theme").click()
        assert report.run("return document.documentElement.dataset.theme") == wanted
    dark = report.run(ground)
    report.open(tuned / "report.html")
    assert (report.run(ground), report.find("#theme").text) == (dark, "Theme: dark")
    report.see_all_charts()
    assert report.screenshot("dark").resize((1, 1)).getpixel((0, 0)) < (60, 60, 60)
    report.find("#theme").click()
    assert report.find("#theme").text == "Theme: system"


def test_a_phone_needs_no_sideways_scrolling(report: ReportPage, tuned: Path) -> None:
    report.open(tuned / "report.html", width=390, height=844)
    report.see_all_charts()
    assert report.run("return document.documentElement.scrollWidth") == 390
    report.resize(390, 844)
    report.screenshot("phone", width=390)


def test_chinese_says_the_same_in_chinese(report: ReportPage, tuned: Path) -> None:
    report.open(tuned / "report.zh.html")
    report.see_all_charts()
    assert report.run("return document.documentElement.lang") == "zh-Hans"
    assert "部署门槛" in report.find(".sentence").text
    assert report.find("#play").get_attribute("aria-label") == "播放"


def test_print_draws_what_was_never_scrolled_to(report: ReportPage, tuned: Path) -> None:
    report.open(tuned / "report.html")
    printed = report.driver.execute_cdp_cmd("Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.7})
    assert base64.b64decode(printed["data"]).startswith(b"%PDF")
    assert all(chart.find_elements(By.CSS_SELECTOR, ".main-svg") for chart in report.all("[data-chart]"))
    assert report.run("return document.documentElement.dataset.theme") is None


def test_all_players_show_the_frame_that_the_slider_says(report: ReportPage, coded: Path) -> None:
    report.open(coded)
    report.wait(lambda: report.frame() is not None, "the players must show a frame")
    for frame in (0, 3, NUM_FRAMES - 1, 8, 7):
        report.slide("#frame", frame)
        report.wait_for_frame(frame)
        assert abs(report.grey("dense") - (10 + 12 * frame)) <= 3
        assert abs(report.grey("sparse") - (14 + 12 * frame)) <= 3
        assert abs(report.grey("difference") - 16) <= 8  # four times a difference of 4, each side encoded
        assert f"frame {frame} of {NUM_FRAMES - 1}" in report.find("#frame-label").text


def test_players_stay_in_step_while_they_play(report: ReportPage, coded: Path) -> None:
    report.open(coded)
    report.wait(lambda: report.frame() is not None, "the players must show a frame")
    report.slide("#frame", 0)
    report.wait_for_frame(0)
    report.find("#play").click()
    seen = set()
    end = time.monotonic() + 4.0
    while time.monotonic() < end:
        dense, sparse, shown_frame = report.run(
            "const grey = (name) => document.getElementById('pane-' + name).getContext('2d')"
            ".getImageData(9, 9, 1, 1).data[1];"
            "return [grey('dense'), grey('sparse'), Number(document.getElementById('frame').value)]"
        )
        frames = round((dense - 10) / 12), round((sparse - 14) / 12)
        assert frames[0] == frames[1] and abs(frames[0] - shown_frame) <= 1
        seen.add(frames[0])
    assert len(seen) > NUM_FRAMES // 2
    report.find("#play").click()
    shown = report.run("return Number(document.getElementById('frame').value)")
    report.wait_for_frame(shown)


def test_a_click_on_the_curve_jumps_to_its_frame(report: ReportPage, coded: Path) -> None:
    report.open(coded)
    report.run("document.getElementById('frames').scrollIntoView({block: 'center'})")
    report.wait(lambda: report.all("#frames .main-svg"), "the curve must be drawn")
    report.wait(lambda: report.frame() is not None, "the players must show a frame")
    worst = report.frame()
    target = 4 if worst != 4 else 5
    at = report.run(
        "const gd = document.getElementById('frames'), box = gd.getBoundingClientRect(), l = gd._fullLayout;"
        "return [l.xaxis._offset + l.xaxis.l2p(arguments[0]) - box.width / 2,"
        " l.yaxis._offset + l.yaxis.l2p(gd.data[0].y[arguments[0]]) - box.height / 2]",
        target,
    )
    ActionChains(report.driver).move_to_element_with_offset(report.find("#frames"), *map(round, at)).click().perform()
    report.wait_for_frame(target)
    report.find("#worst").click()
    assert worst is not None
    report.wait_for_frame(worst)


def test_the_wipe_shows_dense_left_of_its_line_and_sparse_right_of_it(report: ReportPage, coded: Path) -> None:
    report.open(coded)
    report.wait(lambda: report.frame() is not None, "the players must show a frame")
    report.slide("#frame", 5)
    report.wait_for_frame(5)
    report.find("#mode-wipe").click()
    assert not report.find("#panes").is_displayed()
    for value, sides in ((500, ("dense", "sparse")), (900, ("dense", "dense")), (100, ("sparse", "sparse"))):
        report.slide("#wipe-at", value)
        assert [report.grey("wipe", at) for at in (0.25, 0.75)] == [report.grey(side) for side in sides]
    report.find("#wipe-at").send_keys(Keys.END)
    assert report.grey("wipe", 0.97) == report.grey("dense", 0.97)


def test_the_keyboard_plays_steps_and_jumps(report: ReportPage, coded: Path) -> None:
    report.open(coded)
    report.wait(lambda: report.frame() is not None, "the players must show a frame")
    worst = report.frame()
    stage = report.find("#stage")
    for key, frame in ((Keys.HOME, 0), (Keys.ARROW_RIGHT, 1), (Keys.ARROW_RIGHT, 2), (Keys.ARROW_LEFT, 1),
                       (Keys.END, NUM_FRAMES - 1), (Keys.ARROW_RIGHT, NUM_FRAMES - 1), ("w", worst)):  # fmt: skip
        stage.send_keys(key)
        assert frame is not None
        report.wait_for_frame(frame)
    stage.send_keys(Keys.SPACE)
    report.wait(lambda: report.find("#play").get_attribute("aria-label") == "Pause", "space must play")
    stage.send_keys(Keys.SPACE)
    report.wait(lambda: report.find("#play").get_attribute("aria-label") == "Play", "space must pause")


def test_prompts_sort_by_any_column_and_open_their_videos(report: ReportPage, coded: Path) -> None:
    report.open(coded)

    def column(number: int) -> list[str]:
        return report.run("return [...document.querySelectorAll('#prompt-table tbody tr')].map("
                          "(row) => row.cells[arguments[0]].dataset.value)", number)  # type: ignore[no-any-return]  # fmt: skip

    heads = report.all("#prompt-table thead th")
    for number, head in enumerate(heads):
        for order, rising in (("ascending", True), ("descending", False)):
            head.find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
            assert head.get_attribute("aria-sort") == order
            known = [value for value in column(number) if value]
            if number != 1:
                assert [float(value) for value in known] == sorted(map(float, known), reverse=not rising)
            assert column(number)[: len(known)] == known  # what has no value stays last
    row = report.find("#prompt-table tr[data-key='1']")
    row.find_element(By.CSS_SELECTOR, ".choose").send_keys(Keys.ENTER)
    assert row.get_attribute("aria-selected") == "true"
    assert report.find("#prompt").get_attribute("value") == "after-1"


def test_a_point_of_the_front_opens_its_trial(report: ReportPage, coded: Path) -> None:
    report.open(coded)
    chart = report.find("[data-chart='pareto_front']")
    report.run("arguments[0].scrollIntoView({block: 'center'})", chart)
    report.wait(lambda: chart.find_elements(By.CSS_SELECTOR, ".main-svg"), "the front must be drawn")
    number, *at = report.run(
        "const gd = arguments[0], box = gd.getBoundingClientRect(), l = gd._fullLayout;"
        "const trace = gd.data.find((one) => one.customdata && one.meta === 'main');"
        "return [trace.customdata[0], l.xaxis._offset + l.xaxis.l2p(trace.x[0]) - box.width / 2,"
        " l.yaxis._offset + l.yaxis.l2p(trace.y[0]) - box.height / 2]",
        chart,
    )
    ActionChains(report.driver).move_to_element_with_offset(chart, *map(round, at)).click().perform()
    panel = report.find("#trial")
    report.wait(lambda: panel.get_attribute("data-number") == str(number), f"trial {number} must be opened")
    assert "hilbert" in panel.text
    report.find("#trial-list summary").send_keys(Keys.ENTER)
    other = report.find("#trial-table tbody tr:last-child .choose")
    other.send_keys(Keys.ENTER)
    assert panel.find_element(By.TAG_NAME, "h3").text == f"trial {other.text}"


def test_videos_beside_a_report_from_disk_play_too(report: ReportPage, coded: Path) -> None:
    path = build_report(source_of(coded.parent), coded.parent / "beside.html", videos="beside").path
    report.open(path)
    report.wait(lambda: report.frame() is not None, "the players must show a frame")
    report.slide("#frame", 6)
    report.wait_for_frame(6)


def test_fifty_prompts_and_two_hundred_trials_answer_at_once(
    report: ReportPage, tmp_path: Path, chrome: WebDriver
) -> None:
    written = build_report(source_of(tmp_path, 50, 200), tmp_path / "report.html")
    assert written.num_bytes < LIMIT
    probe = (
        "const watch = () => {"
        "  const painted = document.querySelector('canvas')?.dataset.frame !== undefined;"
        "  const drawn = document.querySelector('#frames .main-svg') !== null;"
        "  if (painted && drawn) window.interactive ??= performance.now();"
        "  else setTimeout(watch, 5);"
        "}; watch();"
    )
    sort = (
        "const begun = performance.now(); document.querySelectorAll('#prompt-table thead button')[3].click();"
        "return performance.now() - begun"
    )
    seconds, busy = [], []
    chrome.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    added = chrome.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": probe})
    try:
        while (
            len(seconds) < 4 and min(seconds, default=9.0) >= INTERACTIVE_SECONDS
        ):  # other load on the machine only increases it
            report.open(written.path, height=1800)
            report.wait(lambda: report.run("return window.interactive"), "the page must answer")
            seconds.append((report.run("return window.interactive") + report.run(sort)) / 1000.0)
            metrics = chrome.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
            busy.append(next(one["value"] for one in metrics if one["name"] == "TaskDuration"))
    finally:
        chrome.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)
        chrome.execute_cdp_cmd("Performance.disable", {})
    print(
        f"a report of {written.num_bytes / 1e6:.1f} MB is interactive after {min(seconds):.2f} s, "
        f"{min(busy):.2f} s of them its own work"
    )
    assert min(busy) < INTERACTIVE_SECONDS
    if os.getloadavg()[0] < 2 * (os.cpu_count() or 1):  # otherwise the time includes other load on the machine
        assert min(seconds) < INTERACTIVE_SECONDS
