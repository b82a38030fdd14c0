"""Hosts that leave and join during a search: each is a Ray node with its own processes, all on this host."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sparsetune.executor import Incident, StepDone
from sparsetune.tuning import TuningListener, TuningResult, tune
from sparsetune.tuning.events import TrialResult
from tests.executor.test_ray_executor import SMALL, config

ray = pytest.importorskip("ray", reason="the extra ray isn't installed")

from ray.cluster_utils import Cluster  # noqa: E402 - Ray may be missing

pytestmark = pytest.mark.slow

# Detect a lost node within two seconds instead of half a minute.
IMPATIENT = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
ON_HOSTS = {
    "engine.name": "ray",
    "engine.workers": "auto",
    "engine.threads_per_worker": 1,
    "engine.start_seconds": 300.0,
}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head node without resources for workers, and two hosts with one core each."""
    cluster = Cluster(True, head_node_args={"num_cpus": 0, "_system_config": IMPATIENT, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


class Mover(TuningListener):
    """Removes the host of the second trial during the trial, and adds another host."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.left: int | None = None
        self.incidents: list[Incident] = []
        self.trials: list[TrialResult] = []

    def on_step(self, event: StepDone) -> None:
        if self.left is None and event.trial == 1 and event.worker is not None:
            self.left = event.worker.index
            (gone,) = [node for node in self.cluster.worker_nodes if raylet(node) == parent(event.worker.pid)]
            self.cluster.remove_node(gone, allow_graceful=False)
            self.cluster.add_node(num_cpus=1, wait=False)

    def on_incident(self, incident: Incident) -> None:
        self.incidents.append(incident)

    def on_trial(self, result: TrialResult) -> None:
        self.trials.append(result)


def raylet(node: object) -> int:
    """The parent process of a node's workers."""
    return int(node.all_processes["raylet"][0].process.pid)


def parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def alone(folder: Path) -> TuningResult:
    """The result of this process without Ray, with as many threads as a worker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return tune(config(folder), output_dir=folder / "tune")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs Linux's /proc")
def test_a_host_leaves_in_the_middle_of_a_trial_and_another_joins(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `add_node` sets a signal handler, which only the main thread may; listeners are called in others.
    monkeypatch.setattr("ray._private.utils.set_sigterm_handler", lambda handler: None)
    mover = Mover(cluster)
    settings = {**ON_HOSTS, "engine.ray_address": cluster.address}
    result = tune(config(tmp_path / "hosts", **settings), output_dir=tmp_path / "hosts/tune", listeners=(mover,))
    here = f"({socket.gethostname()})"
    assert mover.left is not None
    texts = [incident.text for incident in result.incidents]
    assert f"worker {mover.left} {here} was lost (its host left); its task is run again by another worker" in texts
    assert any(f"worker {index} {here} joined" in texts for index in range(2, 6)), texts
    assert set(mover.incidents) <= set(result.incidents)
    assert sorted(trial.number for trial in mover.trials) == list(
        range(SMALL["tune.n_trials"])
    )  # none twice, none lost

    expected = alone(tmp_path / "alone")
    for trial, known in zip(result.trials, expected.trials, strict=True):
        assert (trial.params, trial.state, trial.sparsity) == (known.params, known.state, known.sparsity)
        assert [prompt.metrics for prompt in trial.prompts] == [prompt.metrics for prompt in known.prompts]
    assert result.best is not None and expected.best is not None and result.best.policy == expected.best.policy
    assert os.getpid() not in {trial.worker.pid for trial in mover.trials if trial.worker is not None}
