"""The Ray cluster that workers run on: the one at an address, or one of our own on this host."""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from typing import Any

import ray

from sparsetune.errors import ExecutorError
from sparsetune.executor.worker_plan import Node

# Nothing is reported to Ray's makers, and workers without a GPU keep the variable that hides GPUs.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

_PROBLEMS = (ConnectionError, RuntimeError, ValueError, OSError)


class Cluster:
    """A connection to Ray; whoever opened it closes it.

    Args:
        address: `HOST:PORT`, `auto`, or None for a Ray on this host that ends with this process. Where this process is
            connected already, that connection is used, and outlives the cluster.
        seconds: within which it must answer.

    Raises:
        ExecutorError: nothing answers there, or it isn't Ray.
    """

    def __init__(self, address: str | None, seconds: float) -> None:
        self._ours = not ray.is_initialized()
        if self._ours and address is not None:
            _connect(address, seconds)
        elif self._ours:
            _start()

    @property
    def nodes(self) -> tuple[Node, ...]:
        """What its living hosts have."""
        held = [node["Resources"] for node in _hosts() if node["Alive"]]
        return tuple(Node(int(each.get("CPU", 0)), int(each.get("GPU", 0))) for each in held)

    def is_alive(self, host: str) -> bool:
        """Whether a host is still one of it."""
        return any(node["Alive"] and node["NodeManagerHostname"] == host for node in _hosts())

    def close(self) -> None:
        """End the connection, and the Ray of our own."""
        if self._ours and ray.is_initialized():
            ray.shutdown()


def _hosts() -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return listed


def _connect(address: str, seconds: float) -> None:
    if address != "auto":
        _check_address(address, seconds)
    try:
        _init(address)
    except _PROBLEMS as error:
        raise ExecutorError(f"the Ray at {address} must take connections, but: {_brief(error)}") from error


def _start() -> None:
    try:
        _init("local", num_cpus=len(os.sched_getaffinity(0)), include_dashboard=False)
    except _PROBLEMS as error:
        raise ExecutorError(f"a Ray on this host must start, but: {_brief(error)}") from error


def _init(address: str, **options: Any) -> None:
    """Have Ray begin on this thread: with another, its processes would end when that does."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, **options)
    finally:
        if threading.current_thread() is threading.main_thread() and handler is not None:
            signal.signal(signal.SIGTERM, handler)  # Ray takes it for itself


def _check_address(address: str, seconds: float) -> None:
    """Find out in a process of its own whether Ray answers: where it doesn't, Ray ends the process that asks."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in address:
        raise ExecutorError(
            f"--ray-address must be HOST:PORT or auto, but is {address}; give that of the cluster's head"
        )
    remedy = "start it with `ray start --head`, or mend --ray-address"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=min(seconds, 10.0)).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ExecutorError(f"the Ray at {address} must answer, but: {reason}; {remedy}") from error
    program = "from ray.scripts.scripts import main; main()"
    command = [sys.executable, "-c", program, "health-check", "--address", address]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise ExecutorError(f"the Ray at {address} must answer within {seconds:g} s, but didn't; {remedy}") from error
    except subprocess.CalledProcessError as error:
        raise ExecutorError(
            f"a Ray must answer at {address}, but something else or a sick one does; {remedy}"
        ) from error


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
