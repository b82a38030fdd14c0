import dataclasses

import pytest

from sparsetune.config import EngineConfig
from sparsetune.errors import ExecutorError
from sparsetune.executor.events import Worker
from sparsetune.executor.worker_plan import Node, WorkerInfo, WorkerPlan, check_workers, package_versions, plan_workers

H100S = (Node(cpus=32, gpus=8), Node(cpus=32, gpus=8))
OURS = {"sparsetune": "1.0", "torch": "2.13"}


def info(index: int = 0, kind: str = "cuda NVIDIA H100", **versions: str) -> WorkerInfo:
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
    assert plan_workers(EngineConfig(**settings), device, nodes) == expected


@pytest.mark.parametrize(
    ("settings", "device", "nodes", "message"),
    [
        (
            {"workers": 17},
            "auto",
            H100S,
            r"\(16 GPUs\) has room for 16 workers with 1 GPU each, not 17; lower --workers or",
        ),
        ({"gpus_per_worker": 9}, "auto", H100S, r"room for 0 workers with 9 GPU each"),
        (
            {"workers": 3},
            "cpu",
            (Node(cpus=2),),
            r"\(2 CPUs\) has room for 2 workers with 1 CPU thread each, not 3",
        ),
        ({}, "cuda", (Node(cpus=2),), "the cluster has no GPU"),
        ({"gpus_per_worker": 1}, "cpu", H100S, "--gpus-per-worker cannot be used with --device cpu"),
        ({}, "cuda:3", H100S, "which assigns GPUs, got cuda:3"),
    ],
)
def test_a_plan_that_does_not_fit_the_cluster_is_an_error(settings, device: str, nodes, message: str) -> None:
    with pytest.raises(ExecutorError, match=message):
        plan_workers(EngineConfig(**settings), device, nodes)


def test_capacity_grows_with_hosts_that_join() -> None:
    plan = plan_workers(EngineConfig(), "auto", H100S)
    assert plan.capacity((*H100S, H100S[0])) == 24
    assert plan_workers(EngineConfig(), "cpu", (Node(2),)).capacity((Node(2), Node(64))) == 10


def test_workers_alike_give_no_warning() -> None:
    assert check_workers([info(0), info(1)], OURS, measures_speed=True, mixed_gpus=False) == ()


def test_another_version_is_an_error_with_both() -> None:
    with pytest.raises(ExecutorError, match=r"worker 1 \(node7\) has other .*: torch 2.9 instead of 2.13; install"):
        check_workers([info(0), info(1, torch="2.9")], OURS, measures_speed=False, mixed_gpus=False)


def test_only_sparsetune_is_compared_with_its_build_suffix(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"sparsetune": "1.0+g1", "torch": "2.13.0+cu130", "python": "3.11"}
    monkeypatch.setattr("sparsetune.executor.worker_plan.versions", lambda: installed)
    assert package_versions() == {"sparsetune": "1.0+g1", "torch": "2.13.0"}


def test_another_commit_of_sparsetune_is_an_error() -> None:
    with pytest.raises(ExecutorError, match=r"sparsetune 1.0\+g1 instead of 1.0\+g2"):
        check_workers([info(sparsetune="1.0+g1")], {"sparsetune": "1.0+g2"}, measures_speed=False, mixed_gpus=False)


def test_hosts_without_the_cache_folder_are_named() -> None:
    apart = dataclasses.replace(info(1), shares_cache=False)
    (warning,) = check_workers([info(0), apart], OURS, measures_speed=False, mixed_gpus=False)
    assert "isn't shared with node7: each of these hosts renders its own" in warning


def test_different_devices_are_a_warning_and_an_error_where_speed_is_measured() -> None:
    mixed = [info(0), info(1, "cuda NVIDIA A100")]
    with pytest.raises(
        ExecutorError,
        match="on different devices: cuda NVIDIA A100, cuda NVIDIA H100; use hosts with one",
    ):
        check_workers(mixed, OURS, measures_speed=True, mixed_gpus=False)
    for measures_speed in (False, True):
        (warning,) = check_workers([*mixed, info(2)], OURS, measures_speed=measures_speed, mixed_gpus=measures_speed)
        assert "(cuda NVIDIA A100, cuda NVIDIA H100): measured speeds, and the last bits of pixels" in warning
