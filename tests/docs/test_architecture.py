"""docs/architecture.md: paths exist, layers are import-linter's, and a common change touches at most three files."""

import re
import tomllib
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from sparsetune import metrics
from sparsetune.attention.backends import BACKENDS
from sparsetune.config import models
from sparsetune.evaluation.videos import compare_videos
from sparsetune.metrics import registry
from sparsetune.video import write_video
from tests.docs.blocks import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
CHANGES = ("a metric", "a backend", "a model family", "a tuner", "an option", "a tracked value")


def section(title: str) -> str:
    return PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]


def rows(title: str) -> list[list[str]]:
    """Return the cells of each row of a section's table, without its header."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def paths(text: str) -> list[str]:
    return re.findall(r"`((?:sparsetune|configs)/[\w./]+)`", text)


def test_each_step_of_a_candidate_names_a_module_that_exists() -> None:
    named = [paths(cells[1]) for cells in rows("How one candidate is processed")]
    assert all(named) and named[0] == ["sparsetune/tuning/search/run.py"]
    assert [path for step in named for path in step if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("change", CHANGES)
def test_a_common_change_touches_at_most_three_files(change: str) -> None:
    edited = paths(dict(rows("Six common changes"))[change])
    assert 1 <= len(edited) <= 3
    for path in map(Path, edited):
        assert (ROOT / (path.parent if path.stem == "NAME" else path)).exists(), path


def test_the_page_and_the_contributing_guide_have_the_layers_of_the_import_contract() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = project["tool"]["importlinter"]["contracts"][0]
    layers = [layer.split(" : ") for layer in contract["layers"]]
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\d+\. (.*?):? *(?:\(|$|—)", contributing, re.MULTILINE)
    assert [set(re.findall(r"`(\w+)`", line)) for line in listed] == [set(layer) for layer in layers]
    named = {name for cells in rows("The packages") for name in re.findall(r"`(\w+)`", cells[0])}
    assert named == {name for layer in layers for name in layer}


@pytest.mark.parametrize("change", CHANGES)
def test_the_names_to_edit_are_in_the_files_to_edit(change: str) -> None:
    cell = dict(rows("Six common changes"))[change]
    texts = "".join(path.read_text("utf-8") for path in map(ROOT.joinpath, paths(cell)) if path.is_file())
    names = re.findall(r"`@?(\w+)`", cell)
    assert [name for name in names if not re.search(rf"\b{name}\b", texts)] == []


def test_a_backend_is_named_twice() -> None:
    assert get_args(models.Backend) == BACKENDS


def test_a_metric_is_added_by_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    (tmp_path / "brightness.py").write_text(
        "from sparsetune.metrics import metric\n\n\n"
        '@metric(higher_is_better=False, unit="levels", range=(0.0, 255.0))\n'
        "def brightness_shift(dense, sparse):\n"
        '    "Absolute difference of the mean pixel values."\n'
        "    return abs(float(dense.mean()) - float(sparse.mean()))\n"
    )
    metrics.import_metrics([str(tmp_path / "brightness.py")])
    for side, level in (("dense", 100), ("sparse", 110)):
        (tmp_path / side).mkdir()
        write_video(tmp_path / side / "clip.mp4", np.full((5, 64, 64, 3), level, dtype=np.uint8), fps=8)
    (pair,) = compare_videos(
        tmp_path / "dense", tmp_path / "sparse", names=("psnr", "brightness_shift"), gate=metrics.Gate()
    ).pairs
    assert pair.metrics["brightness_shift"] == pytest.approx(10, abs=1)
