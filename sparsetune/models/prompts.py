"""Prompt files."""

from pathlib import Path

from sparsetune.errors import PromptError


def load_prompts(path: str | Path, limit: int | None = None) -> tuple[str, ...]:
    """Read a prompt file: one prompt a line, UTF-8; blank lines and lines that begin with `#` are skipped.

    Args:
        path: the file.
        limit: take only the first `limit` prompts, at least 1.

    Raises:
        PromptError: the file can't be read or holds no prompt, or `limit` is less than 1 or more than it holds.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PromptError(f"the prompt file must be readable UTF-8 text, but {file} is not: {reason}") from error
    lines = (line.strip() for line in text.splitlines())
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    if not prompts:
        raise PromptError(f"the prompt file must hold at least one prompt, but {file} holds none; write one a line")
    if limit is None:
        return prompts
    if not 1 <= limit <= len(prompts):
        raise PromptError(
            f"the number of prompts must be from 1 to the {len(prompts)} that {file} holds, but is {limit}; "
            "choose fewer or another file"
        )
    return prompts[:limit]
