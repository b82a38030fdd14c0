"""The folder that a winner goes to, written by one process at a time and not by two in turn."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from sparsetune.checkpoint import load_checkpoint
from sparsetune.errors import CheckpointError
from sparsetune.locks import exclusive_if_free

CHECKPOINT = "checkpoint"
"""Folder of the winner's checkpoint in the output folder."""

EVALUATION = "evaluation"
"""Folder of its evaluation there."""

_LOCK = ".winner.lock"


class WinnersFolder:
    """Tells whether this process is to save and judge a winner, or another one of the same study does or did.

    To be made when the search begins: a winner that was judged before that is judged again, as a user expects of a
    command that is given again; one that was judged since then was judged by another process of this search.

    Args:
        folder: the output folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._before = self._stamp()

    @contextlib.contextmanager
    def take(self, study_name: str, trial: int) -> Iterator[bool]:
        """Keep the folder while the block runs, and give whether it is this process's turn to judge a trial.

        Raises:
            CacheError: the folder can't be written to.
        """
        with exclusive_if_free(self._folder / _LOCK, setting="--output-dir") as free:
            yield free and not (self._stamp() != self._before and self._holds(study_name, trial))

    def _holds(self, study_name: str, trial: int) -> bool:
        try:
            settings = load_checkpoint(self._folder / CHECKPOINT).manifest.tuner_settings
        except CheckpointError:
            return False
        return (settings.get("study_name"), settings.get("trial")) == (study_name, trial)

    def _stamp(self) -> frozenset[tuple[str, int, int]]:
        """Give what changes when an evaluation ends: its result is the last file to be written."""
        found = ((path.name, path.stat()) for path in (self._folder / EVALUATION).glob("*.json"))
        return frozenset((name, status.st_mtime_ns, status.st_ino) for name, status in found)
