import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from sparsetune.attention.policy import Policy
from sparsetune.attention.schedule import DenseSchedule
from sparsetune.checkpoint import Checkpoint, Manifest, load_checkpoint, save_checkpoint
from sparsetune.cli.main import main

LAYERS = (("transformer.transformer_blocks.0.attn1", 2), ("transformer.transformer_blocks.1.attn1", 2))


def run(*args: str) -> Result:
    return CliRunner().invoke(main, ["checkpoint", *args])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    policy = Policy.uniform(LAYERS, schedule=DenseSchedule(0.25))
    return save_checkpoint(Checkpoint(policy, Manifest(tuner="manual", base_model="tiny")), tmp_path / "checkpoint")


def test_show_prints_manifest_rules_and_layers(folder: Path) -> None:
    printed = run("show", str(folder))
    assert printed.exit_code == 0
    assert "tuner: manual\n" in printed.stdout
    assert "dense_fraction: 0.25\n" in printed.stdout
    assert "base_revision" not in printed.stdout
    row = next(line for line in printed.stdout.splitlines() if line.startswith(LAYERS[1][0]))
    assert row.split()[1:] == ["cdf", "2/2", "0.6", "0.98", "-", "50"]


def test_show_as_json(folder: Path) -> None:
    shown = json.loads(run("show", str(folder), "--json").stdout)
    assert shown["manifest"]["base_model"] == "tiny"
    assert shown["policy"] == {"dense_fraction": 0.25, "order": "raster", "keep_text": False}
    assert [layer["name"] for layer in shown["layers"]] == [name for name, _ in LAYERS]


def test_convert_refuses_what_the_format_cannot_hold_unless_allowed(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "tuned.pt"
    refused = run("convert", str(folder), str(target))
    assert refused.exit_code == 1
    assert not target.exists()
    assert run("convert", str(folder), str(target), "--allow-loss").stdout == f"{target}\n"
    assert load_checkpoint(target).policy.layers == load_checkpoint(folder).policy.layers


def test_missing_checkpoint_is_one_line(tmp_path: Path) -> None:
    printed = run("show", str(tmp_path / "none"))
    assert printed.exit_code == 1
    assert printed.stderr.startswith("sparsetune: a checkpoint must be a folder")
    assert printed.stderr.count("\n") == 1
