"""README.md stays short and agrees with its Chinese translation."""

import re

from tests.docs.blocks import ROOT, blocks_of

ENGLISH, CHINESE = "README.md", "README.zh-CN.md"


def numbers(page: str) -> list[str]:
    """Return the numbers in a page's prose, without code blocks, links and digits in names."""
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"\]\([^)]*\)|<!--.*?-->|`[^`]*`|[A-Za-z][\w.-]*\d\w*", "", text)
    return re.findall(r"\d+(?:\.\d+)?", text)


def test_readme_is_no_longer_than_200_lines() -> None:
    assert len((ROOT / ENGLISH).read_text(encoding="utf-8").splitlines()) <= 200


def test_the_chinese_page_has_the_blocks_of_the_english_one() -> None:
    english = [block.text for block in blocks_of(ENGLISH)]
    chinese = [block.text for block in blocks_of(CHINESE)]
    assert chinese == [text for text in english if text in chinese]
    commands = [block.text for block in blocks_of(ENGLISH) if block.language in ("sh", "python")]
    assert [text for text in commands if text not in chinese] == [], "add each command of README.md"
    measured = [block.text for block in blocks_of(ENGLISH) if "trial " in block.text or "95%" in block.text]
    assert len(measured) == 2 and set(measured) <= set(chinese), "copy the output in README.md"


def test_the_chinese_page_has_no_number_that_the_english_one_lacks() -> None:
    english = numbers(ENGLISH)
    assert [number for number in numbers(CHINESE) if number not in english] == []


def test_both_show_the_same_pictures_and_link_each_other() -> None:
    pictures = [re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (ROOT / page).read_text("utf-8")) for page in (ENGLISH, CHINESE)]
    assert pictures[0] == pictures[1]
    assert f"]({CHINESE})" in (ROOT / ENGLISH).read_text("utf-8")
    assert f"]({ENGLISH})" in (ROOT / CHINESE).read_text("utf-8")
