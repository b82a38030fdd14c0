"""Tables that a tuning keeps: arrays of NumPy's in one .npz, with a JSON text `about` them."""

import json
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparsetune.errors import ThresholdError
from sparsetune.files import atomic_path

UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, EOFError, NotImplementedError, SyntaxError, tokenize.TokenError,
    zipfile.BadZipFile, zlib.error, ThresholdError,
)  # fmt: skip
"""What NumPy, zipfile and json raise on damaged files, and what our own types raise on their contents."""


def write_table(path: Path, schema_version: int, about: Mapping[str, Any], **arrays: Any) -> None:
    """Write arrays and what is to be said about them; whole or not at all."""
    text = json.dumps({"schema_version": schema_version, **about})
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays, about=np.array(text))


def read_table(path: Path, schema_version: int, *names: str) -> tuple[dict[str, Any], list[Any]]:
    """Read what `write_table` wrote: what is said about the arrays, and those of these names.

    Raises:
        UNREADABLE: the file is damaged, or has another `schema_version`.
    """
    with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
        about = json.loads(str(file["about"]))
        if about.pop("schema_version") != schema_version:
            raise ValueError("another version's schema")
        return about, [file[name] for name in names]
