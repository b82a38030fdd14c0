"""Prompts and prompt files."""

import csv
import functools
import hashlib
import io
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from sparsetune.documents import DocumentError, read_json, read_text, read_yaml
from sparsetune.errors import PromptError
from sparsetune.files import expand, similar_path

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """A text with optional image, seed and negative prompt. A plain `str` stands for a text alone.

    Args:
        text: the text.
        image: file of the image that the video starts from; None for text-to-video.
        seed: of the noise; None is the run's.
        negative_prompt: None is the configuration's.
    """

    text: str
    image: Path | None = None
    seed: int | None = None
    negative_prompt: str | None = None

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise PromptError("the prompt is empty; describe the video")
        for text in (self.text, self.negative_prompt or ""):
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise PromptError(f"a prompt holds half a surrogate pair, which is no character, got {text[:60]!a}")

    @property
    def identity(self) -> dict[str, Any]:
        """JSON values that identify the prompt; an image by its content, wherever the file is."""
        return {
            "prompt": self.text,
            "image": None if self.image is None else image_digest(self.image),
            "seed": self.seed,
            "negative_prompt": self.negative_prompt,
        }


AnyPrompt = str | Prompt


def as_prompt(prompt: AnyPrompt) -> Prompt:
    """Convert a plain text to a prompt."""
    return Prompt(prompt) if isinstance(prompt, str) else prompt


def texts(prompts: Sequence[AnyPrompt]) -> tuple[str, ...]:
    """Return the prompts' texts."""
    return tuple(as_prompt(prompt).text for prompt in prompts)


def open_image(path: Path) -> Image.Image:
    """Read an image in RGB, turned by its EXIF orientation as diffusers' `load_image` does.

    Of 16-bit grey the upper byte is taken. PromptError where there is no such file, or it is no image, or its grey has
    more bits, whose range is unknown.
    """
    try:
        with Image.open(path) as opened:
            upright, of_16_bits = ImageOps.exif_transpose(opened), opened.format == "PPM"
    except Exception as error:  # Pillow's decoders raise whatever damaged bytes lead them to
        reason = getattr(error, "strerror", None) or "it is no image, or a damaged one"
        raise PromptError(f"cannot read the prompt's image {path}: {reason}") from error
    if upright.mode.startswith("I;16") or (upright.mode == "I" and of_16_bits):  # `convert` would clip it to 255
        return Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8)).convert("RGB")
    if upright.mode in ("I", "F"):
        raise PromptError(f"the prompt's image {path} has 32 bits a channel; save it with 8 or 16")
    return upright.convert("RGB")


def image_digest(path: Path) -> str:
    """Return the SHA-256 of an image's pixels and size, in hexadecimal."""
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PromptError(f"cannot read the prompt's image {path}: {reason}") from error
    return _digest_of(path, (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))


@functools.lru_cache(maxsize=1024)
def _digest_of(path: Path, state: tuple[int, ...]) -> str:
    """`state` of the file makes an image that was written again another one."""
    image = open_image(path)
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


def load_prompts(path: str | Path, limit: int | None = None, further: int = 0) -> tuple[AnyPrompt, ...]:
    """Read a prompt file, UTF-8, in the format of its ending, in upper or lower case.

    - `.txt` or no ending: one prompt a line; blank lines and lines that begin with `#` are skipped.
    - `.yaml`, `.yml`, `.json`: a list of texts and of mappings with `prompt`, and optionally `image` (a path, relative
      to the file), `seed` and `negative_prompt`.
    - `.jsonl`, `.ndjson`: one such text or mapping a line.
    - `.csv`, `.tsv`: a table with these names in its first line.

    Where a mapping has VBench's `prompt_en` in place of `prompt`, fields that aren't listed here are left out, and
    the log says which. A text alone is returned as a plain `str`.

    Args:
        path: the file.
        limit: take only the first `limit` prompts, at least 1.
        further: beyond `limit`, take up to as many more as the file has.

    Raises:
        PromptError: the file can't be read, holds no or invalid prompts or images, or `limit` is out of range.
    """
    file = expand(path)
    try:
        text = read_text(file)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PromptError(f"cannot read the prompt file {file}: {reason}{similar_path(file)}") from error
    prompts = _parse(file, text)
    if not prompts:
        raise PromptError(f"the prompt file {file} is empty; write one prompt a line")
    if limit is None:
        return prompts
    if not 1 <= limit <= len(prompts):
        raise PromptError(f"the number of prompts must be from 1 to the {len(prompts)} that {file} holds, got {limit}")
    return prompts[: limit + further]


def _parse(file: Path, text: str) -> tuple[AnyPrompt, ...]:
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        known = ", ".join(ending for ending in _READERS if ending)
        raise PromptError(
            f"{file} ends in {file.suffix}, but a prompt file ends in one of {known}; rename or convert it"
        )
    entries = list(reader(file, text))
    named = {str(name) for entry in entries if _is_vbench(entry) for name in entry}
    if unused := sorted(named - {*_Entry.model_fields, "prompt_en"}):
        _LOG.warning("these fields of %s are not used: %s", file, ", ".join(unused))
    return tuple(_entry(file, number, entry) for number, entry in enumerate(entries, 1))


def _text_lines(file: Path, text: str) -> Iterator[str]:
    lines = [line.strip() for line in text.split("\n")]
    lines = [line for line in lines if line and not line.startswith("#")]
    if lines and any(_is_json(one) for one in (text, lines[0])):
        raise PromptError(f"{file} holds JSON rather than one prompt a line; let its name end in .json or .jsonl")
    yield from lines


def _is_json(text: str) -> bool:
    """Whether it is a list or mapping in JSON, or the first line of one that is indented."""
    if text.strip() in ("[", "{"):
        return True
    try:
        return isinstance(read_json(text), list | dict)
    except DocumentError:
        return False


def _yaml(file: Path, text: str) -> list[Any]:
    try:
        return _listed(file, read_yaml(text))
    except DocumentError as error:
        raise PromptError(f"{file} is {error}") from error


def _json(file: Path, text: str) -> list[Any]:
    try:
        return _listed(file, read_json(text) if text.strip() else None)
    except DocumentError as error:
        raise PromptError(f"{file} is {error}") from error


def _listed(file: Path, content: Any) -> list[Any]:
    if content is None:
        return []
    if not isinstance(content, list):
        raise PromptError(f"{file} must hold a list of prompts, got a {type(content).__name__}")
    return content


def _json_lines(file: Path, text: str) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), 1):  # `splitlines` would also split at U+2028 inside a string
        if line.strip() and not line.startswith("#"):
            try:
                yield read_json(line)
            except DocumentError as error:
                raise PromptError(f"line {number} of {file} is {error}") from error


def _table(file: Path, text: str, delimiter: str) -> Iterator[dict[str, Any]]:
    """Read the rows by the names in the first line; empty cells are left out, and blank lines skipped."""
    try:
        rows = list(csv.reader(io.StringIO(text), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise PromptError(f"{file} is not a valid table: {error}") from error
    names = [name.strip() for name in rows[0]] if rows else []
    if rows and not {"prompt", "prompt_en"} & set(names):
        raise PromptError(f"the first line of {file} must name its columns, `prompt` among them, got {names}")
    for row in filter(any, rows[1:]):
        if len(row) > len(names):
            raise PromptError(
                f"{file}: the row {row} has {len(row)} cells, but there are {len(names)} columns; quote a cell that "
                f"contains {delimiter!r}"
            )
        cells: dict[str, Any] = {name: cell for name, cell in zip(names, row, strict=False) if cell}
        if cells.get("seed", "").strip().isdecimal():
            cells["seed"] = int(cells["seed"])
        yield cells


_READERS: dict[str, Callable[[Path, str], Iterable[Any]]] = {
    "": _text_lines,
    ".txt": _text_lines,
    ".yaml": _yaml,
    ".yml": _yaml,
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": functools.partial(_table, delimiter=","),
    ".tsv": functools.partial(_table, delimiter="\t"),
}


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prompt: Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
    image: str | None = None
    seed: int | None = Field(default=None, ge=0, le=2**31)
    negative_prompt: str | None = None


def _is_vbench(entry: Any) -> bool:
    return isinstance(entry, dict) and "prompt_en" in entry and "prompt" not in entry


def _entry(file: Path, number: int, entry: Any) -> AnyPrompt:
    if _is_vbench(entry):
        entry = {"prompt": entry["prompt_en"]} | {name: entry[name] for name in _Entry.model_fields if name in entry}
    try:
        parsed = _Entry.model_validate({"prompt": entry} if isinstance(entry, str) else entry)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "entry"
        raise PromptError(
            f"{file}: prompt {number}: {where}: {first['msg']}; write a text, or a mapping with prompt, image, seed "
            "and negative_prompt"
        ) from error
    image = None if parsed.image is None else file.absolute().parent / expand(parsed.image)
    if image is not None:
        image_digest(image)  # fails before a model is loaded where it can't be read
    try:
        prompt = Prompt(parsed.prompt, image, parsed.seed, parsed.negative_prompt)
    except PromptError as error:
        raise PromptError(f"{file}: prompt {number}: {error}") from error
    return prompt.text if prompt == Prompt(prompt.text) else prompt
