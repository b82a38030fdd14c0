"""Whether output is coloured."""

import os
from collections.abc import Mapping


def colour_wanted(environ: Mapping[str, str] | None = None) -> bool | None:
    """Say whether colours are wanted whatever the output is; None leaves it to whether that is a terminal.

    `NO_COLOR` (https://no-color.org) and `TERM=dumb` take them away; `FORCE_COLOR` has them in files and pipes too.
    Empty values count as not set.
    """
    environ = os.environ if environ is None else environ
    if environ.get("NO_COLOR") or environ.get("TERM", "").lower() in ("dumb", "unknown"):
        return False
    return True if environ.get("FORCE_COLOR") else None
