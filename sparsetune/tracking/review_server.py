"""The local web server of a blind review."""

import logging
import random
import re
import secrets
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from sparsetune.errors import SparsetuneError, UsageError
from sparsetune.report.review_page import Letter
from sparsetune.tracking.review import CHECKLIST, Review, VideoReview

_LOG = logging.getLogger(__name__)

MAX_BYTES = 1_000_000
"""Longest accepted answers."""

_HOST = re.compile(r"(127\.0\.0\.1|localhost)(:\d+)?")
"""What the page is opened by, through a forwarded port too; a page elsewhere that has its own name resolve to this
machine sends that name."""

_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; media-src 'self'; "
        "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


class PromptAnswers(BaseModel):
    """What was answered while the videos were called A and B: which is preferred, and which is worse in each item."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preferred: Literal["a", "b", "none"]
    worse: dict[str, Literal["a", "b", "none"]]

    def of(self, video: str, sparse: Letter) -> VideoReview:
        side = {"none": "none", sparse: "sparse"}.get(self.preferred, "dense")
        answers = {item: self.worse[item] != sparse for item in CHECKLIST}
        return VideoReview.model_validate({"video": video, "answers": answers, "preferred": side})


class Submission(BaseModel):
    """What the page sends: answers in its order of prompts, None for one that was skipped."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reviewer: str
    note: str = ""
    answers: tuple[PromptAnswers | None, ...]


def blind_letters(videos: Mapping[int, str], seed: int) -> dict[int, Letter]:
    """Draw by prompt index whether the sparse video is shown as A or as B."""
    draw = random.Random(seed)
    return {index: draw.choice(("a", "b")) for index in videos}


def reviewed(
    submission: Submission, videos: Mapping[int, str], sparse: Mapping[int, Letter]
) -> tuple[tuple[VideoReview, ...], tuple[str, ...]]:
    """Return the answers by what A and B were, and the videos that were skipped; UsageError where they don't fit."""
    items = {frozenset(answers.worse) for answers in submission.answers if answers is not None}
    if len(submission.answers) != len(videos) or not items <= {frozenset(CHECKLIST)}:
        raise UsageError("these answers are of another page; load it again")
    pairs = list(zip(videos.items(), submission.answers, strict=True))
    answered = tuple(answers.of(name, sparse[index]) for (index, name), answers in pairs if answers is not None)
    if not answered:
        raise UsageError("no prompt is answered; answer at least one")
    return answered, tuple(name for (_, name), answers in pairs if answers is None)


class ReviewServer(ThreadingHTTPServer):
    """Serves a page and videos on 127.0.0.1 until answers are stored.

    Only who knows the path's token is answered. `store` is called with what the page sends, and raises a
    SparsetuneError whose message the page shows.
    """

    daemon_threads = True

    def __init__(self, page: str, videos: Mapping[int, Path], store: Callable[[Submission], Review]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.page, self.videos, self.store = page, videos, store
        self.token = secrets.token_urlsafe(24)
        self.link = f"http://127.0.0.1:{self.server_port}/{self.token}/"
        self.stored = threading.Event()
        self._submitting = threading.Lock()
        self._review: Review | None = None
        self._is_ended = False

    def submit(self, body: bytes) -> tuple[HTTPStatus, str]:
        """Store what the page sends, once; return the status and text to answer with."""
        with self._submitting:
            if self._is_ended or self._review is not None:
                return HTTPStatus.CONFLICT, "this review is over; run sparsetune review again"
            try:
                self._review = self.store(Submission.model_validate_json(body))
            except ValidationError as error:
                return (
                    HTTPStatus.BAD_REQUEST,
                    f"the answers can't be read: {error.errors()[0]['msg']}; load the page again",
                )
            except SparsetuneError as error:
                return HTTPStatus.BAD_REQUEST, str(error)
            return HTTPStatus.OK, self._review.verdict

    def wait(self) -> Review:
        """Wait until a review is stored; where KeyboardInterrupt is raised instead, none is or will be."""
        try:
            self.stored.wait()
        except KeyboardInterrupt:
            with self._submitting:
                self._is_ended = True
            if self._review is None:
                raise
        assert self._review is not None
        return self._review

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a browser that seeks drops the request before
            _LOG.warning("a request of the review page failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: ReviewServer
    server_version, sys_version, protocol_version = "sparsetune", "", "HTTP/1.1"
    timeout = 60.0

    def do_GET(self) -> None:
        name = self._name()
        video = re.fullmatch(r"(\d{1,9})\.mp4", name or "")
        if name == "":
            self._send(HTTPStatus.OK, self.server.page.encode(), "text/html; charset=utf-8")
        elif video is not None and int(video[1]) in self.server.videos:
            self._send_video(self.server.videos[int(video[1])].read_bytes())
        else:
            self._refuse(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self._name() != "review":
            self._refuse(HTTPStatus.NOT_FOUND)
        elif self.headers.get("Origin") != f"http://{self.headers['Host']}":
            self._refuse(HTTPStatus.FORBIDDEN)
        elif self.headers.get_content_type() != "application/json":
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
        elif not re.fullmatch(r"\d{1,9}", length) or int(length) > MAX_BYTES:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        else:
            status, text = self.server.submit(self.rfile.read(int(length)))
            try:
                self._send(status, text.encode(), "text/plain; charset=utf-8")
            finally:
                if status == HTTPStatus.OK:
                    self.server.stored.set()

    def _name(self) -> str | None:
        """Return what is asked for under the token; None for another host or token."""
        root = f"/{self.server.token}/".encode()
        path = self.path.encode("latin-1", "replace")
        if not _HOST.fullmatch(self.headers.get("Host", "")):
            return None
        return path[len(root) :].decode("latin-1") if secrets.compare_digest(path[: len(root)], root) else None

    def _send_video(self, content: bytes) -> None:
        asked = re.fullmatch(r"bytes=(\d{0,15})-(\d{0,15})", self.headers.get("Range", ""))
        if asked is None or asked[0] == "bytes=-":
            self._send(HTTPStatus.OK, content, "video/mp4", {"Accept-Ranges": "bytes"})
            return
        size, (first, last) = len(content), asked.groups()
        start = int(first) if first else max(0, size - int(last))
        end = min(int(last), size - 1) if first and last else size - 1
        if start > end:
            self._send(
                HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, b"", "video/mp4", {"Content-Range": f"bytes */{size}"}
            )
            return
        part = {"Content-Range": f"bytes {start}-{end}/{size}"}
        self._send(HTTPStatus.PARTIAL_CONTENT, content[start : end + 1], "video/mp4", part)

    def _refuse(self, status: HTTPStatus) -> None:
        self.close_connection = True  # what it sent may not be read
        self._send(status, status.phrase.encode(), "text/plain; charset=utf-8")

    def _send(self, status: HTTPStatus, body: bytes, kind: str, more: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(body)), **(more or {})}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: the path has the token."""


@contextmanager
def serving(page: str, videos: Mapping[int, Path], store: Callable[[Submission], Review]) -> Iterator[ReviewServer]:
    """Serve a page, a video as INDEX.mp4 and the answers' address within the block."""
    with ReviewServer(page, videos, store) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
