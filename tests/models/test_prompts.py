import os
from pathlib import Path

import numpy as np
import pytest
from diffusers.utils import load_image
from PIL import Image

from sparsetune.checkpoint import hash_prompts
from sparsetune.errors import PromptError
from sparsetune.models.prompts import Prompt, as_prompt, image_digest, load_prompts, open_image


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
        ("a.yaml", "prompt: a cat", "must hold a list of prompts, got a dict"),
        ("a.yaml", "- [", "is not valid YAML in line"),
        ("a.yaml", "- {prompt: a cat, sed: 3}", "prompt 1: sed: Extra inputs are not permitted"),
        ("a.yaml", "- {prompt: a cat, seed: -3}", "prompt 1: seed: Input should be greater than or equal to 0"),
        ("a.yaml", "- {prompt: a cat, image: none.png}", "cannot read the prompt's image .*none.png: No such file"),
        ("a.yaml", "- {prompt: a cat, image: a.yaml}", "a.yaml: it is no image, or a damaged one"),
        ("a.yaml", "[]", "is empty"),
        ("a.jsonl", '"a cat"\n{', "line 2 of .* is not valid JSON"),
        ("a.YAML", "prompt: a cat", "must hold a list of prompts, got a dict"),
        ("a.yaml", "- ' '", "prompt 1: prompt: String should have at least 1 character"),
        ("a.yaml", '- {prompt: a cat, negative_prompt: "\\ud800"}', "prompt 1: a prompt holds half a surrogate pair"),
        ("a.json", '{"prompts": ["a cat"]}', "must hold a list of prompts, got a dict"),
        ("a.json", "a cat", "a.json is not valid JSON"),
        ("a.json", "", "is empty"),
        ("a.json", '[{"prompt": "a cat", "dimension": "colour"}]', "prompt 1: dimension: Extra inputs"),
        ("a.json", "[7]", "prompt 1: entry: Input should be a valid dict"),
        ("a.csv", "a cat\na dog\n", r"must name its columns, `prompt` among them, got \['a cat'\]"),
        ("a.csv", "prompt;seed\na cat;3\n", "must name its columns"),
        ("a.csv", "prompt,seed\na cat, asleep,3\n", "has 3 cells, but there are 2 columns"),
        ("a.csv", "prompt,seed\na cat,x\n", "prompt 1: seed: Input should be a valid integer"),
        ("a.csv", 'prompt\n"a cat', "is not a valid table"),
        ("a.csv", "", "is empty"),
        ("a.md", "# prompts", r"ends in .md, but a prompt file ends in one of .txt, .yaml"),
        ("a.txt", '[\n  "a cat"\n]\n', "holds JSON rather than one prompt a line; let its name end in .json"),
        ("a.txt", '["a cat",\n"a dog"]', "holds JSON rather than one prompt a line"),
        ("a", '{"prompt": "a cat"}\n{"prompt": "a dog"}\n', "holds JSON rather than one prompt a line"),
    ],
)
def test_entries_that_are_no_prompts_are_told(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        entries(tmp_path, name, text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.YAML", "- a cat\n- {prompt: ' a dog ', seed: 7}\n"),
        ("a.json", '[\n  "a cat",\n  {"prompt": "a dog", "seed": 7}\n]'),
        ("a.JSONL", '"a cat"\r\n\r\n{"prompt": "a dog", "seed": 7}'),
        ("a.ndjson", '"a cat"\n{"prompt": "a dog", "seed": 7}\n'),
        ("a.csv", 'prompt,seed\n"a cat",\n\na dog,7\n'),
        ("a.tsv", "seed\tprompt\n\ta cat\n7\ta dog\n"),
    ],
)
def test_each_ending_is_read_in_its_format(tmp_path: Path, name: str, text: str) -> None:
    assert entries(tmp_path, name, text) == ("a cat", Prompt("a dog", seed=7))


def test_prompts_as_vbench_publishes_them_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    listed = (
        '[{"prompt_en": "a cat", "dimension": ["colour"], "auxiliary_info": {}}, {"prompt_en": "a dog", "seed": 7}]'
    )
    assert entries(tmp_path, "VBench_full_info.json", listed) == ("a cat", Prompt("a dog", seed=7))
    assert [record.getMessage() for record in caplog.records] == [
        f"these fields of {tmp_path / 'VBench_full_info.json'} are not used: auxiliary_info, dimension"
    ]


def test_only_newlines_end_a_line(tmp_path: Path) -> None:
    assert entries(tmp_path, "a.jsonl", '"a\u2028cat\x85"\n"a dog"') == ("a\u2028cat", "a dog")
    assert entries(tmp_path, "a.txt", "a\u2028cat\na\x0bdog") == ("a\u2028cat", "a\x0bdog")
    assert entries(tmp_path, "a.csv", 'prompt\n"a cat\nat night"\n') == ("a cat\nat night",)


def test_brackets_in_a_text_are_no_json(tmp_path: Path) -> None:
    lines = ("[close-up] a cat", "{a|the} dog", '"a cow"')
    assert entries(tmp_path, "a.txt", "\n".join(lines)) == lines


@pytest.mark.parametrize(("text", "message"), [(" \u3000", "prompt is empty"), ("a \udcff", "half a surrogate pair")])
def test_a_prompt_is_text(text: str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        as_prompt(text)


def test_the_hash_of_prompts_follows_the_image_not_its_place(tmp_path: Path) -> None:
    for folder, colour in (("a", "red"), ("b", "red"), ("c", "blue")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8), colour).save(tmp_path / folder / "image.png")
    hashes = [hash_prompts([Prompt("a cat", tmp_path / folder / "image.png")]) for folder in "abc"]
    assert hashes[0] == hashes[1] != hashes[2]
    assert hash_prompts(["a cat"]) not in hashes


def shades(height: int = 4, width: int = 6) -> np.ndarray:
    return np.arange(height * width, dtype=np.uint8).reshape(height, width) * 10


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_by_its_exif_orientation_as_in_diffusers(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(shades()).save(tmp_path / "a.png", exif=exif)
    turned = open_image(tmp_path / "a.png")
    assert turned.size == ((6, 4) if orientation < 5 else (4, 6))
    assert turned.mode == "RGB"
    assert np.array_equal(turned, load_image(str(tmp_path / "a.png")))


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_16_bit_grey_keeps_its_shades(tmp_path: Path, name: str) -> None:
    Image.fromarray(shades().astype(np.uint16) * 257).save(tmp_path / name)
    assert np.array_equal(np.asarray(open_image(tmp_path / name))[..., 0], shades())


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_grey_of_unknown_range_is_refused(tmp_path: Path, dtype: type) -> None:
    Image.fromarray(shades().astype(dtype)).save(tmp_path / "a.tif")
    with pytest.raises(PromptError, match="has 32 bits a channel; save it with 8 or 16"):
        open_image(tmp_path / "a.tif")


def test_an_image_that_is_written_again_is_another_one(tmp_path: Path) -> None:
    """Also one of the same size and modification time."""
    path = tmp_path / "a.bmp"
    Image.new("RGB", (8, 8), "red").save(path)
    before, status = image_digest(path), path.stat()
    Image.new("RGB", (8, 8), "blue").save(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert image_digest(path) != before
    assert Prompt("a cat", path).identity["image"] == image_digest(path)
