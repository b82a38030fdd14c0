"""What reads files or SQLite, and what refuses its options, imports neither PyTorch nor MLflow, which take seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint.test_storage import make_checkpoint, save_checkpoint
from tests.report.synthetic import result_of
from tests.tracking.recorded import Place, World

SLOW = {
    "huggingface_hub",
    "torch",
    "mlflow",
    "transformers",
    "diffusers",
    "optuna",
    "sqlalchemy",
    "scipy.stats",
    "pandas",
    "plotly",
}
PROBE = f"""
import sys
from sparsetune.cli.main import main
try:
    main(sys.argv[1:])
finally:
    print("loaded:", *sorted({SLOW!r} & set(sys.modules)), file=sys.stderr)
"""


def run(*args: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a new interpreter, and check that it imported nothing slow."""
    done = subprocess.run([sys.executable, "-c", PROBE, *args], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "loaded:", done.stderr
    return done


def test_runs_are_read_from_sqlite(shared_place: Place, world: World) -> None:
    listed = run("runs", "--tracking-uri", shared_place.store.uri)
    assert listed.returncode == 0
    assert world.champion.tuning[:8] in listed.stdout
    assert "demo-sparse@champion" in listed.stdout


def test_runs_of_a_store_that_isnt_there_are_none_and_none_is_made(working_folder: Path) -> None:
    done = run("runs")
    assert done.returncode == 0
    assert "no runs are recorded" in done.stderr
    assert not list(working_folder.iterdir())


def test_results_are_compared(tmp_path: Path) -> None:
    for name in ("before", "after"):
        (tmp_path / f"{name}.json").write_text(result_of().model_dump_json())
    done = run("compare", str(tmp_path / "before.json"), str(tmp_path / "after.json"))
    assert "psnr" in done.stdout


def test_a_checkpoint_is_shown(tmp_path: Path) -> None:
    folder = save_checkpoint(make_checkpoint(), tmp_path / "tuned")
    assert "simthreshd1" in run("checkpoint", "show", str(folder)).stdout


@pytest.mark.parametrize(
    ("args", "found"),
    [(("models",), "cogvideox-2b"), (("models", "show", "cogvideox-2b"), "tokens: 17776"), (("doctor",), "ready")],
)
def test_models_and_machine_are_shown(working_folder: Path, args: tuple[str, ...], found: str) -> None:
    assert found in run(*args).stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("tune", "--n-trials", "0"), "--n-trials must be greater than 0, got 0"),
        (("tune", "--model", "cogvideo-2b"), "unknown model cogvideo-2b; did you mean cogvideox-2b?"),
        (("eval", "--metrics", "psnrr"), "unknown metric 'psnrr'; choose from psnr"),
        (("eval", "--prompt-file", "prompt.txt"), "No such file or directory; did you mean prompts.txt?"),
        (("eval", "--checkpoint", "./tunde"), "there is no checkpoint tunde; did you mean tuned?"),
    ],
)
def test_wrong_names_are_told_with_the_nearest_and_status_2(
    working_folder: Path, args: tuple[str, ...], message: str
) -> None:
    (working_folder / "tuned").mkdir()
    (working_folder / "prompts.txt").touch()
    done = run(*args)
    assert done.returncode == 2
    assert message in done.stderr
