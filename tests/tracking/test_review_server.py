from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest

from sparsetune.errors import UsageError
from sparsetune.report.review_page import render_review
from sparsetune.report.words import words
from sparsetune.tracking.review import CHECKLIST, Review
from sparsetune.tracking.review_server import (
    MAX_BYTES,
    ReviewServer,
    Submission,
    blind_letters,
    reviewed,
    serving,
)
from tests.report.synthetic import result_of
from tests.tracking.review_client import alike, page_data, post

NAMES = {0: "videos/prompt_0_compare.mp4", 2: "videos/prompt_2_compare.mp4"}
SPARSE = {0: "a", 2: "b"}


def store(submission: Submission) -> Review:
    videos, skipped = reviewed(submission, NAMES, SPARSE)  # type: ignore[arg-type]
    if submission.reviewer == "nobody":
        raise UsageError("this reviewer is refused")
    return Review(evaluation_id="1", policy_digest="2", reviewer=submission.reviewer, videos=videos, skipped=skipped)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ReviewServer]:
    videos = {index: tmp_path / f"{index}.mp4" for index in NAMES}
    for index, path in videos.items():
        path.write_bytes(f"video {index}".encode())
    page = render_review(result_of(4), SPARSE, CHECKLIST, words("en"), run_id="3f2a9c1b", reviewer="Ada")  # type: ignore[arg-type]
    with serving(page, videos, store) as started:
        yield started


def answered(**worse: str) -> dict[str, Any]:
    return {"preferred": "a", "worse": dict.fromkeys(CHECKLIST, "none") | worse}


def refusal(link: str, **headers: str) -> int:
    with pytest.raises(HTTPError) as refused:
        urlopen(Request(link, headers=headers), timeout=30)
    refused.value.close()
    return refused.value.code


def refused_post(link: str, content: Any, **headers: str) -> tuple[int, str]:
    with pytest.raises(HTTPError) as refused:
        post(link, content, **headers)
    with refused.value as response:
        return response.code, response.read().decode()


def test_the_page_is_served_to_who_knows_the_token_on_this_machine_only(server: ReviewServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert [one["sparse"] for one in page_data(server.link)["prompts"]] == ["a", "b"]
    root = server.link[: -len(server.token) - 1]
    for path in ("", "review", f"{'x' * len(server.token)}/", f"{server.token[:-1]}/", server.token):
        assert refusal(root + path) == 404
    with urlopen(Request(server.link, headers={"Host": "localhost:9000"}), timeout=30) as forwarded:
        assert forwarded.headers["Referrer-Policy"] == "same-origin"  # the token is in the address
        assert "default-src 'none'" in forwarded.headers["Content-Security-Policy"]
    for host in ("evil.example", f"evil.example:{server.server_port}", "127.0.0.1.evil.example", ""):
        assert refusal(server.link, Host=host) == 404


@pytest.mark.parametrize(
    ("asked", "status", "content", "part"),
    [
        (None, 200, b"video 2", None),
        ("bytes=0-", 206, b"video 2", "bytes 0-6/7"),
        ("bytes=2-3", 206, b"de", "bytes 2-3/7"),
        ("bytes=5-99", 206, b" 2", "bytes 5-6/7"),
        ("bytes=-3", 206, b"o 2", "bytes 4-6/7"),
        ("bytes=-", 200, b"video 2", None),
        ("frames=1-2", 200, b"video 2", None),
    ],
)
def test_parts_of_a_video_are_served(
    server: ReviewServer, asked: str | None, status: int, content: bytes, part: str | None
) -> None:
    headers = {} if asked is None else {"Range": asked}
    with urlopen(Request(f"{server.link}2.mp4", headers=headers), timeout=30) as response:
        assert (response.status, response.read(), response.headers["Content-Range"]) == (status, content, part)
        assert response.headers["Content-Type"] == "video/mp4"


def test_what_is_no_video_or_beyond_it_is_refused(server: ReviewServer) -> None:
    assert refusal(f"{server.link}2.mp4", Range="bytes=7-") == 416
    for name in ("1.mp4", "../2.mp4", "2.mp4/", "%00", "review"):
        assert refusal(server.link + name) == 404


def test_answers_are_stored_as_what_a_and_b_were_and_end_the_server(server: ReviewServer) -> None:
    answers = [answered(motion="a", detail="b"), answered(motion="a")]
    assert post(server.link, {"reviewer": "Ada", "answers": answers}) == "rejected"
    review = server.wait()
    assert [one.preferred for one in review.videos] == ["sparse", "dense"]
    assert review.rejected == ("prompt_0_compare.mp4: motion",)
    assert review.summary == "2 videos, preferred blind: sparse 1, dense 1, no difference 0"
    assert refused_post(server.link, {"reviewer": "Ada", "answers": answers})[0] == 409


def test_a_skipped_prompt_leaves_a_review_incomplete(server: ReviewServer) -> None:
    assert post(server.link, {"reviewer": "Ada", "answers": [None, answered()]}) == "incomplete"
    review = server.wait()
    assert (review.ok, review.skipped) == (False, (NAMES[0],))
    assert review.summary == "1 video, 1 skipped, preferred blind: sparse 0, dense 1, no difference 0"


def test_another_page_can_post_nothing(server: ReviewServer) -> None:
    content = {"reviewer": "Ada", "answers": alike(server.link)}
    other = server.link.replace(f":{server.server_port}", ":1")
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": other[:18]}):
        assert refused_post(server.link, content, **headers)[0] == 403
    assert refused_post(server.link, content, **{"Content-Type": "text/plain"})[0] == 415
    assert refused_post(server.link, content, **{"Content-Length": str(MAX_BYTES + 1)})[0] == 413
    assert refused_post(server.link.replace(server.token, "x"), content)[0] == 404
    assert not server.stored.is_set()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"reviewer": "Ada", "answers": [None, None]}, "no prompt is answered"),
        ({"reviewer": "Ada", "answers": [answered()]}, "of another page"),
        ({"reviewer": "Ada", "answers": [None, {"preferred": "a", "worse": {"taste": "a"}}]}, "of another page"),
        ({"reviewer": "Ada", "answers": [None, {"preferred": "c", "worse": {}}]}, "can't be read: Input should be 'a'"),
        ([], "can't be read"),
        ({"reviewer": "nobody", "answers": [answered(), answered()]}, "this reviewer is refused"),
    ],
)
def test_answers_that_cannot_be_stored_are_said_and_may_be_sent_again(
    server: ReviewServer, content: Any, problem: str
) -> None:
    status, text = refused_post(server.link, content)
    assert status == 400 and problem in text
    assert post(server.link, {"reviewer": "Ada", "answers": alike(server.link)}) == "ok"


def test_ctrl_c_stores_nothing_and_nothing_is_stored_after_it(
    server: ReviewServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(server.stored, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        server.wait()
    assert refused_post(server.link, {"reviewer": "Ada", "answers": alike(server.link)})[0] == 409


def test_ctrl_c_after_it_is_stored_ends_as_usual(server: ReviewServer, monkeypatch: pytest.MonkeyPatch) -> None:
    post(server.link, {"reviewer": "Ada", "answers": alike(server.link)})

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(server.stored, "wait", interrupt)
    assert server.wait().reviewer == "Ada"


def test_the_server_is_gone_after_the_block(tmp_path: Path) -> None:
    with serving("page", {}, store) as server:
        link = server.link
    with pytest.raises(URLError):
        urlopen(link, timeout=5)


def test_a_browser_that_hangs_up_is_no_error(server: ReviewServer, capfd: pytest.CaptureFixture[str]) -> None:
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request("GET", f"/{server.token}/2.mp4")
    connection.close()
    page_data(server.link)
    assert capfd.readouterr() == ("", "")


def test_letters_are_drawn_by_prompt_from_the_seed() -> None:
    names = dict.fromkeys(range(64), "")
    drawn = blind_letters(names, 1)
    assert drawn == blind_letters(names, 1) != blind_letters(names, 2)
    assert set(drawn.values()) == {"a", "b"}
