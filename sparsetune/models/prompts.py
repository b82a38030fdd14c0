"""Prompts and prompt files."""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparsetune.documents import DocumentError, read_json, read_text, read_yaml
from sparsetune.errors import PromptError


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
    """Read an image in RGB; PromptError where there is no such file, or it is no image."""
    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "it is no image"
        raise PromptError(f"cannot read the prompt's image {path}: {reason}") from error


@functools.lru_cache(maxsize=1024)
def image_digest(path: Path) -> str:
    """Return the SHA-256 of an image's pixels and size, in hexadecimal."""
    image = open_image(path)
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


def load_prompts(path: str | Path, limit: int | None = None) -> tuple[AnyPrompt, ...]:
    """Read a prompt file, UTF-8.

    A text file has one prompt a line; blank lines and lines that begin with `#` are skipped. A `.yaml`, `.yml`
    or `.jsonl` file has a list (JSONL: one a line) of texts and of mappings with `prompt`, and optionally `image` (a
    path, relative to the file), `seed` and `negative_prompt`. A text alone is returned as a plain `str`.

    Args:
        path: the file.
        limit: take only the first `limit` prompts, at least 1.

    Raises:
        PromptError: the file can't be read, holds no or invalid prompts or images, or `limit` is out of range.
    """
    file = Path(path).expanduser()
    try:
        text = read_text(file)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PromptError(f"cannot read the prompt file {file}: {reason}") from error
    prompts = _parse(file, text)
    if not prompts:
        raise PromptError(f"the prompt file {file} is empty; write one prompt a line")
    if limit is None:
        return prompts
    if not 1 <= limit <= len(prompts):
        raise PromptError(f"the number of prompts must be from 1 to the {len(prompts)} that {file} holds, got {limit}")
    return prompts[:limit]


def _parse(file: Path, text: str) -> tuple[AnyPrompt, ...]:
    if file.suffix in (".yaml", ".yml"):
        return tuple(_entry(file, number, entry) for number, entry in enumerate(_yaml(file, text), 1))
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if file.suffix == ".jsonl":
        parsed = [_json(file, number, line) for number, line in lines]
        return tuple(_entry(file, number, entry) for number, entry in enumerate(parsed, 1))
    return tuple(line for _, line in lines)


def _yaml(file: Path, text: str) -> list[Any]:
    try:
        content = read_yaml(text)
    except DocumentError as error:
        raise PromptError(f"{file} is {error}") from error
    if content is None:
        return []
    if not isinstance(content, list):
        raise PromptError(f"{file} must hold a list of prompts (`- ` before each), got a {type(content).__name__}")
    return content


def _json(file: Path, number: int, line: str) -> Any:
    try:
        return read_json(line)
    except DocumentError as error:
        raise PromptError(f"line {number} of {file} is {error}") from error


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prompt: str = Field(min_length=1)
    image: str | None = None
    seed: int | None = Field(default=None, ge=0, le=2**31)
    negative_prompt: str | None = None


def _entry(file: Path, number: int, entry: Any) -> AnyPrompt:
    try:
        parsed = _Entry.model_validate({"prompt": entry} if isinstance(entry, str) else entry)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "entry"
        raise PromptError(
            f"{file}: prompt {number}: {where}: {first['msg']}; write a text, or a mapping with prompt, image, seed "
            "and negative_prompt"
        ) from error
    image = None if parsed.image is None else file.absolute().parent / Path(parsed.image).expanduser()
    if image is not None:
        image_digest(image)  # fails before a model is loaded where it can't be read
    prompt = Prompt(parsed.prompt.strip(), image, parsed.seed, parsed.negative_prompt)
    return prompt.text if prompt == Prompt(prompt.text) else prompt
