"""Tasks of one prompt, in a session with a simulated model."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from sparsetune.decoding import open_video
from sparsetune.errors import VideoError
from sparsetune.evaluation import tasks
from sparsetune.evaluation.baseline import BaselineCache
from sparsetune.evaluation.tasks import ScorePrompt
from tests.evaluation.conftest import POLICY, FakeHandle, FakeRenderer


def score(renderer: FakeRenderer, handle: FakeHandle, cache: BaselineCache, *, here: bool, **more):
    session = SimpleNamespace(
        renderer=renderer,
        shares_files=here,
        background=ThreadPoolExecutor(1),
        install=lambda policy, backend: handle,
    )
    task = ScorePrompt("a", POLICY, "reference", 42, cache, ("psnr",), **more)
    return task.run(session, lambda what: None)


def test_a_scored_prompt_has_its_video_beside_the_next_rendering_or_at_once_for_another_process(
    renderer: FakeRenderer, handle: FakeHandle, cache: BaselineCache, tmp_path: Path
) -> None:
    assert score(renderer, handle, cache, here=True).video is None
    here = score(renderer, handle, cache, here=True, with_video=True).video
    sent = score(renderer, handle, cache, here=False, with_video=True).video
    assert isinstance(here, Future)
    assert here.result() == sent
    (tmp_path / "compare.mp4").write_bytes(sent)
    video = open_video(tmp_path / "compare.mp4")
    assert video.width > 2 * 256


def test_a_video_that_cannot_be_encoded_does_not_end_the_trial(
    renderer: FakeRenderer, handle: FakeHandle, cache: BaselineCache, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def fail(*_: object) -> None:
        raise VideoError("no encoder")

    monkeypatch.setattr(tasks, "write_video", fail)
    result = score(renderer, handle, cache, here=False, with_video=True)
    assert result.video is None
    assert result.metrics["psnr"] > 0
    assert "a trial has no video: no encoder" in caplog.text
