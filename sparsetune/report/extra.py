"""What reports need beyond the package's own dependencies."""

from importlib.util import find_spec
from typing import Final

from sparsetune.errors import ReportError

NEEDED: Final = ("jinja2", "matplotlib", "plotly")
"""What the extra `report` installs."""


def check_extra() -> None:
    """Check that reports can be made here.

    Raises:
        ReportError: a package is missing.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ReportError(
            f"a report must have {', '.join(NEEDED)}, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not installed; run: pip install 'sparsetune[report]'"
        )
