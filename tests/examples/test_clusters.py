"""The scripts and manifests for many GPUs: run as far as possible without a cluster, otherwise parsed."""

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from sparsetune.cli.eval import command as evaluate
from sparsetune.cli.tune import command as tune
from sparsetune.config import Config
from sparsetune.config.resolver import config_fields

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ROOT = EXAMPLES.parent
SCRIPTS = sorted(
    path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*") if path.suffix in (".sh", ".sbatch")
)
MANIFESTS = sorted((EXAMPLES / "kubernetes").glob("*.yaml"))

SBATCH = {
    "array", "cpus-per-task", "exclusive", "gpus-per-node", "gpus-per-task", "job-name", "mem", "nodes", "ntasks",
    "ntasks-per-node", "output", "requeue", "signal", "time",
}  # fmt: skip
"""Options of sbatch as of Slurm 24.05."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A folder of commands at the front of PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    return folder


def stand_in(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)


def run(script: str, path: Path, *args: str, **environment: str) -> list[str]:
    """Run a SLURM script; return the arguments that it passes to srun."""
    stand_in(path, "srun", r"""printf '%s\0' srun "$@" > words""")
    stand_in(path, "scontrol", "echo node7; echo node8")
    given = {"SLURM_SUBMIT_DIR": str(path.parent), "SLURM_JOB_ID": "20123", "SLURM_JOB_NODELIST": "node[7-8]"}
    given |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "8", "SLURM_GPUS_ON_NODE": "8"} | environment
    ran = subprocess.run(
        ["bash", str(EXAMPLES / script), *args],
        env={"PATH": f"{path}:{os.environ['PATH']}"} | given, cwd=path.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return (path.parent / "words").read_text().split("\0")[:-1]


def understood(words: list[str]) -> Config:
    """Parse a `sparsetune tune` command as the command line does; return the configuration."""
    from sparsetune.cli.options import build_config

    assert words[:2] == ["sparsetune", "tune"]
    with tune.make_context("tune", words[2:]) as context:
        return build_config(context)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_bash_that_stops_at_its_first_error(script: str) -> None:
    text = (EXAMPLES / script).read_text()
    assert text.startswith("#!/bin/bash\n") and "\nset -euo pipefail\n" in text
    subprocess.run(["bash", "-n", str(EXAMPLES / script)], check=True)


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script.endswith(".sbatch")])
def test_sbatch_knows_every_directive_and_finds_it_before_the_first_command(script: str) -> None:
    directives = {}
    for line in (EXAMPLES / script).read_text().splitlines():
        if not line.startswith("#"):
            assert line == ""  # sbatch reads no further than the first line that is neither
            break
        if found := re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line):
            directives[found[1]] = found[2]
        else:
            assert "SBATCH" not in line
    assert directives.keys() <= SBATCH and {"job-name", "time", "nodes"} <= directives.keys()


def test_the_array_s_tasks_work_on_one_study_in_a_folder_that_all_see(path: Path) -> None:
    shared = path.parent / "sparsetune-shared"
    words = run("slurm/array.sbatch", path)
    assert words[0] == "srun"
    config = understood(words[1:])
    assert (config.tune.study_name, config.tune.n_trials) == ("cogvideox-2b-array", 32)
    assert (config.tracking.root, config.cache.dir) == (shared / "mlruns", shared / "baselines")
    assert shared.is_dir()
    environment = {"MODEL": "wan2.1-t2v-1.3b", "N_TRIALS": "7", "SHARED": str(path / "x")}
    other = understood(run("slurm/array.sbatch", path, **environment)[1:])
    assert (other.tune.n_trials, other.tracking.root, other.model.name) == (7, path / "x" / "mlruns", "wan2.1-t2v-1.3b")


def test_the_array_keeps_its_study_in_the_shared_folder_unless_told_otherwise(path: Path, monkeypatch) -> None:
    stand_in(path, "srun", 'echo -n "$SPARSETUNE_TUNE__STORAGE" > storage')
    script = (EXAMPLES / "slurm/array.sbatch").read_text()
    for given, expected in (
        ({}, f"journal:{path.parent}/sparsetune-shared/study.log"),
        ({"x": "1"}, "postgresql://db/x"),
    ):
        environment = {"PATH": f"{path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(path.parent)}
        if given:
            environment["SPARSETUNE_TUNE__STORAGE"] = "postgresql://db/x"
        subprocess.run(["bash", "-c", script], env=environment, cwd=path.parent, check=True)
        assert (path.parent / "storage").read_text() == expected


def test_ray_s_nodes_and_the_search_agree_on_an_address(path: Path) -> None:
    words = run("slurm/ray.sbatch", path)
    split = words.index("--")
    assert words[:3] == ["srun", "ray", "symmetric-run"]
    ray = dict(zip(words[3:split:2], words[4:split:2], strict=True))
    assert ray == {"--address": "node7:20123", "--min-nodes": "2", "--num-gpus": "8"}
    options = words[split + 1 :]
    assert options[options.index("--ray-address") + 1] == "node7:20123"
    config = understood(options)
    assert config.tune.storage == f"journal:{path.parent}/sparsetune-shared/study.log"


@pytest.mark.slow
def test_ray_has_the_command_that_the_script_uses() -> None:
    from ray.scripts.scripts import cli  # takes seconds

    assert {"address", "min_nodes"} <= {parameter.name for parameter in cli.commands["symmetric-run"].params}


def one_host(path: Path, *args: str, tune: str, **more: Any) -> "subprocess.Popen[str]":
    stand_in(path, "nvidia-smi", "printf 'GPU 0\nGPU 1\nGPU 2\n'")
    stand_in(path, "sparsetune", tune)
    return subprocess.Popen(
        [str(EXAMPLES / "one-host.sh"), *args],
        env={"PATH": f"{path}:{os.environ['PATH']}"}, cwd=path.parent, stderr=subprocess.PIPE, text=True, **more,
    )  # fmt: skip


def test_one_host_starts_a_process_a_gpu_on_one_study_and_says_how_they_ended(path: Path) -> None:
    log = 'echo "$CUDA_VISIBLE_DEVICES $*" >> log; echo working >&2; exit $((CUDA_VISIBLE_DEVICES == 1 ? 3 : 0))'
    script = one_host(path, "--model", "demo", tune=log)
    error = script.communicate(timeout=60)[1]
    assert script.returncode == 3
    lines = sorted((path.parent / "log").read_text().splitlines())
    assert lines == [f"{gpu} tune --storage journal:mlruns/study.log --model demo" for gpu in range(3)]
    assert sorted(error.splitlines()) == [f"GPU {gpu}: working" for gpu in range(3)]
    assert understood(["sparsetune", *shlex.split(lines[0])[1:]]).tune.storage == "journal:mlruns/study.log"


def test_ctrl_c_reaches_every_process_of_one_host_and_is_waited_for(path: Path) -> None:
    wait = 'trap "echo ended >> log; exit 130" INT; echo begun >> log; for i in {1..600}; do sleep 0.1; done'
    script = one_host(path, tune=wait, start_new_session=True)
    log, end = path.parent / "log", time.monotonic() + 60
    while not log.is_file() or log.read_text().count("begun") < 3:
        assert time.monotonic() < end
        time.sleep(0.05)
    os.kill(script.pid, signal.SIGINT)
    script.communicate(timeout=60)
    assert script.returncode == 130
    assert log.read_text().count("ended") == 3


def manifests(kind: str) -> list[dict[str, Any]]:
    found = [each for path in MANIFESTS for each in yaml.safe_load_all(path.read_text()) if each["kind"] == kind]
    assert found
    return found


def pods() -> list[dict[str, Any]]:
    """The specification of every pod."""
    (cluster,), (job,) = manifests("RayCluster"), manifests("Job")
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups] + [job["spec"]["template"]["spec"]]


def test_every_manifest_is_of_a_kind_that_kubernetes_and_kuberay_know() -> None:
    kinds = {(each["apiVersion"], each["kind"]) for path in MANIFESTS for each in yaml.safe_load_all(path.read_text())}
    assert kinds == {
        ("v1", "PersistentVolumeClaim"), ("batch/v1", "Job"), ("ray.io/v1", "RayCluster"), ("ray.io/v1", "RayJob")
    }  # fmt: skip


def test_the_cluster_has_what_kuberay_requires_and_the_ray_that_is_pinned() -> None:
    """Fields of KubeRay 1.5's resource definition, against which the complete file was validated once."""
    (cluster,) = manifests("RayCluster")
    spec = cluster["spec"]
    assert spec.keys() == {"rayVersion", "enableInTreeAutoscaling", "headGroupSpec", "workerGroupSpecs"}
    assert f"ray=={spec['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert spec["headGroupSpec"].keys() == {"rayStartParams", "template"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0"
    for group in spec["workerGroupSpecs"]:
        assert group.keys() == {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == group["rayStartParams"]["num-gpus"]
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        assert all(isinstance(each, str) for each in group["rayStartParams"].values())  # KubeRay refuses numbers


def test_all_pods_share_one_folder_and_one_image() -> None:
    (claim,) = manifests("PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    images = set()
    for pod in pods():
        names = {volume["name"]: volume for volume in pod["volumes"]}
        assert names["shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        for container in pod["containers"]:
            images.add(container["image"])
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert mounts.keys() == names.keys() and mounts["shared"] == "/shared"
    assert len(images) == 1


def test_the_ray_job_drives_the_cluster() -> None:
    (job,), (cluster,) = manifests("RayJob"), manifests("RayCluster")
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    config = understood(shlex.split(job["spec"]["entrypoint"]))
    assert config.tracking.root == Path("/shared/mlruns") and config.tune.storage == "journal:/shared/study.log"


def test_the_pods_of_the_indexed_job_work_on_one_study_in_a_database() -> None:
    (job,) = manifests("Job")
    spec, (container,) = job["spec"], job["spec"]["template"]["spec"]["containers"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # which podFailurePolicy requires
    config = understood([*container["command"], *container["args"]])
    assert config.tune.study_name == "cogvideox-2b" and config.tracking.root == Path("/shared/mlruns")
    for variable in container["env"]:
        section, _, name = variable["name"].removeprefix("SPARSETUNE_").lower().partition("__")
        assert f"{section}.{name}" in config_fields()


@pytest.mark.parametrize("page", ["docs/scaling.md"])
def test_the_guide_names_every_file_and_only_options_that_there_are(page: str) -> None:
    text = (ROOT / page).read_text()
    for path in [*MANIFESTS, *(EXAMPLES / script for script in SCRIPTS)]:
        assert path.relative_to(ROOT).as_posix() in text
    known = [parameter for command in (tune, evaluate) for parameter in command.params]
    options = {name for parameter in known for name in (*parameter.opts, *parameter.secondary_opts)}
    others = {"--array", "--nodes", "--from-literal", "--artifacts-destination"}  # sbatch's, kubectl's and MLflow's
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - others:
        assert option in options, option


def test_parsing_is_the_command_line_s_own() -> None:
    with pytest.raises(click.UsageError, match="No such option '--no-such-option'"):
        understood(["sparsetune", "tune", "--no-such-option"])
