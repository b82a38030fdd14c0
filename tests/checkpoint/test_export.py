"""Exports; LightX2V itself needs a GPU to be imported, so its reading of the settings is repeated here."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from sparsetune.attention.policy import Policy
from sparsetune.attention.schedule import DenseSchedule
from sparsetune.attention.step_cache import StepCache
from sparsetune.attention.thresholds import HeadThresholds
from sparsetune.checkpoint import Checkpoint, Manifest, save_checkpoint
from sparsetune.checkpoint.export import export_lightx2v
from sparsetune.cli.main import main
from sparsetune.errors import CheckpointError

LAYERS = [(f"transformer.blocks.{index}.attn1", 2) for index in range(3)]
SERVED = Policy.uniform(LAYERS, HeadThresholds(-0.1, topk=0.3), keep_text=False)
WAN = Manifest(
    tuner="optuna", transformer_class="WanTransformer3DModel", num_frames=81, height=480, width=832,
    num_inference_steps=40, guidance_scale=5.0, metrics={"sparsity": 0.41},
)  # fmt: skip


def topk_of_lightx2v(settings: dict) -> float:
    """How `sparge_attn.py` and `transformer_weights.py` read a configuration (commit f8aee98)."""
    assert settings["self_attn_1_type"] == "sparge_attn"
    return 1 - settings["sparge_attn_setting"]["sparsity_ratio"]


def test_one_topk_for_all_is_exported_whole() -> None:
    found = export_lightx2v(Checkpoint(SERVED, WAN))
    assert found.lost == ()
    assert topk_of_lightx2v(found.settings) == pytest.approx(0.3)
    rest = {name: value for name, value in found.settings.items() if not name.startswith("s")}
    assert rest == {"infer_steps": 40, "target_video_length": 81, "target_height": 480, "target_width": 832}
    assert found.settings["sample_guide_scale"] == 5.0


@pytest.mark.parametrize(
    ("policy", "lost"),
    [
        (Policy.uniform(LAYERS, HeadThresholds(-0.1, cdfthreshd=0.9), keep_text=False), "cdfthreshd"),
        (Policy.uniform(LAYERS, HeadThresholds(0.3, topk=0.3), keep_text=False), "simthreshd1"),
        (replace(SERVED, layers=(SERVED.layers[0], *Policy.uniform(LAYERS[1:], HeadThresholds(-0.1, topk=0.5)).layers)),
         "2 values of topk"),
        (replace(SERVED, schedule=DenseSchedule(0.25)), "dense first steps (0.25 of all)"),
        (replace(SERVED, order="hilbert"), "token order hilbert"),
        (replace(SERVED, cache=StepCache("first_block", threshold=0.1)), "cache first_block"),
    ],
)  # fmt: skip
def test_a_loss_is_named_and_must_be_allowed(policy: Policy, lost: str) -> None:
    with pytest.raises(CheckpointError, match="one sparsity for all heads, layers and steps") as error:
        export_lightx2v(Checkpoint(policy, WAN))
    assert lost in str(error.value) and "--allow-loss" in str(error.value)
    found = export_lightx2v(Checkpoint(policy, WAN), allow_loss=True)
    assert any(one.startswith(lost) for one in found.lost)
    assert topk_of_lightx2v(found.settings) == pytest.approx(0.59)


def test_another_model_and_an_unknown_sparsity_are_refused() -> None:
    other = WAN.model_copy(update={"transformer_class": "CogVideoXTransformer3DModel"})
    with pytest.raises(CheckpointError, match="for Wan models, but the checkpoint is of CogVideoX"):
        export_lightx2v(Checkpoint(SERVED, other))
    several = replace(SERVED, layers=(replace(SERVED.layers[0], heads=(HeadThresholds(-0.1, topk=0.9),) * 2),
                                      *SERVED.layers[1:]))  # fmt: skip
    with pytest.raises(CheckpointError, match="sparsity isn't known"):
        export_lightx2v(Checkpoint(several, WAN.model_copy(update={"metrics": {}})), allow_loss=True)


def test_the_command_writes_a_file_or_prints(tmp_path: Path) -> None:
    folder = save_checkpoint(Checkpoint(SERVED, WAN), tmp_path / "served")
    command = ["checkpoint", "export", str(folder), "--to", "lightx2v"]
    printed = CliRunner().invoke(main, command)
    assert json.loads(printed.stdout)["sparge_attn_setting"] == {"sparsity_ratio": 0.7}
    target = tmp_path / "sparge.json"
    assert CliRunner().invoke(main, [*command, "-o", str(target)]).stdout == f"{target}\n"
    assert json.loads(target.read_text()) == json.loads(printed.stdout)
    lossy = save_checkpoint(Checkpoint(replace(SERVED, order="hilbert"), WAN), tmp_path / "lossy")
    command[2] = str(lossy)
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 1 and "lost: token order hilbert" in refused.stderr
    allowed = CliRunner().invoke(main, [*command, "--allow-loss"])
    assert "lost: token order hilbert" in allowed.stderr and json.loads(allowed.stdout)
