"""A folder of operations that wait to be sent to a tracking server."""

import contextlib
import json
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from sparsetune.config import TrackingConfig
from sparsetune.errors import TrackingError
from sparsetune.evaluation.lock import exclusive_if_free
from sparsetune.files import atomic_path, write_json, write_text
from sparsetune.tracking.operations import Operation

SPOOL = "spool"
"""The folder of all sessions, in `tracking.root`."""

_STORE = "store.json"
_LOCK = ".lock"


@dataclass(frozen=True)
class Session:
    """What one process has to send to one experiment, in order.

    The folder holds a JSON file an operation, numbered, and a folder of the same number with its files.

    Args:
        folder: the session's.
        uri: the server's, without user and password.
        experiment_id: of all its runs.
    """

    folder: Path
    uri: str
    experiment_id: str

    def add(self, number: int, operation: Operation, source: Path | None = None) -> Path:
        """Keep an operation, whole or not at all, and give its file.

        Args:
            number: its place in the order.
            operation: what to send.
            source: a file, or a folder whose content is, to keep for it.

        Raises:
            SparsetuneError: the disk is full or not writable.
        """
        path = self.folder / f"{number:06d}.json"
        if source is not None:
            _copy(source, files_of(path))
        write_text(path, operation.model_dump_json())
        return path

    def pending(self) -> list[Path]:
        """Read which operations wait, in order."""
        return sorted(self.folder.glob("[0-9]*.json"))

    @contextlib.contextmanager
    def held(self) -> Iterator[bool]:
        """Keep other processes from sending it, and give whether it is ours to send."""
        with exclusive_if_free(self.folder / _LOCK) as free:
            yield free

    def remove_if_empty(self) -> bool:
        """Remove the folder where nothing waits in it, and give whether it did; to be called while it is held."""
        if self.pending():
            return False
        for left in self.folder.glob("[0-9]*"):  # files whose operation was sent, or never whole
            shutil.rmtree(left, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        return True


def spool_folder(config: TrackingConfig) -> Path:
    """Name the folder of all sessions."""
    return config.root.expanduser().absolute() / SPOOL


def new_session(spool: Path, uri: str, experiment_id: str) -> Session:
    """Make the folder of a session; sessions sort by the time when they were made.

    Raises:
        SparsetuneError: the disk is full or not writable.
    """
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
    folder = spool / f"{now}-{uuid.uuid4().hex[:8]}"
    write_json(folder / _STORE, {"uri": uri, "experiment_id": experiment_id})
    return Session(folder, uri, experiment_id)


def sessions(spool: Path) -> list[Session]:
    """Read the sessions of a spool, the oldest first.

    Raises:
        TrackingError: a session's description can't be read.
    """
    found = []
    for path in sorted(spool.glob(f"*/{_STORE}")):
        try:
            store = json.loads(path.read_text(encoding="utf-8"))
            found.append(Session(path.parent, store["uri"], store["experiment_id"]))
        except FileNotFoundError:
            continue  # another process sent the last of it just now
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrackingError(
                f"{path} must say which server the operations beside it are for, but: {error}; mend it or "
                f"delete {path.parent}"
            ) from error
    return found


def files_of(path: Path) -> Path:
    """Name the folder with the files of an operation."""
    return path.with_suffix("")


def forget(path: Path) -> None:
    """Remove an operation that was sent; its JSON goes first, so that no operation ever lacks its files."""
    path.unlink(missing_ok=True)
    shutil.rmtree(files_of(path), ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    source.stat()  # a source that is gone is no failing of the target's folder
    files = [path for path in source.rglob("*") if path.is_file()] if source.is_dir() else [source]
    base = source if source.is_dir() else source.parent
    for file in files:
        with atomic_path(target / file.relative_to(base)) as copy:
            shutil.copyfile(file, copy)
