"""The page, as an HTML parser reads it."""

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sparsetune.errors import ReportError
from sparsetune.evaluation.result import save_result
from sparsetune.report import build
from sparsetune.report import build as extra
from sparsetune.report.build import build_report
from sparsetune.report.clips import find_clips
from sparsetune.report.html import script_json
from sparsetune.report.page import render
from sparsetune.report.source import Source, from_folder
from sparsetune.report.words import LANGUAGES, words
from sparsetune.tuning.record import ValidationSection, save_record
from tests.report.synthetic import HOSTILE, record_of, result_of, source_of


class Page(HTMLParser):
    """The parts of a parsed page that these tests need."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: dict[str, str] = {}
        self.ids: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.images: list[str] = []
        self._script: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.links += [str(value) for name, value in attrs if name in ("src", "href")]
        if found.get("id"):
            self.ids.append(str(found["id"]))
        if tag == "script":
            self._script = found.get("id") or f"script {len(self.scripts)}"
            self.scripts[self._script] = ""
        if found.get("role") == "img" or tag == "img":
            self.images.append(found.get("aria-label") or found.get("alt") or "")

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self.scripts[self._script] += data
        else:
            self.texts.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("source")


@pytest.fixture(scope="module")
def source(folder: Path) -> Source:
    return source_of(folder)


@pytest.fixture(params=LANGUAGES)
def page(request: pytest.FixtureRequest, source: Source) -> Iterator[Page]:
    yield Page(render(source, find_clips(source), words(request.param)))


def test_no_text_can_break_out_of_its_place(page: Page) -> None:
    data = json.loads(page.scripts["report-data"])
    assert data["prompts"][0]["prompt"] == HOSTILE
    assert HOSTILE in page.texts
    assert "49" not in page.texts
    names = [name for name in page.scripts if not name.startswith("clip-")]
    assert names == ["report-data", "script 1", "plotly-source"]


def test_nothing_is_asked_of_the_network(page: Page) -> None:
    assert page.links == ["#main"]


def test_every_picture_has_words_and_every_id_is_one_thing(page: Page) -> None:
    assert len(page.images) == 9 + 4 + 1
    assert all(len(text) > 1 for text in page.images)
    assert len(page.ids) == len(set(page.ids))


def test_both_languages_have_the_same_numbers(source: Source) -> None:
    english, chinese = (json.loads(Page(render(source, (), words(one))).scripts["report-data"]) for one in LANGUAGES)
    assert english["prompts"] == chinese["prompts"]
    assert english["trials"].keys() == chinese["trials"].keys()
    for number, trial in english["trials"].items():
        assert trial["params"] == chinese["trials"][number]["params"]


def test_json_in_a_script_survives_whatever_it_holds() -> None:
    text = script_json({"text": HOSTILE})
    assert "<" not in text and "\u2028" not in text
    assert json.loads(text) == {"text": HOSTILE}


def test_the_worst_prompt_comes_first_and_a_failed_one_before_it(source: Source) -> None:
    text = render(source, (), words("en"))
    rows = [
        int(part.partition('"')[0])
        for part in text.partition('id="prompt-table"')[2].partition("</table>")[0].split('<tr data-key="')[1:]
    ]
    assert source.evaluation is not None
    ranked = sorted((row.psnr or 0.0, row.index) for row in source.evaluation.detailed_results)
    assert rows == [index for _, index in ranked]


def test_videos_go_inside(source: Source, tmp_path: Path) -> None:
    report = build_report(source, tmp_path / "report.html")
    page = Page(report.path.read_text())
    assert [name for name in page.scripts if name.startswith("clip-")] == [
        f"clip-{side}-{index}" for side in ("after", "before") for index in range(3)
    ]
    assert report.num_bytes == report.path.stat().st_size
    assert (report.note, [path.name for path in tmp_path.iterdir()]) == ("", ["report.html"])


def test_videos_lie_beside_where_that_is_asked_for(source: Source, folder: Path, tmp_path: Path) -> None:
    build_report(source, tmp_path / "report.html", videos="beside")
    names = sorted(path.name for path in (tmp_path / "report_videos").iterdir())
    assert names == [f"{side}_prompt_{index}_compare.mp4" for side in ("after", "before") for index in range(3)]
    report = build_report(source, folder / "report.html", videos="beside")
    data = json.loads(Page(report.path.read_text()).scripts["report-data"])
    assert data["prompts"][0]["href"] == "evaluation/videos/prompt_0_compare.mp4"
    assert not (folder / "report_videos").exists()


def test_what_does_not_fit_is_left_out_or_lies_beside(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build_report(source, tmp_path / "report.html").num_bytes
    monkeypatch.setattr(build, "LIMIT", whole + 99_000)
    report = build_report(source, tmp_path / "report.html")
    assert "from before tuning are left out" in report.note
    assert report.note in report.path.read_text()
    monkeypatch.setattr(build, "LIMIT", whole - 200_000)
    report = build_report(source, tmp_path / "report.html")
    assert "in a folder beside this file" in report.note
    assert (tmp_path / "report_videos").is_dir()


def test_results_of_before_this_report_have_one_too(tmp_path: Path) -> None:
    value = result_of().to_dict()
    del value["thresholds"]
    for row in value["detailed_results"]:
        row.pop("psnr_per_frame", None)
        row.pop("ladder", None)
        row.pop("yardsticks", None)
    (tmp_path / "demo_accuracy_tuned.json").write_text(json.dumps(value))
    source = from_folder(tmp_path)
    page = Page(render(source, (), words("en")))
    assert json.loads(page.scripts["report-data"])["prompts"] == []
    assert "ladder" not in page.ids  # no section without its chart


def test_yardsticks_stand_beside_the_policy(tmp_path: Path) -> None:
    save_result(result_of(), tmp_path / "demo_accuracy_tuned.json")
    rows = {language: re.findall(r"<tr><th scope=\"row\">(.*?)</th><td class=\"number\">(.*?)</td>",
            render(from_folder(tmp_path), (), words(language)).partition('id="yardsticks"')[2])[:3]
            for language in LANGUAGES}  # fmt: skip
    assert [name for name, _ in rows["en"]] == ["the policy", "another dense kernel", "50 steps"]
    assert [name for name, _ in rows["zh"]] == ["本策略", "另一种稠密内核", "50 步"]
    assert [psnr for _, psnr in rows["en"]][1:] == ["27.00", "20.00"]


def test_a_search_without_a_winner_says_so(tmp_path: Path) -> None:
    record = record_of().model_copy(update={"best": None, "closest": 3})
    save_record(record, tmp_path / "tuning.json")
    text = render(from_folder(tmp_path), (), words("en"))
    assert "No winner: none of 12 trials met the gate to deploy; trial 3 came closest" in text


def test_the_search_tells_how_its_best_trials_did_on_the_validation_prompts(tmp_path: Path) -> None:
    first = ValidationSection(number=8, num_prompts=4, psnr=32.89, psnr_worst=29.2, feasible=False)
    failed = ValidationSection(number=3, num_prompts=4, psnr=None, psnr_worst=None, feasible=False)
    second = ValidationSection(number=2, num_prompts=4, psnr=40.29, psnr_worst=36.5, feasible=True)
    save_record(record_of().model_copy(update={"validations": (first, failed, second)}), tmp_path / "tuning.json")
    text = " ".join(render(from_folder(tmp_path), (), words("en")).split())
    found = "trial 8 misses the gate (32.9 dB), trial 3 misses the gate, trial 2 meets the gate (40.3 dB)."
    assert f"On the 4 validation prompts: {found}" in text


def test_without_videos_the_stills_are_shown(tmp_path: Path) -> None:
    still = tmp_path / "stills" / "prompt_1_frame_4.png"
    still.parent.mkdir()
    still.write_bytes(b"picture")
    (tmp_path / "demo_accuracy_tuned.json").write_text(json.dumps(result_of().to_dict()))
    page = Page(render(from_folder(tmp_path), (), words("en")))
    assert "data:image/png;base64,cGljdHVyZQ==" in page.links
    assert "Prompt 2, worst frame: dense, sparse, amplified difference" in page.images


def test_a_folder_with_nothing_to_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"no run or folder .*none; list runs"):
        from_folder(tmp_path / "none")
    with pytest.raises(ReportError, match=r"holds neither a tuning.json .*; pass their output folder"):
        from_folder(tmp_path)


def test_a_missing_extra_is_named_with_its_remedy(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extra, "find_spec", lambda name: None if name == "plotly" else object())
    with pytest.raises(ReportError, match=r"reports need plotly; run: pip install 'sparsetune\[report\]'"):
        build_report(source, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []
