"""The message catalogues."""

import re
import string
from pathlib import Path

import pytest

import sparsetune.report
from sparsetune.report.words import LANGUAGES, words

PACKAGE = Path(sparsetune.report.__file__).parent


def fields(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def test_all_languages_say_the_same_things() -> None:
    english, chinese = (words(language).texts for language in LANGUAGES)
    assert list(english) == list(chinese)
    for key, text in english.items():
        assert fields(text) == fields(chinese[key]), key
        assert text.strip() and chinese[key].strip(), key


def test_chinese_is_chinese() -> None:
    same = {key for key, text in words("zh").texts.items() if not re.search(r"[\u4e00-\u9fff]", text)}
    assert same == {"table.psnr", "axis.psnr_frame", "js.psnr_axis"}


def test_every_text_that_is_asked_for_is_there_and_none_is_idle() -> None:
    code = "\n".join(path.read_text() for path in PACKAGE.rglob("*") if path.suffix in (".py", ".j2"))
    scripts = "\n".join(path.read_text() for path in PACKAGE.rglob("*.js"))
    keys = set(words("en").texts)
    asked = set(re.findall(r"""words\(\s*["']([a-z_.]+)["']""", code))
    asked |= {f"js.{name}" for name in re.findall(r"""translate\("([a-z_]+)\"""", scripts)}
    assert len(asked) > 80
    assert {key for key in asked if not key.endswith(".")} <= keys
    asked |= {key for key in keys if re.search(rf"""["']{re.escape(key)}["']""", code)}
    # The rest is put together from a group's name and that of a verdict, a column, an axis.
    groups = "verdict|phrase|condition|search|heat|axis|phase|stage|env|outcome|compare|side|table|ladder|js|gate"
    groups += "|metric|summary|yardstick|gain|review|pareto|history"
    assert [key for key in sorted(keys - asked) if not re.match(rf"({groups})\.", key)] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_text_without_its_values_is_a_bug(language: str) -> None:
    with pytest.raises(KeyError, match="model"):
        words(language)("page.title", other=1)  # type: ignore[arg-type]
