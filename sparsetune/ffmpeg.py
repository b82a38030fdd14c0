"""Runs of imageio-ffmpeg's ffmpeg binary, with frames piped in or out."""

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

Chunk = bytes | memoryview
"""What is written to a pipe: bytes, or a contiguous array's `data`, which copies nothing."""

_FAILURE = re.compile(r"\[(?:error|fatal)\] (.+)")


@dataclass(frozen=True)
class Finished:
    """How a run ended: its exit status (negative for a signal), what it wrote to the pipe, and its log."""

    status: int
    output: bytes
    log: str

    @property
    def reason(self) -> str:
        """One line on why a run failed: the first line of the log that ffmpeg marked as an error."""
        for line in self.log.splitlines():
            found = _FAILURE.search(line)
            if found:
                return found[1].strip()
        return f"it ended with status {self.status}" if self.status else "it found no frames"


def executable() -> str | None:
    """The binary's path, or None where imageio-ffmpeg is not installed or gives none that can be run.

    The environment's IMAGEIO_FFMPEG_EXE chooses another one, as everywhere with imageio-ffmpeg.
    """
    try:
        import imageio_ffmpeg
    except ImportError:
        return None
    try:
        path: str = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        return None
    return shutil.which(path)


@functools.cache
def filters(binary: str) -> frozenset[str]:
    """Names of the filters that a build of ffmpeg has."""
    listing = run(binary, ("-filters",)).output.decode(errors="replace")
    words = (line.split() for line in listing.splitlines())
    return frozenset(row[1] for row in words if len(row) > 2 and "->" in row[2])


def run(
    binary: str,
    arguments: Iterable[str],
    *,
    feed: Iterable[Chunk] | None = None,
    folder: Path | None = None,
) -> Finished:
    """Run ffmpeg to its end.

    Args:
        binary: from `executable`.
        arguments: all but the binary.
        feed: buffers written to `pipe:0`, one after another; a run that ends early leaves the rest unread.
        folder: where it runs (relative paths in filter options need no escaping then).

    A binary that can't be started ends with status 127, as in a shell. The process is ended whenever this
    function is left early, Ctrl-C included.
    """
    command = [binary, "-hide_banner", "-nostdin", "-nostats", "-loglevel", "level+info", *arguments]
    with tempfile.TemporaryFile() as log:  # a file never fills up and blocks, as an unread pipe does
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
            return Finished(127, b"", f"[fatal] {binary} can't be started: {error.strerror or error}")
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
        return Finished(status, output, log.read().decode(errors="replace"))


def _write(pipe: IO[bytes], feed: Iterable[Chunk]) -> None:
    try:
        with pipe:
            for buffer in feed:
                pipe.write(buffer)
    except BrokenPipeError:
        pass  # ffmpeg ended before it had read all; its status and log say why
