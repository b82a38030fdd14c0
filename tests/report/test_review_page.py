"""The page of a review, as an HTML parser reads it."""

import json
import re

import pytest

from sparsetune.report.review_page import render_review
from sparsetune.report.words import LANGUAGES, Language, words
from sparsetune.video import panes
from tests.report.synthetic import HOSTILE, result_of
from tests.report.test_page import Page

ITEMS = ("content", "motion", "detail", "artifacts", "colour")


def page_of(language: Language = "en") -> Page:
    result = result_of(4)
    text = render_review(result, {0: "a", 2: "b"}, ITEMS, words(language), run_id="3f2a9c1b", reviewer=HOSTILE)
    return Page(text)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_part_is_there_once_and_nothing_is_loaded_from_elsewhere(language: Language) -> None:
    page = page_of(language)
    assert len(page.ids) == len(set(page.ids))
    assert {"stage", "answers", "summary", "stored", "reviewer", "note", "submit", "back", "skip"} <= set(page.ids)
    assert set(page.links) == {"#main"}
    asked = set(re.findall(r"""byId\(["'`]([\w-]+)["'`]\)""", page.scripts["script 1"]))
    assert asked - set(page.ids) <= {"report-data"}


def test_prompts_have_their_video_and_the_panes_of_a_and_b() -> None:
    first, second = json.loads(page_of().scripts["report-data"])["prompts"]
    dense, sparse = ([one.left, one.top, one.width, one.height] for one in panes(64, 64, 2))
    assert (first["href"], first["boxes"]) == ("0.mp4", [sparse, dense])
    assert (second["href"], second["boxes"]) == ("2.mp4", [dense, sparse])


def test_markup_in_prompts_and_names_is_text() -> None:
    page = page_of()
    assert set(page.scripts) == {"report-data", "script 1"}
    assert json.loads(page.scripts["report-data"])["prompts"][0]["prompt"] == HOSTILE


def test_nothing_that_is_shown_before_the_answers_tells_which_is_which() -> None:
    labels = [label for label in page_of().images if label != "difference ×4"]
    assert labels == ["A", "B", "A left of the line, B right of it"]
