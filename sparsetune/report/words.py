"""The words of a report in one language."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, Literal, get_args

Language = Literal["en", "zh"]
LANGUAGES: Final[tuple[Language, ...]] = get_args(Language)
_FOLDER = Path(__file__).parent / "catalogues"


@dataclass(frozen=True)
class Words:
    """A catalogue: texts by key, with {names} for what is filled in."""

    language: Language
    texts: dict[str, str]

    def __call__(self, key: str, **values: object) -> str:
        """Give a text with its values filled in.

        Raises:
            KeyError: the catalogue or the values lack something: a bug of ours.
        """
        return self.texts[key].format(**values) if values else self.texts[key]

    def known(self, key: str, otherwise: str) -> str:
        """Give the text of a key that a user's own thing, a metric say, may not have."""
        return self.texts.get(key, otherwise)

    def of_scripts(self) -> dict[str, str]:
        """Give the texts that the page's scripts show, without their prefix."""
        return {key.removeprefix("js."): text for key, text in self.texts.items() if key.startswith("js.")}


@cache
def words(language: Language) -> Words:
    """Read a language's catalogue."""
    return Words(language, json.loads((_FOLDER / f"{language}.json").read_text(encoding="utf-8")))
