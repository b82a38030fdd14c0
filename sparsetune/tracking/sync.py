"""Sending what waits in the spool."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from sparsetune.errors import TrackingError
from sparsetune.tracking.delivery import Delivery
from sparsetune.tracking.spool import Session, sessions, set_damaged_aside
from sparsetune.tracking.store import Store, check_answers, connect

_LOG = logging.getLogger(__name__)

UNKNOWN = "an unknown server"
BUSY = "another process is recording or sending it"


@dataclass(frozen=True)
class SessionSent:
    """What became of a session.

    Args:
        folder: its folder; gone where nothing is left.
        server: its URI, without user and password.
        sent: operations that the server has taken now.
        left: operations that still wait.
        reason: why; None where none do.
        damaged: files or folders that can't be read, where they were set aside.
    """

    folder: Path
    server: str
    sent: int
    left: int
    reason: str | None = None
    damaged: tuple[Path, ...] = ()


def sync(spool: Path, store: Store, *, only_this: bool = False) -> list[SessionSent]:
    """Send all that waits in a spool; what a server already has isn't changed by having it sent again.

    A session that a living process holds is left to that process. What is damaged is set aside, told, and holds nothing
    else up.

    Args:
        spool: the folder of all sessions.
        store: where the configuration points; its user and password are used for sessions of the same server,
            MLflow's own variables for others.
        only_this: leave other servers' sessions alone.

    Returns:
        Each session, the oldest first.

    Raises:
        TrackingError: the disk fails, or MLflow isn't installed.
    """
    damaged = []
    for folder, problem in set_damaged_aside(spool):
        _LOG.warning("a session that waited is damaged (%s); it is set aside as %s", problem, folder)
        damaged.append(SessionSent(folder, UNKNOWN, 0, 0, None, (folder,)))
    found = [session for session in sessions(spool) if not only_this or session.uri == store.shown]
    return damaged + [_send(session, _server(session, store)) for session in found]


def _server(session: Session, store: Store) -> Store:
    if session.uri == store.shown:
        return store
    return replace(store, uri=session.uri, registry_uri=session.uri, artifact_root=None)


def _send(session: Session, store: Store) -> SessionSent:
    with session.held() as ours:
        pending = session.pending()
        if not ours:
            return SessionSent(session.folder, session.uri, 0, len(pending), BUSY)
        if session.remove_if_empty():
            return SessionSent(session.folder, session.uri, 0, 0)
        try:
            check_answers(store.uri)
            delivery = Delivery(session, connect(store), repeated=True)
        except TrackingError as error:
            return SessionSent(session.folder, session.uri, 0, len(pending), str(error))
        reason = delivery.send(pending)[1]
        session.remove_if_empty()
        reason = reason or next(iter(delivery.refusals.values()), None)
        left, aside = len(session.pending()), tuple(delivery.damaged)
        return SessionSent(session.folder, session.uri, delivery.num_sent, left, reason, aside)
