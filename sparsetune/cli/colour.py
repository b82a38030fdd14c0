"""Whether output is coloured."""

import os
from collections.abc import Mapping
from typing import Final

import click

_COLOURS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("met", "passed", "ok", "excellent", "good"), "green"),
    **dict.fromkeys(("missed", "acceptable", "note"), "yellow"),
    **dict.fromkeys(("not met", "failed", "fail", "rejected", "degraded"), "red"),
    **dict.fromkeys(("pruned",), "bright_black"),
}
"""By the word that says how something came out."""


def colour_wanted(environ: Mapping[str, str] | None = None) -> bool | None:
    """Say whether colours are wanted whatever the output is; None leaves it to whether that is a terminal.

    `NO_COLOR` (https://no-color.org) and `TERM=dumb` take them away; `FORCE_COLOR` has them in files and pipes too.
    Empty values count as not set.
    """
    environ = os.environ if environ is None else environ
    if environ.get("NO_COLOR") or environ.get("TERM", "").lower() in ("dumb", "unknown"):
        return False
    return True if environ.get("FORCE_COLOR") else None


def outcome(word: str, shown: str | None = None) -> str:
    """Colour a word that says how something came out, by what it says; `click.echo` takes the colour out of files.

    Args:
        word: one of those with a colour, in any case; another stays as it is.
        shown: what to show in its place.
    """
    colour = _COLOURS.get(word.strip().lower())
    shown = word if shown is None else shown
    return shown if colour is None else click.style(shown, fg=colour)
