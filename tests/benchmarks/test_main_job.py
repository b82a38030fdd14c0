"""The row of the main job: the table of docs/benchmarks.md takes it as it is."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import main_job
from sparsetune.config import Config
from sparsetune.tuning.events import TuningResult
from tests.cli.test_tune import LOST, WON
from tests.docs.blocks import ROOT
from tests.report.synthetic import result_of

PAGE = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
DONE = dataclasses.replace(WON, evaluation=result_of(), before=result_of(), seconds_by_phase={"trials": 75.0})


def test_the_page_has_the_table_and_every_row_as_many_cells() -> None:
    section = PAGE.partition("## The main job, model by model\n")[2].partition("\n## ")[0]
    assert main_job.HEAD in section
    rows = section.partition(main_job.HEAD)[2].strip().splitlines()
    assert rows and {row.count(" | ") for row in rows} == {len(main_job.COLUMNS) - 1}


@pytest.mark.parametrize(("result", "gate"), [(DONE, "met"), (LOST, "no trial meets the gate")])
def test_the_command_writes_one_json_and_one_row(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], result: Any, gate: str
) -> None:
    asked: list[tuple[Config, Path]] = []

    def tune(config: Config, *, output_dir: Path) -> TuningResult:
        asked.append((config, output_dir))
        return result  # type: ignore[no-any-return]

    monkeypatch.setattr(main_job, "tune", tune)
    monkeypatch.setattr(main_job, "git_commit", lambda: "abcdef0123-dirty")
    monkeypatch.setenv("SPARSETUNE_TUNE__SEED", "7")  # another's settings don't count
    main_job.main(["--model", "cogvideox-2b", "--random-weights", "tiny", "--set", "tune.n_trials=2"])
    ((config, folder),) = asked
    assert (config.tune.seed, config.tune.n_trials, config.model.random_weights) == (42, 2, "tiny")
    found = json.loads((folder / "figures.json").read_text())
    row = (folder / "figures.md").read_text()
    assert row.startswith("| cogvideox-2b-tiny, tiny random weights, `tune.n_trials=2` | 9 × 128 × 192, 4 |")
    assert "abcdef0-dirty" in row and row.endswith(f" {gate} |\n")
    assert row.count(" | ") == len(main_job.COLUMNS) - 1 and main_job.HEAD + row in capsys.readouterr().out
    assert (found["tuned"] is None) == (result is LOST) and found["seeds"] == {"tune": 42, "eval": 42}
    if result is DONE:
        assert found["tuned"]["psnr"] == result_of().statistics["psnr"].mean and "trials 1:15" in row
