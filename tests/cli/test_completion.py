import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from sparsetune import metrics
from sparsetune.cli.main import main
from sparsetune.cli.options import options_table
from sparsetune.config.files import named_configs
from tests.cli.test_main import HEAVY
from tests.tracking.recorded import Place, World


def completed(*args: str) -> list[str]:
    """Complete the last argument."""
    shell = ShellComplete(main, {}, "sparsetune", "_SPARSETUNE_COMPLETE")
    return [item.value for item in shell.get_completions(list(args[:-1]), args[-1])]


@pytest.mark.parametrize(
    ("args", "found"),
    [
        (("tune", "--model", "cogvideox-2"), ["cogvideox-2b"]),
        (("models", "show", "demo-l"), ["demo-long"]),
        (("eval", "--metrics", "psnr,ms"), ["psnr,ms_ssim"]),
        (("eval", "--set", "gate.min_psnr_w"), ["gate.min_psnr_worst="]),
        (("eval", "--checkpoint", "res"), ["results/demo/checkpoint"]),
    ],
)
def test_names_are_completed(working_folder: Path, args: tuple[str, ...], found: list[str]) -> None:
    saved = working_folder / "results" / "demo" / "checkpoint"
    saved.mkdir(parents=True)
    (saved / "manifest.json").touch()
    assert completed(*args)[:1] == found


def test_runs_of_the_local_store_are_completed(
    shared_place: Place, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", shared_place.store.uri)
    run = world.champion.tuning[:8]
    for args in (("promote", run[:3]), ("compare", run[:3]), ("eval", "--checkpoint", run[:3])):
        assert run in completed(*args)
    assert completed("review", "la") == ["latest"]


def test_without_a_store_there_is_nothing_to_complete(working_folder: Path) -> None:
    assert completed("promote", "1") == []
    assert not list(working_folder.iterdir())


def test_the_names_are_those_that_exist() -> None:
    assert options_table()["model.source"]["names"] == list(named_configs())
    assert options_table()["eval.metrics"]["names"] == list(metrics.names())


def test_completion_loads_nothing_heavy(working_folder: Path) -> None:
    code = (
        "import sys\nfrom click.shell_completion import ShellComplete\nfrom sparsetune.cli.main import main\n"
        "shell = ShellComplete(main, {}, 'sparsetune', '_SPARSETUNE_COMPLETE')\n"
        "for args in (['tune', '--model'], ['eval', '--metrics'], ['promote']):\n"
        "    shell.get_completions(args, '')\n"
        f"sys.exit(str({HEAVY!r} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
