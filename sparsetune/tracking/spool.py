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
from sparsetune.files import atomic_path, write_json, write_text
from sparsetune.locks import exclusive_if_free
from sparsetune.tracking.operations import Operation
from sparsetune.tracking.store import first_line

SPOOL = "spool"
"""The folder of all sessions, in `tracking.root`."""

DAMAGED = "damaged"
"""The folder, in the spool, of what was set aside because it can't be read."""

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
    """Read the sessions of a spool, the oldest first; those whose description can't be read are left out.

    Raises:
        TrackingError: the disk fails.
    """
    return [session for path in sorted(spool.glob(f"*/{_STORE}")) if isinstance(session := _read(path), Session)]


def set_damaged_aside(spool: Path) -> list[tuple[Path, str]]:
    """Move the sessions whose description can't be read to `spool/damaged`, unless a process holds them.

    Returns:
        The new folder of each, and what is wrong with it.

    Raises:
        TrackingError: the disk fails.
    """
    moved = []
    for path in sorted(spool.glob(f"*/{_STORE}")):
        problem = _read(path)
        if not isinstance(problem, str):
            continue
        with exclusive_if_free(path.parent / _LOCK) as free:
            if free:
                moved.append((_moved(path.parent, spool / DAMAGED / path.parent.name), problem))
    return moved


def set_aside(path: Path) -> Path:
    """Move an operation that can't be read to `spool/damaged`, with its files, and give its new place."""
    session = path.parent
    kept = session.parent / DAMAGED / f"{session.name}-{path.name}"
    if files_of(path).exists():
        _moved(files_of(path), kept.with_suffix(""))
    return _moved(path, kept)


def _moved(source: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        target = target.with_name(f"{target.stem}-{uuid.uuid4().hex[:8]}{target.suffix}")
    return source.rename(target)


def _read(path: Path) -> "Session | str | None":
    """Read a session by its description; what is wrong with that where something is, None where it is gone."""
    try:
        store = json.loads(path.read_text(encoding="utf-8"))
        return Session(path.parent, str(store["uri"]), str(store["experiment_id"]))
    except FileNotFoundError:
        return None  # another process sent the last of it just now
    except (ValueError, KeyError, TypeError) as error:
        return f"{_STORE} doesn't say which server it is for ({type(error).__name__}: {first_line(error)})"
    except OSError as error:
        raise TrackingError(f"{path} must be readable, but: {error}; mend the disk or its permissions") from error


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
