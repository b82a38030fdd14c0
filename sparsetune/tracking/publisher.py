"""Publishing in the background, while runs are recorded."""

import logging
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

from sparsetune.errors import TrackingError
from sparsetune.tracking.publish import ServerCopies, ServerDownError, unpublished_runs
from sparsetune.tracking.store import Store, cause_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

_LOG = logging.getLogger(__name__)

RETRY_SECONDS = 15.0
"""Pause after the server failed."""

END_SECONDS = 15.0
"""How long a command waits at its end for its runs to be published."""

DOWN_SECONDS = 1.0
"""How long it waits for a server that didn't answer last."""


class Publisher:
    """Publishes runs in a background thread, so that recording never waits for the server.

    Failures are logged by the thread that calls, which may be drawing a progress display.

    Args:
        local: client of the local store.
        server: where to publish.
        down: what was logged about a server that didn't answer just now, if any.
    """

    def __init__(self, local: "MlflowClient", server: Store, down: str | None = None) -> None:
        self.copies = ServerCopies(local, server, live=True)
        self._changed = threading.Condition()
        self._waiting: dict[str, int] = {}
        """Number of calls of `publish` for each run that isn't published yet, in the order of the last calls."""
        self._failures: dict[str, str] = {}
        self._down = down
        self._logged_down = down is not None
        self._attempts = 0
        self._hurry = False
        threading.Thread(target=self._work, args=(local,), name="sparsetune-publish", daemon=True).start()

    def publish(self, run_ids: Iterable[str]) -> None:
        """Have runs published soon, in this order: a study after its trials, whose ids it names."""
        with self._changed:
            for run_id in run_ids:
                self._waiting[run_id] = self._waiting.pop(run_id, 0) + 1
            self._changed.notify_all()
        self._log_changes()

    def flush(self) -> None:
        """Wait a bounded time until all is published, and log how many runs are not."""
        self.publish(self._failures)
        with self._changed:
            before, self._hurry = self._attempts, True
            self._changed.notify_all()
            if self._down is not None:
                self._changed.wait_for(lambda: self._down is None or self._attempts > before, DOWN_SECONDS)
            if self._down is None:
                self._changed.wait_for(lambda: not self._waiting or self._attempts > before, END_SECONDS)
            self._hurry = False
            left = len(self._waiting.keys() | self._failures.keys())
            reason = self._down or next(iter(self._failures.values()), f"not done within {END_SECONDS:g} s")
        self._log_changes()
        if left:
            _LOG.warning(
                "%d run(s) are not on the tracking server %s yet (%s); publish them with "
                "`sparsetune sync --tracking-uri %s`",
                *(left, self.copies.server.shown, reason, self.copies.server.shown),
            )

    def _work(self, local: "MlflowClient") -> None:
        try:
            self.publish([str(run.info.run_id) for run in unpublished_runs(local, self.copies.server.shown)])
        except Exception as problem:  # e.g. an artifact that another process removes meanwhile: `sync` publishes it
            _LOG.debug("runs of earlier commands are not published now: %s", cause_of(problem), exc_info=True)
        while True:
            with self._changed:
                if self._down is not None and self._attempts:
                    self._changed.wait_for(lambda: self._hurry, RETRY_SECONDS)
                self._changed.wait_for(lambda: self._waiting)
                run_id, count = next(iter(self._waiting.items()))
            error: Exception | None = None
            try:
                self.copies.publish(run_id)
            except TrackingError as caught:
                error = caught
            except Exception as bug:  # it must not end the thread, for which the other runs wait
                error = bug
                _LOG.debug("run %s is not published: %s", run_id, cause_of(bug), exc_info=True)
            with self._changed:
                self._down = str(error) if isinstance(error, ServerDownError) else None
                if self._down is not None:
                    self._attempts += 1
                elif self._waiting[run_id] == count:
                    del self._waiting[run_id]
                self._failures.pop(run_id, None)
                if error is not None:
                    self._failures[run_id] = cause_of(error)
                self._changed.notify_all()

    def _log_changes(self) -> None:
        with self._changed:
            down, logged = self._down, self._logged_down
            self._logged_down = down is not None
        if down is not None and not logged:
            _LOG.warning("%s; runs are kept in the local store meanwhile", down)
        elif down is None and logged:
            _LOG.warning("the tracking server %s answers again", self.copies.server.shown)
