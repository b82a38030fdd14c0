"""How many workers a cluster can have, what each of them gets, and whether those that came suit each other."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sparsetune.config import EngineConfig
from sparsetune.errors import ExecutorError
from sparsetune.executor.events import Worker

_MOST_ON_A_CPU_HOST = 8
"""Each worker keeps a model in memory: more than a few on a host are asked for by number."""


@dataclass(frozen=True)
class Node:
    """What a host of the cluster has."""

    cpus: int
    gpus: int = 0


@dataclass(frozen=True)
class WorkerPlan:
    """How work is spread over a cluster.

    Args:
        num_workers: how many workers there are to be.
        threads: CPU threads of each.
        gpus: GPUs of each; a part of one where several share it, 0 on CPUs.
        grows: whether hosts that join later get workers too.
    """

    num_workers: int
    threads: int
    gpus: float
    grows: bool

    def capacity(self, nodes: Sequence[Node]) -> int:
        """Count the workers that hosts have room for, where the number isn't fixed."""
        return sum(_share(node, self.threads, self.gpus) for node in nodes)


@dataclass(frozen=True)
class WorkerInfo:
    """What a worker says of itself before it loads the model.

    Args:
        worker: who it is.
        kind: what computes, as baselines tell devices apart.
        versions: of the packages that decide results, by name.
        sees_cache: whether the folder of dense baselines is the leader's.
    """

    worker: Worker
    kind: str
    versions: Mapping[str, str]
    sees_cache: bool = True


class Note(NamedTuple):
    """What is to be said of workers: at which level of the log, and in which words."""

    level: int
    text: str


def plan(engine: EngineConfig, device: str, nodes: Sequence[Node]) -> WorkerPlan:
    """Decide how many workers there are and what each gets.

    Args:
        engine: what was asked for.
        device: the model's, as the configuration names it.
        nodes: the hosts.

    Raises:
        ExecutorError: the cluster has too little for that, or the settings contradict each other.
    """
    gpus = _gpus_per_worker(engine, device, nodes)
    room = sum(_room(node, engine.threads_per_worker or 1, gpus) for node in nodes)
    asked = None if engine.workers == "auto" else int(engine.workers)
    if (asked or 1) > room:
        each = f"{gpus:g} GPU each" if gpus else f"{engine.threads_per_worker or 1} CPU thread each"
        has = f"{sum(node.gpus for node in nodes)} GPUs" if gpus else f"{sum(node.cpus for node in nodes)} CPUs"
        raise ExecutorError(
            f"workers must be at most what the cluster has room for, {room} of {each} ({has}), but are {asked or 1}; "
            f"lower --workers{' or --gpus-per-worker' if gpus else ''}"
        )
    if gpus:
        cores = min(node.cpus // max(1, int(node.gpus / gpus)) for node in nodes if node.gpus)
        return WorkerPlan(asked or room, engine.threads_per_worker or max(1, cores), gpus, asked is None)
    if asked is None:
        threads = engine.threads_per_worker or 1
        return WorkerPlan(sum(_share(node, threads, 0.0) for node in nodes), threads, 0.0, True)
    return WorkerPlan(asked, engine.threads_per_worker or _shared_threads(asked, nodes), 0.0, False)


def check_workers(
    hellos: Sequence[WorkerInfo], versions: Mapping[str, str], *, measures_speed: bool, mixed_gpus: bool
) -> tuple[Note, ...]:
    """Check that workers suit each other and this process; gives what is to be said of them, each once.

    Versions are compared without what follows a `+`: a package built for the CPU here may be one for CUDA there.

    Args:
        hellos: of all workers.
        versions: this process's, of the same packages.
        measures_speed: whether policies compete in measured speed.
        mixed_gpus: whether several kinds of device are wanted all the same.

    Raises:
        ExecutorError: versions differ, or speeds would be measured on different devices.
    """
    notes = dict.fromkeys(note for hello in hellos for note in _check_versions(hello, versions))
    if apart := sorted({hello.worker.host for hello in hellos if not hello.sees_cache}):
        shown = ", ".join(apart)
        notes[
            Note(
                logging.WARNING,
                f"the folder of dense videos isn't shared with {shown}, so each of these hosts renders its own; give "
                "one that all see with --cache-dir",
            )
        ] = None
    kinds = sorted({hello.kind for hello in hellos})
    if len(kinds) < 2:
        return tuple(notes)
    if measures_speed and not mixed_gpus:
        raise ExecutorError(
            f"trials that compete in measured speed must run on one kind of device, but have {', '.join(kinds)}; "
            "use fewer hosts, or --mixed-gpus"
        )
    mixed = (
        f"workers have devices of several kinds ({', '.join(kinds)}): measured speeds and, in their last bits, pixels "
        "depend on which of them renders a prompt"
    )
    return (*notes, Note(logging.WARNING, mixed))


def _check_versions(hello: WorkerInfo, versions: Mapping[str, str]) -> list[Note]:
    """Check a worker's versions; gives the builds that differ."""
    here = {name: (hello.versions.get(name, "none"), version) for name, version in versions.items()}
    differing = {name: pair for name, pair in here.items() if pair[0] != pair[1]}
    builds = {name for name, pair in differing.items() if _is_build(name, *pair)}
    listed = [f"{name} {there} there and {version} here" for name, (there, version) in differing.items()
              if name not in builds]  # fmt: skip
    if listed:
        raise ExecutorError(
            f"workers must have the versions of this process, but {hello.worker.label} has {', '.join(listed)}; "
            "install the same everywhere"
        )
    return [
        Note(logging.INFO, f"{name} is built differently: {there} on {hello.worker.host} and {version} here")
        for name, (there, version) in differing.items()
    ]


def _is_build(name: str, there: str, here: str) -> bool:
    """Whether two versions are one, built in two ways; of sparsetune itself what follows a `+` is another commit."""
    return name != "sparsetune" and there.partition("+")[0] == here.partition("+")[0]


def _gpus_per_worker(engine: EngineConfig, device: str, nodes: Sequence[Node]) -> float:
    if ":" in device:
        raise ExecutorError(f"Ray chooses each worker's GPU, but --device is {device}; use --device cuda, auto or cpu")
    has_gpus = any(node.gpus for node in nodes)
    if device == "cpu":
        if engine.gpus_per_worker is not None:
            raise ExecutorError(
                f"workers on the CPU have no GPU, but --gpus-per-worker is {engine.gpus_per_worker:g}; leave it out"
            )
        return 0.0
    if not has_gpus and (device == "cuda" or engine.gpus_per_worker is not None):
        raise ExecutorError("the cluster must have a GPU, but it has none; use --device cpu without --gpus-per-worker")
    return (engine.gpus_per_worker or 1.0) if has_gpus else 0.0


def _room(node: Node, threads: int, gpus: float) -> int:
    if gpus:
        # Ray gives parts of one GPU or whole ones: half of each of two is none of its offers.
        return node.gpus * int(1 / gpus) if gpus < 1 else int(node.gpus // gpus)
    return node.cpus // threads


def _share(node: Node, threads: int, gpus: float) -> int:
    """Give the workers that a host gets where their number isn't fixed."""
    room = _room(node, threads, gpus)
    return room if gpus else min(room, _MOST_ON_A_CPU_HOST)


def _shared_threads(num_workers: int, nodes: Sequence[Node]) -> int:
    """Give the most threads with which so many workers still fit on the hosts."""
    for threads in range(max(node.cpus for node in nodes), 1, -1):
        if sum(node.cpus // threads for node in nodes) >= num_workers:
            return threads
    return 1
