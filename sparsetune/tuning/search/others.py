"""The processes that work on the same study, as listeners may ask of them."""

from collections.abc import Callable
from typing import Protocol


class Others(Protocol):
    """The processes that work on the same study, as listeners may ask of them."""

    def num_running(self) -> int:
        """Count the trials that other processes run, as far as is known."""

    def note(self, key: str, change: Callable[[str | None], str]) -> str:
        """Change what all processes of a study keep under a key, one at a time; gives what it is now.

        Args:
            key: a name.
            change: given what is kept (None where nothing is), gives what shall be.
        """


class Alone:
    """What a search that no other process can work on has for others."""

    def num_running(self) -> int:
        """None."""
        return 0

    def note(self, key: str, change: Callable[[str | None], str]) -> str:
        """Nothing was kept before."""
        return change(None)
