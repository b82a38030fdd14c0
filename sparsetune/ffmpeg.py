"""Runs imageio-ffmpeg's ffmpeg binary, with frames piped in or out."""

import contextlib
import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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


@functools.cache
def version(binary: str) -> str:
    found = re.match(r"ffmpeg version (\S+)", run(binary, ("-version",)).output.decode(errors="replace"))
    return found[1] if found else "unknown"


@functools.cache
def pixel_formats(binary: str) -> Mapping[str, tuple[int, int]]:
    """Return the number of components and the largest bit depth of each pixel format."""
    listing = run(binary, ("-pix_fmts",)).output.decode(errors="replace")
    rows = re.findall(r"^[A-Z.]{5} (\S+) +(\d+) +\d+ +([\d-]+)$", listing, re.MULTILINE)
    return {name: (int(count), max(map(int, depths.split("-")))) for name, count, depths in rows}


def run(
    binary: str,
    arguments: Iterable[str],
    *,
    feed: Iterable[Chunk] | None = None,
    folder: Path | None = None,
    files: Sequence[IO[bytes]] = (),
) -> CompletedRun:
    """Run ffmpeg with these arguments in `folder` (relative paths in filter options need no escaping), and wait for it.

    `feed` is written to `pipe:0`; a run that exits early leaves the rest unread. `files` are those of `source`. The
    status is 127, as in a shell, where the binary can't be started. The process is killed when this function raises,
    Ctrl-C included.
    """
    with Process(binary, arguments, is_fed=feed is not None, folder=folder, files=files) as process:
        if feed is not None:
            process.write(feed)
        output = b"" if feed is not None else process.read()
        return replace(process.wait(), output=output)


def source(file: IO[bytes]) -> tuple[str, ...]:
    """Return the options that read an open file: no character of its name, such as `%`, then has a meaning."""
    return ("-i", f"/dev/fd/{file.fileno()}")


class Process(contextlib.AbstractContextManager["Process"]):
    """A running ffmpeg, killed at the end of the block: write its input, or read its output piece by piece."""

    def __init__(
        self,
        binary: str,
        arguments: Iterable[str],
        *,
        is_fed: bool = False,
        folder: Path | None = None,
        files: Sequence[IO[bytes]] = (),
    ) -> None:
        command = [binary, "-hide_banner", "-nostdin", "-nostats", "-loglevel", "level+info", *arguments]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # unlike an unread pipe, a file never blocks
        self._error: CompletedRun | None = None
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if is_fed else subprocess.DEVNULL,
                stdout=subprocess.DEVNULL if is_fed else subprocess.PIPE,
                stderr=self._log,
                cwd=folder,
                pass_fds=[file.fileno() for file in files],
                env={**os.environ, "AV_LOG_FORCE_NOCOLOR": "1"},
            )
        except OSError as error:
            self._error = CompletedRun(127, b"", f"[fatal] cannot start {binary}: {error.strerror or error}")

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._process is not None and self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def write(self, feed: Iterable[Chunk]) -> None:
        if self._process is not None and self._process.stdin is not None:
            _write(self._process.stdin, feed)

    def read(self) -> bytes:
        """Read the output to its end."""
        return b"" if self._process is None or self._process.stdout is None else self._process.stdout.read()

    def read_into(self, buffer: memoryview) -> int:
        """Fill a buffer of bytes, and return how many there were: fewer only at the output's end."""
        filled = 0
        while self._process is not None and self._process.stdout is not None and filled < len(buffer):
            got = self._process.stdout.readinto(buffer[filled:])  # type: ignore[attr-defined]
            if not got:
                break
            filled += got
        return filled

    def wait(self) -> CompletedRun:
        """Wait for the end, and return the status and the log."""
        if self._process is None:
            assert self._error is not None
            return self._error
        status = self._process.wait()
        self._log.seek(0)
        return CompletedRun(status, b"", self._log.read().decode(errors="replace"))


def _write(pipe: IO[bytes], feed: Iterable[Chunk]) -> None:
    try:
        with pipe:
            for buffer in feed:
                pipe.write(buffer)
    except BrokenPipeError:
        pass  # ffmpeg exited before it had read all; see its status and log
