"""URLs of databases and servers: made from paths, and shown without their credentials."""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

_URL = re.compile(r"(?!models:|runs:|hf:)\b([A-Za-z][A-Za-z0-9+.-]*:/{1,3})([^\s'\"<>]+)")
_SPACED_USER = re.compile(r"^((?!models:|runs:|hf:)[A-Za-z][A-Za-z0-9+.-]*:/{1,3})[^/?#'\"]*@")
_SECRET = re.compile(
    r"(?i)([?&;][^=&;\s]*(?:pass|pwd|secret|token|key|cred|auth|sig|odbc_connect)[^=&;\s]*=)[^&;\s'\"]*"
)


def without_credentials(text: str) -> str:
    """Return a URL, or a text with URLs in it, without users, passwords, and query parameters that hold secrets."""
    return _SECRET.sub(r"\1***", _URL.sub(_without_user, _SPACED_USER.sub(r"\1", text)))


def _without_user(found: re.Match[str]) -> str:
    scheme, rest = found.groups()
    user, at, host = re.split(r"[/?#]", rest, maxsplit=1)[0].rpartition("@")
    if at:
        return scheme + rest[len(user) + 1 :]
    # An unquoted password may hold any of / ? # and @: then what seems to be a port isn't a number.
    is_port = re.fullmatch(r"([^:]*|\[[^\]]*\])(:(\d*|\*{3}))?[,;:.)]*", host)
    if not is_port and "@" not in rest:
        return f"{scheme}{host.partition(':')[0]}:***{rest[len(host) :]}"
    return found[0] if is_port else scheme + rest.rpartition("@")[2]


def scheme(url: str) -> str:
    """Return a URL's scheme without a driver, e.g. `postgresql`; empty for a path."""
    found = re.match(r"([a-z][a-z0-9.-]*)(\+[a-z0-9.-]+)?:", url.lower())
    return found[1] if found else ""


def sqlite_url(path: Path) -> str:
    """Return the URL of a SQLite file.

    Only `%` and `?` are quoted, which is all that SQLAlchemy needs to read the path back: MLflow takes the rest of the
    URL for a path, and makes a folder of that name.
    """
    return f"sqlite:///{path.as_posix().replace('%', '%25').replace('?', '%3F')}"


def sqlite_path(url: str) -> Path | None:
    """Return the absolute path of the file that a SQLite URL names; None for SQLite in memory and any other URL."""
    if scheme(url) != "sqlite":
        return None
    found = re.match(r"[^:/]+://[^/]*/([^?]*)", url)  # as SQLAlchemy's make_url, which takes .4 s to import
    database = unquote(found[1]) if found else ""
    if database.startswith("file:"):  # SQLite's own URI
        database = unquote(urlsplit(database).path)
    return Path(database).absolute() if database and database != ":memory:" else None
