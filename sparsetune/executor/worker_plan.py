"""The number of workers in a cluster, the resources of each, and the check that they match."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sparsetune.checkpoint.manifest import versions
from sparsetune.config import EngineConfig
from sparsetune.errors import ExecutorError
from sparsetune.executor.events import Worker

_MAX_PER_CPU_HOST = 8  # workers, if their number isn't given: each keeps a model in memory


class Node(NamedTuple):
    cpus: int
    gpus: int = 0


@dataclass(frozen=True)
class WorkerPlan:
    num_workers: int
    threads: int  # CPU threads of each
    gpus: float  # of each: a fraction where several share one, 0 on CPUs
    grows: bool  # whether workers are added for hosts that join later

    def capacity(self, nodes: Sequence[Node]) -> int:
        """How many workers fit on hosts if their number isn't fixed."""
        rooms = [_room(node, self.threads, self.gpus) for node in nodes]
        return sum(rooms if self.gpus else (min(room, _MAX_PER_CPU_HOST) for room in rooms))


@dataclass(frozen=True)
class WorkerInfo:
    """A worker before it loads the model."""

    worker: Worker
    device_kind: str  # as the keys of dense baselines name it
    versions: Mapping[str, str]  # its `package_versions`
    shares_cache: bool = True  # whether it sees the driver's cache folder


def package_versions() -> dict[str, str]:
    """Versions, in this process, of the packages that all workers must have in the same version.

    They are without build suffixes such as `+cu130`; that of sparsetune is its commit, and stays.
    """
    names = ("sparsetune", "torch", "diffusers", "transformers")
    return {
        name: version if name == "sparsetune" else version.partition("+")[0]
        for name, version in versions().items()
        if name in names
    }


def plan_workers(engine: EngineConfig, device: str, nodes: Sequence[Node]) -> WorkerPlan:
    """Raises ExecutorError where the cluster has too few resources, or settings contradict each other."""
    gpus = _gpus_per_worker(engine, device, nodes)
    threads = engine.threads_per_worker or 1
    room = sum(_room(node, threads, gpus) for node in nodes)
    fixed = None if engine.workers == "auto" else int(engine.workers)
    if (fixed or 1) > room:
        each = f"{gpus:g} GPU" if gpus else f"{threads} CPU thread"
        has = f"{sum(node.gpus for node in nodes)} GPUs" if gpus else f"{sum(node.cpus for node in nodes)} CPUs"
        raise ExecutorError(
            f"the cluster ({has}) has room for {room} workers with {each} each, not {fixed or 1}; "
            f"lower --workers{' or --gpus-per-worker' if gpus else ''}"
        )
    if gpus and engine.threads_per_worker is None:
        threads = max(1, min(node.cpus // max(1, int(node.gpus / gpus)) for node in nodes if node.gpus))
    elif fixed and engine.threads_per_worker is None:
        most = max(node.cpus for node in nodes)
        fits = (count for count in range(most, 1, -1) if sum(node.cpus // count for node in nodes) >= fixed)
        threads = next(fits, 1)
    plan = WorkerPlan(fixed or room, threads, gpus, grows=fixed is None)
    return plan if fixed or gpus else WorkerPlan(plan.capacity(nodes), threads, gpus, grows=True)


def check_workers(
    infos: Sequence[WorkerInfo], versions: Mapping[str, str], *, measures_speed: bool, mixed_gpus: bool
) -> tuple[str, ...]:
    """Check that workers match each other and this process, whose `package_versions` are given; returns warnings."""
    for info in infos:
        different = [
            f"{name} {info.versions.get(name, 'none')} instead of {version}"
            for name, version in versions.items()
            if info.versions.get(name) != version
        ]
        if different:
            raise ExecutorError(
                f"{info.worker.label} has other package versions than this process: {', '.join(different)}; "
                "install the same versions on all hosts"
            )
    warnings = []
    if apart := sorted({info.worker.host for info in infos if not info.shares_cache}):
        warnings.append(
            f"the cache folder isn't shared with {', '.join(apart)}: each of these hosts renders its own dense videos; "
            "set --cache-dir to a folder that all hosts share"
        )
    kinds = ", ".join(sorted({info.device_kind for info in infos}))
    if len({info.device_kind for info in infos}) > 1:
        on_gpu = any(not info.device_kind.startswith("cpu") for info in infos)
        if measures_speed and on_gpu and not mixed_gpus:
            raise ExecutorError(
                f"cannot rank trials by speed on different devices: {kinds}; use hosts with one kind, or --mixed-gpus"
            )
        warnings.append(
            f"workers have different devices ({kinds}): measured speeds, and the last bits of pixels, depend on which "
            "worker renders a prompt"
        )
    return tuple(warnings)


def _gpus_per_worker(engine: EngineConfig, device: str, nodes: Sequence[Node]) -> float:
    if ":" in device:
        raise ExecutorError(f"--device must be cuda, auto or cpu with --engine ray, which assigns GPUs, got {device}")
    if device == "cpu":
        if engine.gpus_per_worker is not None:
            raise ExecutorError("--gpus-per-worker cannot be used with --device cpu")
        return 0.0
    if any(node.gpus for node in nodes):
        return engine.gpus_per_worker or 1.0
    if device == "cuda" or engine.gpus_per_worker is not None:
        raise ExecutorError("the cluster has no GPU; use --device cpu without --gpus-per-worker")
    return 0.0


def _room(node: Node, threads: int, gpus: float) -> int:
    if gpus:  # Ray assigns a fraction of one GPU, or whole ones
        return node.gpus * int(1 / gpus) if gpus < 1 else int(node.gpus // gpus)
    return node.cpus // threads
