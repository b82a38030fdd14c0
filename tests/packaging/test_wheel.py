"""The built packages: their contents, and tuning with an installed wheel outside the repository."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
QUICK = (
    "--n-trials=2",
    "--min-psnr=30",
    "--caches=none",
    "--num-prompts=1",
    "--num-eval-prompts=1",
    "--calibration-steps=1",
    "--probe-prompts=0",
)
SMALL = ("--num-inference-steps=3",)


@dataclass(frozen=True)
class Built:
    """A wheel, and the source distribution that it was built from."""

    wheel: Path
    sdist: Path


@dataclass(frozen=True)
class Installed:
    """A virtual environment with the wheel, and an empty folder to work in."""

    python: Path
    folder: Path

    def run(self, *command: str) -> str:
        """Run a command of the environment; fail unless it succeeds. Return its stdout."""
        hidden = ("PYTHONPATH", "MLFLOW_TRACKING_URI")
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        environment |= {"SPARSETUNE_CACHE__DIR": str(self.folder / "cache"), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]  # the wheel is built of the sdist
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return Built(wheel, sdist)


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Install only the wheel; its dependencies are found in the environment of the tests.

    A path in a .pth file comes after the environment's own packages and has its own .pth files ignored, the editable
    installation's among them: so sparsetune can only be the wheel's.
    """
    root = tmp_path_factory.mktemp("installed")
    environment = root / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "-q"]
    subprocess.run([*pip, str(built.wheel)], check=True)
    packages = Path(_printed(python, "import sysconfig; print(sysconfig.get_path('purelib'))"))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    folder = root / "elsewhere"
    folder.mkdir()
    return Installed(python, folder)


def _printed(python: Path, code: str) -> str:
    return subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_the_wheel_has_weights_configurations_prompts_schema_and_types(built: Built) -> None:
    names = set(zipfile.ZipFile(built.wheel).namelist())
    files = {path.relative_to(ROOT) for path in (ROOT / "sparsetune").rglob("*") if path.is_file()}
    wanted = {path.as_posix() for path in files if path.suffix != ".pyc"}
    configs = {path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*") if path.is_file()}
    assert wanted | {f"sparsetune/_{path.as_posix()}" for path in configs} <= names
    assert {"sparsetune/py.typed", "sparsetune/evaluation/result.schema.json"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "docs/", "tools/"))]


def test_the_wheel_says_what_it_is(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        (metadata,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        about = Parser().parsestr(wheel.read(metadata).decode())
    assert about["License-Expression"] == "Apache-2.0" and about["Description-Content-Type"] == "text/markdown"
    assert {"lpips", "ray", "report"} <= set(about.get_all("Provides-Extra") or [])


def test_the_source_distribution_can_be_worked_on(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = ("Makefile", "constraints.txt", "mkdocs.yml", "README.md", "README.zh-CN.md", "CITATION.cff", "LICENSE")
    folders = ("tests/conftest.py", "docs/index.md", "examples/custom_metric.py", "tools/docs/hooks.py")
    assert {*wanted, *folders, "configs/demo.yaml", "Dockerfile", ".dockerignore"} <= names


def test_the_main_job_works_from_the_wheel(installed: Installed) -> None:
    home = installed.run(str(installed.python), "-c", "import sparsetune; print(sparsetune.__file__)").strip()
    assert home.startswith(str(installed.python.parents[1]))
    sparsetune = str(installed.python.parent / "sparsetune")
    tuned = json.loads(installed.run(sparsetune, "tune", "--model", "demo", *QUICK, *SMALL, "--json"))
    assert tuned["checkpoint_path"] == "results/demo/checkpoint"
    options = ("--use-tuned", "--num-prompts=1", "--json")
    result = json.loads(installed.run(sparsetune, "eval", "--model", "demo", *options, *SMALL))
    assert result["config"]["use_tuned"] and result["detailed_results"][0]["psnr"] > 20
    assert (installed.folder / "results/demo/eval/videos/prompt_0_compare.mp4").is_file()
