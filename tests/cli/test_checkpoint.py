import json
from pathlib import Path

import pytest
import torch
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
    assert row.split()[1:] == ["cdf", "2/2", "0.6", "0.98", "-", "50", "raster"]


def test_show_as_json(folder: Path) -> None:
    shown = json.loads(run("show", str(folder), "--json").stdout)
    assert shown["manifest"]["base_model"] == "tiny"
    assert shown["policy"] == {
        "dense_fraction": 0.25,
        "drop_scale": [],
        "order": "raster",
        "keep_text": False,
        "select_partial": False,
        "cache": None,
    }
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
    assert printed.exit_code == 2
    assert printed.stderr.startswith("sparsetune: there is no checkpoint ")
    assert printed.stderr.count("\n") == 1


def sparge_file(path: Path, modules: list[str], num_heads: int) -> Path:
    columns = {"is_sparse": torch.ones(num_heads, dtype=torch.bool), "cdfthreshd": torch.full((num_heads,), 0.9)}
    columns |= {"simthreshd1": torch.full((num_heads,), 0.5), "pvthreshd": torch.full((num_heads,), 50.0)}
    torch.save(
        {f"{module}.inner_attention.{name}": value for module in modules for name, value in columns.items()}, path
    )
    return path


@pytest.mark.parametrize(
    ("model", "modules", "num_heads"),
    [
        ("cogvideox-2b", [f"transformer_blocks.{i}.attn1" for i in range(30)], 30),
        ("wan2.1-t2v-1.3b", [f"blocks.{i}.self_attn" for i in range(30)], 12),
        (
            "flux-dev",
            [f"{kind}transformer_blocks.{i}.attn" for kind, n in (("", 19), ("single_", 38)) for i in range(n)],
            24,
        ),
    ],
)
@pytest.mark.slow
def test_spargeattns_file_of_a_published_model_is_verified(
    tmp_path: Path, model: str, modules: list[str], num_heads: int
) -> None:
    file = sparge_file(tmp_path / "tuned.pt", modules, num_heads)
    printed = run("verify", str(file), "--model", model)
    assert printed.exit_code == 0, printed.stderr
    assert printed.stdout == f"{file} fits {model}: {len(modules)} layers, {len(modules) * num_heads} heads\n"


@pytest.mark.slow
def test_a_checkpoint_of_another_model_fails_verification(tmp_path: Path) -> None:
    file = sparge_file(tmp_path / "tuned.pt", [f"single_transformer_blocks.{i}.attn" for i in range(19)], 24)
    printed = run("verify", str(file), "--model", "flux-dev")
    assert printed.exit_code == 1
    assert "38 missing: transformer.transformer_blocks.0.attn" in printed.stderr


def test_diff_tells_what_sets_two_checkpoints_apart(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    save_checkpoint(Checkpoint(Policy.uniform(LAYERS), Manifest(tuner="manual")), other)
    assert run("diff", str(folder), str(other)).stdout == "dense_fraction: 0.25 -> 0.0\n"
    assert run("diff", str(folder), str(folder)).stdout == "the policies are the same\n"
    assert json.loads(run("diff", str(folder), str(other), "--json").stdout)["layers"] == []
