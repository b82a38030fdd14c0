"""A connection to a Ray cluster, at an address or started on this host."""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import ray

from sparsetune.config import Config
from sparsetune.errors import ExecutorError
from sparsetune.executor.ray_worker import RayWorker
from sparsetune.executor.worker_plan import Node, WorkerPlan

_WORKER_VARIABLES = ("HF_HUB_OFFLINE", "HF_HOME", "HF_HUB_CACHE")

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # workers without GPUs keep CUDA_VISIBLE_DEVICES


class Cluster:
    """A connection to Ray; raises ExecutorError where none answers within `seconds`.

    `address` is `HOST:PORT`, `auto`, or None for a Ray on this host that ends with this process. An existing connection
    of this process is used instead, and isn't closed.
    """

    def __init__(self, address: str | None, seconds: float) -> None:
        self._is_ours = not ray.is_initialized()
        if not self._is_ours:
            return
        if address not in (None, "auto"):
            check_address(address, seconds)
        num_cpus = None if address else len(os.sched_getaffinity(0))
        logging.getLogger("ray").setLevel(logging.ERROR)
        handler = signal.getsignal(signal.SIGTERM)  # Ray replaces it
        try:
            # On this thread: Ray's processes end with the thread that started them.
            ray.init(
                address or "local",
                num_cpus=num_cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
            )
        except (RuntimeError, ValueError, OSError) as error:
            what = f"cannot connect to Ray at {address}" if address else "cannot start Ray on this host"
            raise ExecutorError(f"{what}: {brief(error)}") from error
        finally:
            if threading.current_thread() is threading.main_thread() and handler is not None:
                signal.signal(signal.SIGTERM, handler)

    @property
    def nodes(self) -> tuple[Node, ...]:
        resources = [node["Resources"] for node in _nodes() if node["Alive"]]
        return tuple(Node(int(each.get("CPU", 0)), int(each.get("GPU", 0))) for each in resources)

    def start_worker(self, index: int, config: Config, plan: WorkerPlan, cache_marker: Path) -> Any:
        """Request an actor, which starts when the cluster has room."""
        variables = {name: os.environ[name] for name in _WORKER_VARIABLES if name in os.environ}
        variables |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(plan.threads))
        remote: Any = ray.remote(RayWorker)
        options = {
            "num_cpus": 1 if plan.gpus else plan.threads,
            "num_gpus": plan.gpus,
            "max_concurrency": 4,  # for `stop` during `run`
            "scheduling_strategy": "SPREAD",
            "runtime_env": {"env_vars": variables},
        }
        return remote.options(**options).remote(index, config, plan.threads, cache_marker)

    def cause_of_loss(self, error: Exception, host: str | None) -> str:
        """Why a worker was lost, from the error that Ray raised; `host` is None if it had not started."""
        # Ray says of any death that the kernel may have been short of memory; these are its own monitor's words.
        if isinstance(error, ray.exceptions.OutOfMemoryError) or "running low on memory" in str(error):
            return "its host ran out of memory"
        is_alive = host is None or any(node["Alive"] and node["NodeManagerHostname"] == host for node in _nodes())
        # A host of the same name may have joined since.
        return "its process ended" if is_alive and "node has died" not in str(error) else "its host left"

    def close(self) -> None:
        if self._is_ours and ray.is_initialized():
            ray.shutdown()


def _nodes() -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return nodes


def check_address(address: str, seconds: float) -> None:
    """Check, in a process of its own, that Ray answers: `ray.init` ends the process if it doesn't."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in address:
        raise ExecutorError(f"--ray-address must be the cluster head's HOST:PORT, or auto, got {address}")
    remedy = "start it with `ray start --head`, or correct --ray-address"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=min(seconds, 10.0)).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ExecutorError(f"cannot connect to Ray at {address}: {reason}; {remedy}") from error
    program = "from ray.scripts.scripts import main; main()"
    command = [sys.executable, "-c", program, "health-check", "--address", address]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise ExecutorError(f"Ray at {address} did not answer within {seconds:g} s; {remedy}") from error
    except subprocess.CalledProcessError as error:
        raise ExecutorError(f"no healthy Ray answers at {address}; {remedy}") from error


def brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
