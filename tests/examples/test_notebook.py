"""The notebook of examples/ runs from its first cell to its last, with small settings."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.docs.blocks import ROOT

NOTEBOOK = json.loads((ROOT / "examples/tune.ipynb").read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
SMALL = {
    "GENERATION__NUM_FRAMES": "9",
    "GENERATION__NUM_INFERENCE_STEPS": "3",
    "TUNE__NUM_PROMPTS": "1",
    "TUNE__CALIBRATION_STEPS": "2",
    "TUNE__CACHES": "none",
    "GATE__MIN_PSNR": "20",
    "GATE__MIN_PSNR_WORST": "null",
    "TRACKING__ENABLED": "false",
}


def test_the_notebook_is_kept_without_outputs() -> None:
    assert [cell["outputs"] for cell in CODE] == [[]] * len(CODE)
    assert {cell["execution_count"] for cell in CODE} == {None}


def test_the_notebook_s_cells_run(working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setenv(f"SPARSETUNE_{name}", value)
    names: dict[str, Any] = {}
    for cell in CODE:
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert names["result"].best is not None and len(names["result"].trials) == 4
    assert names["defaults"].config.num_prompts == 2 and not names["defaults"].config.use_tuned
    assert names["result"].show() in list(Path("results/demo/evaluation/videos").iterdir())
    assert names["handle"].stats().sparsity > 0
