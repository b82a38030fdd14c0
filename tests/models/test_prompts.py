from pathlib import Path

import pytest
from PIL import Image

from sparsetune.checkpoint import hash_prompts
from sparsetune.errors import PromptError
from sparsetune.models.prompts import Prompt, load_prompts


def test_blank_lines_and_comments_are_skipped(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeff# animals\n\n a cat \nein Vögelchen\n", encoding="utf-8")
    assert load_prompts(file) == ("a cat", "ein Vögelchen")
    assert load_prompts(file, 1) == ("a cat",)


@pytest.mark.parametrize("limit", [0, -1, 3])
def test_too_many_or_no_prompts_say_how_many_there_are(tmp_path: Path, limit: int) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\na dog\n")
    with pytest.raises(PromptError, match=f"from 1 to the 2 that .* holds, got {limit}"):
        load_prompts(file, limit)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# nothing\n")
    with pytest.raises(PromptError, match="is empty"):
        load_prompts(tmp_path / "prompts.txt")


def test_a_file_that_cant_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="No such file"):
        load_prompts(tmp_path / "none.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(PromptError, match=r"cannot read the prompt file .*utf-8"):
        load_prompts(tmp_path / "binary")


def entries(tmp_path: Path, name: str, text: str) -> tuple:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    (tmp_path / name).write_text(text)
    return load_prompts(tmp_path / name)


def test_yaml_and_jsonl_hold_images_seeds_and_negative_prompts(tmp_path: Path) -> None:
    wanted = ("a cat", Prompt("a dog", tmp_path / "red.png", 7, "blurred"), "a cow")
    text = "- a cat\n- {prompt: a dog, image: red.png, seed: 7, negative_prompt: blurred}\n- prompt: a cow\n"
    assert entries(tmp_path, "prompts.yaml", text) == wanted
    lines = '"a cat"\n\n{"prompt": "a dog", "image": "red.png", "seed": 7, "negative_prompt": "blurred"}\n"a cow"\n'
    assert entries(tmp_path, "prompts.jsonl", lines) == wanted


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "prompt: a cat", "must hold a list of prompts .* got a dict"),
        ("a.yaml", "- [", "is not valid YAML in line"),
        ("a.yaml", "- {prompt: a cat, sed: 3}", "prompt 1: sed: Extra inputs are not permitted"),
        ("a.yaml", "- {prompt: a cat, seed: -3}", "prompt 1: seed: Input should be greater than or equal to 0"),
        ("a.yaml", "- {prompt: a cat, image: none.png}", "cannot read the prompt's image .*none.png: No such file"),
        ("a.yaml", "- {prompt: a cat, image: a.yaml}", "a.yaml: it is no image"),
        ("a.yaml", "[]", "is empty"),
        ("a.jsonl", '"a cat"\n{', "line 2 of .* is not valid JSON"),
    ],
)
def test_entries_that_are_no_prompts_are_told(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        entries(tmp_path, name, text)


def test_the_hash_of_prompts_follows_the_image_not_its_place(tmp_path: Path) -> None:
    for folder, colour in (("a", "red"), ("b", "red"), ("c", "blue")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8), colour).save(tmp_path / folder / "image.png")
    hashes = [hash_prompts([Prompt("a cat", tmp_path / folder / "image.png")]) for folder in "abc"]
    assert hashes[0] == hashes[1] != hashes[2]
    assert hash_prompts(["a cat"]) not in hashes
