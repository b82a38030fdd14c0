"""The turn that all processes on one study take: what one does while it has it, the others see whole or not at all."""

import contextlib
import functools
import hashlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError

from sparsetune.errors import TuningError
from sparsetune.locks import exclusive

logger = logging.getLogger(__name__)

JOURNAL = "journal:"
"""Begins the URL of a journal file."""

_FROZEN_SECONDS = 300
"""A process that stands still with the turn loses it after this."""

_FRESH_SECONDS = 60
"""How long a connection is used for one turn after the other; many workers have several turns a second."""


@contextlib.contextmanager
def turn(url: str, name: str) -> Iterator[None]:
    """Take the turn at a study; wait while another process has it. It ends with its process, however that dies.

    The turn is kept where the study is, so processes on other hosts take it too: a lock of PostgreSQL's or MySQL's, a
    lock file beside a journal or a SQLite file. Other databases have none, which is warned of.

    Args:
        url: the study's storage, as `tune.storage`.
        name: the study's name; processes with different ones don't wait for each other.

    Raises:
        TuningError: the storage can't be reached, or its folder can't be written to.
    """
    path = journal_path(url)
    try:
        database = None if path is not None else sqlalchemy.make_url(url)
    except SQLAlchemyError as error:
        raise unreachable(url, error) from error
    if database is not None and database.get_backend_name() == "sqlite":
        path = None if database.database in (None, "", ":memory:") else Path(str(database.database))
        database = None
    with contextlib.ExitStack() as held:
        if path is not None:
            lock = path.with_name(f"{path.name}.{_key(name):016x}.lock")
            held.enter_context(exclusive(lock, what=f"study {name}", setting="tune.storage"))
        elif database is not None:
            held.enter_context(_database_lock(database, _key(name)))
        yield


def journal_path(url: str) -> Path | None:
    """Give the path of a journal file's URL; None for any other."""
    return Path(url.removeprefix(JOURNAL).removeprefix("//")) if url.startswith(JOURNAL) else None


@contextlib.contextmanager
def _database_lock(url: URL, key: int) -> Iterator[None]:
    if url.get_backend_name() == "postgresql":
        # Settings of the transaction; the lock ends with it.
        asked = [
            f"SET LOCAL idle_in_transaction_session_timeout = '{_FROZEN_SECONDS}s'",
            f"SELECT pg_advisory_xact_lock({key})",
        ]
    elif url.get_backend_name() in ("mysql", "mariadb"):
        asked = [f"SET SESSION wait_timeout = {_FROZEN_SECONDS}", f"SELECT GET_LOCK('sparsetune-{key:016x}', -1)"]
    else:
        try:
            url.get_dialect()
        except SQLAlchemyError as error:
            raise unreachable(str(url), error) from error
        _warn_unlocked(url.get_backend_name())
        yield
        return
    with contextlib.ExitStack() as connected:
        try:
            connection = connected.enter_context(_engine(url).connect())
            for statement in asked:
                connection.execute(sqlalchemy.text(statement))
        except (SQLAlchemyError, ImportError) as error:
            raise unreachable(str(url), error) from error
        yield  # giving the connection back rolls back, or closes it: either ends the lock


@functools.cache
def _engine(url: URL) -> sqlalchemy.Engine:
    # One that idles through an hour's trial may be cut off by a firewall, and MySQL's lock ends with its connection.
    if url.get_backend_name() == "postgresql":
        return sqlalchemy.create_engine(url, pool_size=1, pool_recycle=_FRESH_SECONDS, pool_pre_ping=True)
    return sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)


def unreachable(url: str, error: BaseException) -> TuningError:
    """Make the error of a storage that can't be used.

    Args:
        url: its URL.
        error: what it said.
    """
    shown = re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", url)
    cause = " ".join(str(error).split())[:200]
    return TuningError(f"the study's storage must be a database that opens, but {shown} doesn't: {cause}")


def _key(name: str) -> int:
    """Give a number of 63 bits for a name: PostgreSQL's locks are signed ones of 64."""
    return int.from_bytes(hashlib.sha256(f"sparsetune {name}".encode()).digest()[:8], "big") >> 1


@functools.cache
def _warn_unlocked(backend: str) -> None:
    logger.warning(
        "several processes at once on a study in %s may try a trial twice: it has no lock that sparsetune knows; "
        "use PostgreSQL, MySQL or a journal file for that",
        backend,
    )
