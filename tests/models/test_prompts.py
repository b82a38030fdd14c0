from pathlib import Path

import pytest

from sparsetune.errors import PromptError
from sparsetune.models.prompts import load_prompts


def test_blank_lines_and_comments_are_skipped(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeff# animals\n\n a cat \nein Vögelchen\n", encoding="utf-8")
    assert load_prompts(file) == ("a cat", "ein Vögelchen")
    assert load_prompts(file, 1) == ("a cat",)


@pytest.mark.parametrize("limit", [0, -1, 3])
def test_too_many_or_no_prompts_say_how_many_there_are(tmp_path: Path, limit: int) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\na dog\n")
    with pytest.raises(PromptError, match=f"from 1 to the 2 that .* holds, but is {limit}"):
        load_prompts(file, limit)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# nothing\n")
    with pytest.raises(PromptError, match="must hold at least one prompt"):
        load_prompts(tmp_path / "prompts.txt")


def test_a_file_that_cant_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="No such file"):
        load_prompts(tmp_path / "none.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(PromptError, match="readable UTF-8 text"):
        load_prompts(tmp_path / "binary")
