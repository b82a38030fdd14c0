"""Runs imageio-ffmpeg's ffmpeg binary, with frames piped in or out."""

import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

Chunk = bytes | memoryview  # input to a pipe; a contiguous array's `data` needs no copy

_FAILURE = re.compile(r"\[(?:error|fatal)\] ([^\r\n]+)")


@dataclass(frozen=True)
class CompletedRun:
    """Exit status (negative for a signal), output and log of a run."""

    status: int
    output: bytes
    log: str

    @property
    def reason(self) -> str:
        """Why a run failed: the first line of the log that ffmpeg marked as an error."""
        if found := _FAILURE.search(self.log):
            return found[1].strip()
        return f"it exited with status {self.status}" if self.status else "it found no frames"


def executable() -> str | None:
    """The binary's path, or IMAGEIO_FFMPEG_EXE; None where imageio-ffmpeg is missing or has no usable one."""
    try:
        import imageio_ffmpeg

        path: str = imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        return None
    return shutil.which(path)


@functools.cache
def filters(binary: str) -> frozenset[str]:
    listing = run(binary, ("-filters",)).output.decode(errors="replace")
    words = (line.split() for line in listing.splitlines())
    return frozenset(row[1] for row in words if len(row) > 2 and "->" in row[2])


def run(
    binary: str, arguments: Iterable[str], *, feed: Iterable[Chunk] | None = None, folder: Path | None = None
) -> CompletedRun:
    """Run ffmpeg with these arguments in `folder` (relative paths in filter options need no escaping), and wait for it.

    `feed` is written to `pipe:0`; a run that exits early leaves the rest unread. The status is 127, as in a shell,
    where the binary can't be started. The process is killed when this function raises, Ctrl-C included.
    """
    command = [binary, "-hide_banner", "-nostdin", "-nostats", "-loglevel", "level+info", *arguments]
    with tempfile.TemporaryFile() as log:  # unlike an unread pipe, a file never blocks
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL if feed is None else subprocess.PIPE,
                stdout=subprocess.PIPE if feed is None else subprocess.DEVNULL,
                stderr=log,
                cwd=folder,
                env={**os.environ, "AV_LOG_FORCE_NOCOLOR": "1"},
            )
        except OSError as error:
            return CompletedRun(127, b"", f"[fatal] cannot start {binary}: {error.strerror or error}")
        try:
            output = b""
            if process.stdin is not None:
                _write(process.stdin, feed or ())
            if process.stdout is not None:
                with process.stdout as pipe:
                    output = pipe.read()
            status = process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        log.seek(0)
        return CompletedRun(status, output, log.read().decode(errors="replace"))


def _write(pipe: IO[bytes], feed: Iterable[Chunk]) -> None:
    try:
        with pipe:
            for buffer in feed:
                pipe.write(buffer)
    except BrokenPipeError:
        pass  # ffmpeg exited before it had read all; see its status and log
