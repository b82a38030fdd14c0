"""The thread that sends a session while work goes on."""

import logging
import threading
import time
from collections import deque
from pathlib import Path

from sparsetune.errors import TrackingError
from sparsetune.tracking.delivery import Delivery
from sparsetune.tracking.operations import Operation
from sparsetune.tracking.store import Store, check_answers

_LOG = logging.getLogger(__name__)

RETRY_SECONDS = 15.0
"""How long a server that failed is left alone."""

IDLE_SECONDS = 5.0
"""After how long a silence the server is asked for a sign of life first: MLflow waits longer for one that hangs."""


class Sender:
    """Keeps operations on disk and has a thread deliver them.

    That the server is away, or back, is told when the next operation is put: by the thread that works, which
    may be drawing its progress.

    Args:
        delivery: of the session.
        store: the server.
    """

    def __init__(self, delivery: Delivery, store: Store) -> None:
        self.delivery = delivery
        self._store = store
        self._changed = threading.Condition()
        self._waiting: deque[Path] = deque()
        self._count = 0
        self._failure: str | None = None
        self._told = False
        self._hurry = False
        self._asked = float("-inf")
        self._thread = threading.Thread(target=self._deliver, name="sparsetune-tracking", daemon=True)
        self._thread.start()

    @property
    def reason(self) -> str:
        """Why operations are left."""
        return self._failure or next(iter(self.delivery.refusals.values()), "interrupted")

    def put(self, operation: Operation, source: Path | None = None) -> None:
        """Keep an operation, and have it sent.

        Args:
            operation: what to send.
            source: the file, or the folder of the files, that belong to it.

        Raises:
            SparsetuneError: the disk is full or not writable.
        """
        self._count += 1
        path = self.delivery.session.add(self._count, operation, source)
        with self._changed:
            self._waiting.append(path)
            self._changed.notify_all()
        self._tell()

    def wait(self) -> None:
        """Wait until all is sent, or the server has failed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting or self._failure is not None)

    def stop(self) -> None:
        """Try what waits once more, and send no more after that."""
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
        self._thread.join()
        self._tell()

    def drop(self) -> None:
        """Forget what waits."""
        with self._changed:
            self._waiting.clear()
        for path in self.delivery.session.pending():
            path.unlink()

    def _deliver(self) -> None:
        while self._next():
            quiet = self._failure is not None or time.monotonic() - self._asked > IDLE_SECONDS
            failure = self._silence() if quiet else None
            if failure is None:
                _, failure = self.delivery.send([self._waiting[0]])
                failure = failure and (self._silence() or failure)
            self._asked = time.monotonic()
            with self._changed:
                if failure is None and self._waiting:
                    self._waiting.popleft()
                self._failure = failure
                self._changed.notify_all()
                if failure is not None and self._hurry:
                    return

    def _next(self) -> bool:
        """Wait for something to send, and for a server that failed; False when there will be nothing."""
        with self._changed:
            if self._failure is not None:
                self._changed.wait_for(lambda: self._hurry, RETRY_SECONDS)
            self._changed.wait_for(lambda: self._waiting or self._hurry)
            return bool(self._waiting)

    def _silence(self) -> str | None:
        """Tell why the server doesn't answer; None where it does."""
        try:
            check_answers(self._store.uri)
        except TrackingError as error:
            return str(error)
        return None

    def _tell(self) -> None:
        away = self._failure
        if away is not None and not self._told and self.delivery.num_sent:
            _LOG.warning("%s; what is recorded meanwhile waits in %s", away, self.delivery.session.folder)
        elif away is None and self._told:
            _LOG.warning("the tracking server %s answers again, and is sent all that waited", self._store.shown)
        self._told = away is not None
