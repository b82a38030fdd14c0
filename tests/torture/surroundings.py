"""Commands in failing surroundings: tracking servers that don't answer as MLflow's, and full disks."""

import random
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.torture.kills import TUNE, Place, unexpected
from tests.tracking.servers import MlflowServer, free_port

MAX_DELAY = 5.0
"""Seconds by which a search may be slower."""

SIZES = (16_000, 200_000, 800_000, 1_500_000)
"""Bytes of a disk that is soon full."""

Server = Callable[[], AbstractContextManager[str]]


@contextmanager
def answering(status: int | None) -> Iterator[str]:
    """A server that answers every request with a status, or never for None."""
    stopped = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            if status is None:
                stopped.wait(60.0)
            else:
                self.send_error(status)

        do_GET = do_POST = do_PUT = do_PATCH = answer

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        stopped.set()
        server.shutdown()


@contextmanager
def refusing() -> Iterator[str]:
    """A port that nobody listens at."""
    yield f"http://127.0.0.1:{free_port()}"


@contextmanager
def killed(folder: Path) -> Iterator[str]:
    """An MLflow server that is killed some seconds after a command began."""
    folder.mkdir(exist_ok=True)
    server = MlflowServer(f"sqlite:///{folder}/server.db", folder)
    server.start()
    timer = threading.Timer(8.0, server.kill)
    timer.start()
    yield server.uri
    timer.join()


def failing_servers(folder: Path, count: int, _: random.Random) -> list[str]:
    """Tune with each failing server in turn, `count` times in all; the runs stay whole in the local store.

    A server that refuses connections from the start ends the command at once, in one sentence. Each is timed against
    the same command without a server just before, since other work may share the machine.
    """
    servers: dict[str, Server] = {"refusing": refusing, "hanging": partial(answering, None)}
    servers |= {f"answering {status}": partial(answering, status) for status in (403, 413, 500)}
    servers["killed"] = partial(killed, folder / "server")
    faults = list[str]()
    for number in range(count):
        name = list(servers)[number % len(servers)]
        place = Place(folder / f"served-{number}")
        status, seconds, log = Place(folder / f"alone-{number}").run(TUNE)
        assert status == 0, log
        with servers[name]() as url:
            status, took, log = place.run(TUNE, MLFLOW_TRACKING_URI=url)
        if name == "refusing" or (status == 1 and "Connection refused" in log):  # killed before it was asked
            found = [log] * (status != 1 or "does not answer" not in log or place.folder.joinpath("mlruns").exists())
        else:
            found = [unexpected(log)] + [log] * (status != 0) + place.faults()
        found += [f"{took - seconds:.1f} s slower"] * (took - seconds > MAX_DELAY)
        faults += [f"{name}: {fault}" for fault in found if fault]
    return faults


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """Mount a disk of so many bytes on a folder; what was written stays in the folder."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield
        kept = folder.with_name(f"{folder.name}-kept")
        shutil.copytree(folder, kept)
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    folder.rmdir()
    kept.rename(folder)


def full_disks(folder: Path, count: int, draw: random.Random) -> list[str]:
    """Tune with a full disk in one folder after the other, then with space again. Needs root, to mount the disks."""
    faults = list[str]()
    for number in range(count):
        name, size = ("mlruns", "results", "cache", "tmp")[number % 4], draw.choice(SIZES)
        place = Place(folder / f"full-{number}")
        with small_disk(place.folder / name, size):
            status, _, log = place.run(TUNE)
        last = [line for line in log.splitlines() if line.startswith("sparsetune: ")]
        found = [unexpected(log)] + [f"ends with {len(last)} messages: {log}"] * (status != 0 and len(last) != 1)
        status, _, log = place.run(TUNE)
        found += [log] * (status != 0) + place.faults()
        faults += [f"{name} with {size} bytes: {fault}" for fault in found if fault]
    return faults
