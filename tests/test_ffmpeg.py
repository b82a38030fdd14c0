import itertools
import os
import stat
import time

import pytest

from sparsetune import ffmpeg


def script(folder, text):
    path = folder / "ffmpeg"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_the_bundled_binary_has_the_filters_that_metrics_need():
    assert {"libvmaf", "xpsnr", "psnr", "ssim"} <= ffmpeg.filters(ffmpeg.executable())


def test_a_run_that_ends_before_it_read_all_ends_the_feed(tmp_path):
    done = ffmpeg.run(script(tmp_path, 'echo "[error] enough" >&2; exit 5'), [], feed=itertools.repeat(bytes(1 << 16)))
    assert done.status == 5 and done.reason == "enough"


def test_a_long_log_does_not_block(tmp_path):
    done = ffmpeg.run(script(tmp_path, "head -c 1000000 /dev/zero | tr '\\0' x >&2; cat >/dev/null"), [], feed=[b"x"])
    assert done.status == 0 and len(done.log) == 1_000_000


def test_a_process_does_not_outlive_a_failing_feed(tmp_path):
    pid = tmp_path / "pid"

    def feed():
        yield b"first"
        while not (pid.exists() and pid.read_text().endswith("\n")):
            time.sleep(0.01)
        raise KeyboardInterrupt("from the user")

    with pytest.raises(KeyboardInterrupt, match="from the user"):
        ffmpeg.run(script(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 60"), [], feed=feed())
    with pytest.raises(ProcessLookupError, match="No such process"):
        os.kill(int(pid.read_text()), 0)


def test_a_binary_that_cannot_be_started_has_a_reason(tmp_path):
    done = ffmpeg.run(str(tmp_path / "nowhere"), [])
    assert done.status == 127 and "nowhere: No such file" in done.reason


def test_a_chosen_binary_must_exist(monkeypatch, tmp_path):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "nowhere"))
    assert ffmpeg.executable() is None
