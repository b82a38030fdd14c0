"""The way of a session's operations to the server, in order."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from sparsetune.errors import CheckpointError
from sparsetune.tracking.operations import STAND_IN, Begin, Files, Model, Operation, Status, read_operation
from sparsetune.tracking.sending import delete_twins, find_runs, perform, refused
from sparsetune.tracking.spool import Session, files_of, forget, set_aside
from sparsetune.tracking.store import first_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

_LOG = logging.getLogger(__name__)


class DamagedError(Exception):
    """An operation on disk is not what was written there."""


class Delivery:
    """Sends operations of one session, and remembers which run stands behind which stand-in.

    What the server refuses (a run that was deleted, no permission) stays on disk, with whatever else concerns
    the same run, and holds no other run up.

    Args:
        session: what is sent; held by this process.
        client: of the server.
        repeated: whether another process may have sent some of it already.
    """

    def __init__(self, session: Session, client: "MlflowClient", *, repeated: bool) -> None:
        self.session = session
        self.ids: dict[str, str] = {}
        self.refusals: dict[str, str] = {}
        """Why the server refused, by run."""
        self.damaged: list[Path] = []
        """Operations that can't be read, where they were set aside."""
        self.num_sent = 0
        self._client = client
        self._repeated = repeated
        self._tried: set[Path] = set()
        self._doubtful: dict[str, str] = {}
        """Stand-in by run, of runs that had to be looked for: the server may yet get to another request for one."""

    def send(self, paths: Iterable[Path]) -> tuple[list[Path], str | None]:
        """Send operations in order until the server fails.

        Returns:
            Those that are to be tried again, from the first that failed on, and why; none and None where all
            were sent or refused.
        """
        waiting = list(paths)
        while waiting:
            path, run = waiting[0], ""
            try:
                operation = _readable(path)
                run = self.ids.get(operation.run, operation.run)
                if run not in self.refusals:
                    self._send(path, operation)
            except DamagedError as error:
                self._set_aside(path, error)
            except Exception as error:  # MLflow passes on whatever lies under it: requests', urllib3's, OS errors
                reason = first_line(error)
                if not refused(error):
                    return waiting, reason
                self.refusals[run] = reason
                _LOG.warning("the tracking server refused %s: %s; it waits, with all else of its run", path, reason)
            waiting.pop(0)
        return [], None

    def run_id(self, name: str) -> str | None:
        """Give the id of a run by its stand-in; None where it wasn't begun. An id is given back.

        Raises:
            Exception: whatever MLflow raises.
        """
        if not STAND_IN.fullmatch(name):
            return name
        if name not in self.ids:
            found = find_runs(self._client, self.session.experiment_id, name)
            if not found:
                return None
            self.ids[name] = found[0]
            self._doubtful[found[0]] = name
        return self.ids[name]

    def _set_aside(self, path: Path, error: DamagedError) -> None:
        kept = set_aside(path)
        self.damaged.append(kept)
        _LOG.warning("a write that waited is damaged (%s); it is set aside as %s, the rest is sent", error, kept)

    def _send(self, path: Path, raw: Operation) -> None:
        own = raw.run if isinstance(raw, Begin) else None
        text = path.read_text(encoding="utf-8")
        ids = {name: self.run_id(name) for name in sorted(set(STAND_IN.findall(text))) if name != own}
        operation = read_operation(text, {name: found for name, found in ids.items() if found is not None})
        repeated = self._repeated or path in self._tried
        self._tried.add(path)
        try:
            done = perform(self._client, operation, files_of(path), repeated=repeated)
        except CheckpointError as error:  # of the copy that was kept
            raise DamagedError(first_line(error)) from error
        if own is not None:
            self.ids[own] = done
            if repeated:
                self._doubtful[done] = own
        elif isinstance(operation, Status) and operation.end_ms is not None and done in self._doubtful:
            delete_twins(self._client, self.session.experiment_id, self._doubtful[done], done)
        forget(path)
        self.num_sent += 1


def _readable(path: Path) -> Operation:
    """Read an operation.

    Raises:
        DamagedError: it isn't what was written, or its files are gone.
    """
    try:
        operation = read_operation(path.read_text(encoding="utf-8"), {})
    except (ValidationError, UnicodeDecodeError) as error:
        raise DamagedError(f"{path.name}: {first_line(error)}") from error
    if isinstance(operation, Files | Model) and not files_of(path).is_dir():
        raise DamagedError(f"{path.name}: its files are gone")
    return operation
