import dataclasses
import logging

import pytest

from sparsetune.config import EngineConfig
from sparsetune.errors import ExecutorError
from sparsetune.executor.events import Worker
from sparsetune.executor.worker_plan import Node, WorkerInfo, WorkerPlan, check_workers, plan

H100S = (Node(cpus=32, gpus=8), Node(cpus=32, gpus=8))
OURS = {"sparsetune": "1.0", "torch": "2.13"}


def hello(index: int = 0, kind: str = "cuda NVIDIA H100", **versions: str) -> WorkerInfo:
    return WorkerInfo(Worker(index, "node7", kind, 100), kind, OURS | versions)


@pytest.mark.parametrize(
    ("settings", "device", "nodes", "expected"),
    [
        ({}, "auto", H100S, WorkerPlan(16, 4, 1.0, True)),
        ({"workers": 3}, "cuda", H100S, WorkerPlan(3, 4, 1.0, False)),
        ({"gpus_per_worker": 2}, "auto", H100S, WorkerPlan(8, 8, 2.0, True)),
        ({"gpus_per_worker": 0.5, "workers": 20}, "auto", H100S, WorkerPlan(20, 2, 0.5, False)),
        ({}, "auto", (Node(cpus=2),), WorkerPlan(2, 1, 0.0, True)),
        ({}, "auto", (Node(cpus=64),), WorkerPlan(8, 1, 0.0, True)),
        ({"workers": "auto", "threads_per_worker": 16}, "cpu", (Node(cpus=64),), WorkerPlan(4, 16, 0.0, True)),
        ({"workers": 2}, "cpu", (Node(cpus=8),), WorkerPlan(2, 4, 0.0, False)),
        ({"workers": 3}, "cpu", (Node(cpus=8), Node(cpus=4)), WorkerPlan(3, 4, 0.0, False)),
        ({"workers": 16}, "cpu", (Node(cpus=64),), WorkerPlan(16, 4, 0.0, False)),
        ({"workers": 1}, "cpu", H100S, WorkerPlan(1, 32, 0.0, False)),
    ],
)
def test_workers_share_gpus_and_cores(settings, device: str, nodes, expected: WorkerPlan) -> None:
    assert plan(EngineConfig(**settings), device, nodes) == expected


@pytest.mark.parametrize(
    ("settings", "device", "nodes", "message"),
    [
        ({"workers": 17}, "auto", H100S, r"room for, 16 of 1 GPU each \(16 GPUs\), but are 17; lower --workers or"),
        ({"gpus_per_worker": 9}, "auto", H100S, r"room for, 0 of 9 GPU each"),
        ({"workers": 3}, "cpu", (Node(cpus=2),), r"room for, 2 of 1 CPU thread each \(2 CPUs\), but are 3"),
        ({}, "cuda", (Node(cpus=2),), "the cluster must have a GPU, but it has none"),
        ({"gpus_per_worker": 1}, "cpu", H100S, "workers on the CPU have no GPU, but --gpus-per-worker is 1"),
        ({}, "cuda:3", H100S, "Ray chooses each worker's GPU, but --device is cuda:3"),
    ],
)
def test_what_a_cluster_has_no_room_for_is_refused(settings, device: str, nodes, message: str) -> None:
    with pytest.raises(ExecutorError, match=message):
        plan(EngineConfig(**settings), device, nodes)


def test_hosts_that_join_have_room_for_as_many_as_those_at_the_start() -> None:
    staffing = plan(EngineConfig(), "auto", H100S)
    assert staffing.capacity((*H100S, H100S[0])) == 24
    assert plan(EngineConfig(), "cpu", (Node(2),)).capacity((Node(2), Node(64))) == 10


def test_workers_alike_are_taken() -> None:
    assert check_workers([hello(0), hello(1)], OURS, measures_speed=True, mixed_gpus=False) == ()


def test_another_version_is_refused_with_both() -> None:
    with pytest.raises(ExecutorError, match=r"but worker 1 \(node7\) has torch 2.9 there and 2.13 here; install"):
        check_workers([hello(0), hello(1, torch="2.9")], OURS, measures_speed=False, mixed_gpus=False)


def test_a_build_for_other_devices_is_noted_alone() -> None:
    ours, theirs = OURS | {"torch": "2.13.0+cpu"}, {"torch": "2.13.0+cu130"}
    (note,) = check_workers([hello(0, **theirs), hello(1, **theirs)], ours, measures_speed=False, mixed_gpus=False)
    assert note == (logging.INFO, "torch is built differently: 2.13.0+cu130 on node7 and 2.13.0+cpu here")
    with pytest.raises(ExecutorError, match=r"has torch 2.12.0\+cu130 there and 2.13.0\+cpu here; install"):
        check_workers([hello(0, torch="2.12.0+cu130")], ours, measures_speed=False, mixed_gpus=False)


def test_another_commit_of_sparsetune_is_refused() -> None:
    with pytest.raises(ExecutorError, match=r"has sparsetune 1.0\+g1 there and 1.0\+g2 here"):
        check_workers([hello(sparsetune="1.0+g1")], {"sparsetune": "1.0+g2"}, measures_speed=False, mixed_gpus=False)


def test_hosts_that_dont_see_the_cache_are_named() -> None:
    apart = dataclasses.replace(hello(1), sees_cache=False)
    (note,) = check_workers([hello(0), apart], OURS, measures_speed=False, mixed_gpus=False)
    assert note.level == logging.WARNING
    assert "isn't shared with node7, so each of these hosts renders its own" in note.text


def test_devices_of_several_kinds_are_said_and_refused_where_speed_counts() -> None:
    mixed = [hello(0), hello(1, "cuda NVIDIA A100")]
    with pytest.raises(
        ExecutorError, match="but have cuda NVIDIA A100, cuda NVIDIA H100; use fewer hosts, or --mixed-"
    ):
        check_workers(mixed, OURS, measures_speed=True, mixed_gpus=False)
    for measures_speed in (False, True):
        (note,) = check_workers([*mixed, hello(2)], OURS, measures_speed=measures_speed, mixed_gpus=measures_speed)
        assert note.level == logging.WARNING
        assert "(cuda NVIDIA A100, cuda NVIDIA H100): measured speeds and, in their last bits, pixels" in note.text
