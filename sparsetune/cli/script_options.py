"""Options of SpargeAttn-style scripts: accepted where a command has the same, else answered with what it has."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final

import click

Meaning = str
"""An option of ours that takes the same value, `` where the option has no effect, or what to use instead."""

SCRIPT_OPTIONS: Final[Mapping[str, Mapping[str, Meaning]]] = {
    "--use-spas-sage-attn": {
        "tune": "",
        "eval": "",
        "generate": "attention is sparse with --use-tuned or --checkpoint PATH",
    },
    "--tune": {"tune": "", "eval": "run `sparsetune tune` first", "generate": "run `sparsetune tune` first"},
    "--model-out-path": {
        "tune": "use --output-dir FOLDER; the checkpoint is FOLDER/checkpoint, and `sparsetune checkpoint convert` "
        "writes it as a .pt",
        "eval": "--checkpoint",
        "generate": "--checkpoint",
    },
    "--out-path": {"tune": "--output-dir", "eval": "--output-dir", "generate": "use --output FILE.mp4"},
    "--model-name": {"tune": "--model", "eval": "--model", "generate": "--model"},
    "--parallel-tune": {"eval": "it is an option of `sparsetune tune`"},
    "--use-tuned": {"tune": "it is an option of `sparsetune eval`", "compare": "it is an option of `sparsetune eval`"},
}
"""Meaning of each by command; underscores are accepted as in all options."""


def translated(command: str | None, args: Sequence[str], known: Collection[str]) -> Iterator[str]:
    """Replace options of scripts in a command's arguments, and underscores in the names of known options.

    Raises:
        click.UsageError: the command has another way; it is named.
    """
    for arg in args:
        name, separator, value = arg.partition("=")
        dashed = name.replace("_", "-")
        if not name.startswith("--") or (dashed not in known and dashed not in SCRIPT_OPTIONS):
            yield arg
            continue
        meaning = None if dashed in known else SCRIPT_OPTIONS[dashed].get(command or "")
        if meaning is None:
            yield (dashed if dashed in known else name) + separator + value
        elif meaning.startswith("--"):
            yield meaning + separator + value
        elif meaning:
            raise click.UsageError(f"{command} has no option {name}; {meaning}")
