"""Translations of a report's texts."""

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
    """A catalogue: texts by key, with {names} of values to fill in."""

    language: Language
    texts: dict[str, str]

    def __call__(self, key: str, **values: object) -> str:
        return self.texts[key].format(**values) if values else self.texts[key]

    def known(self, key: str, otherwise: str) -> str:
        """Return the text of a key that may be missing, a user's metric say."""
        return self.texts.get(key, otherwise)

    def of_scripts(self) -> dict[str, str]:
        """Texts of the page's scripts, without their prefix."""
        return {key.removeprefix("js."): text for key, text in self.texts.items() if key.startswith("js.")}


@cache
def words(language: Language) -> Words:
    return Words(language, json.loads((_FOLDER / f"{language}.json").read_text(encoding="utf-8")))
