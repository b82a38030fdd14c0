"""Exports, against what the engines read.

Their own parsers can't run here: importing SGLang's `server_args.py` or xDiT's `config/args.py` imports their whole
packages with their GPU kernels, and LightX2V reads its configuration where it builds kernels. So `SGLANG` is a JSON
Schema of the fields that SGLang reads, `xdit_parser` has xDiT's options with their types, and `topk_of_lightx2v`
repeats LightX2V's arithmetic. docs/export.md names commits and files.
"""

import argparse
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner

from sparsetune.attention.policy import Policy
from sparsetune.attention.schedule import DenseSchedule
from sparsetune.attention.step_cache import StepCache
from sparsetune.attention.thresholds import HeadThresholds
from sparsetune.checkpoint import Checkpoint, Manifest, save_checkpoint
from sparsetune.checkpoint.export import ENGINES, NOT_EXPORTED, export
from sparsetune.cli.main import main
from sparsetune.errors import CheckpointError

LAYERS = [(f"transformer.blocks.{index}.attn1", 2) for index in range(3)]
SERVED = Policy.uniform(LAYERS, HeadThresholds(-0.1, topk=0.3), keep_text=False)
PAIR = Policy.uniform(LAYERS, HeadThresholds(-0.1, cdfthreshd=0.9), keep_text=False)
WAN = Manifest(
    tuner="optuna", transformer_class="WanTransformer3DModel", num_frames=81, height=480, width=832,
    num_inference_steps=4, guidance_scale=5.0, flow_shift=3.0, metrics={"sparsity": 0.41},
    hand_set=((0.5, 0.999, 0.2), (0.5, 0.96, 0.4), (0.5, 0.92, 0.42)),
)  # fmt: skip
COGVIDEOX = WAN.model_copy(update={"transformer_class": "CogVideoXTransformer3DModel"})

SGLANG = {
    "type": "object",
    "required": ["attention_backend", "attention_backend_config"],
    "additionalProperties": False,
    "properties": {
        "attention_backend": {"const": "sparge_attn"},
        "attention_backend_config": {
            "type": "object",
            "required": ["topk"],
            "additionalProperties": False,
            "properties": {"topk": {"type": "number", "exclusiveMinimum": 0, "maximum": 1}},
        },
        **{name: {"type": "integer"} for name in ("num_frames", "height", "width", "num_inference_steps")},
        "guidance_scale": {"type": "number"},
    },
}


def xdit_parser() -> argparse.ArgumentParser:
    """The options of `xFuserArgs.add_runner_args` that are exported (commit 175e0bf); unknown ones are an error."""
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    for name in ("height", "width", "num_frames", "num_inference_steps"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("guidance_scale", "guidance_scale_2", "flow_shift", "spargeattn_simthreshold"):
        parser.add_argument(f"--{name}", type=float)
    parser.add_argument("--spargeattn_cdfthreshold", type=float, default=0.92)
    for name in ("attention_backend", "cross_attention_backend", "hybrid_attn_schedule"):
        parser.add_argument(f"--{name}", type=str)
    parser.add_argument("--use_hybrid_attn_schedule", action="store_true")
    for name in ("spargeattn_reorder_sequence", "use_spargeattn_static_block_mask"):
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=True)
    return parser


def read_xdit(text: str) -> argparse.Namespace:
    args = xdit_parser().parse_args(shlex.split(text))
    # What its create_config and its models refuse.
    assert (args.attention_backend is None) == args.use_hybrid_attn_schedule
    assert args.cross_attention_backend == "sdpa"
    return args


def topk_of_lightx2v(text: str) -> float:
    """How `sparge_attn.py` and `transformer_weights.py` read a configuration (commit f8aee98)."""
    settings = json.loads(text)
    assert settings["self_attn_1_type"] == "sparge_attn"
    return 1 - settings["sparge_attn_setting"]["sparsity_ratio"]


def topk_of_sglang(text: str) -> float:
    settings = json.loads(text)
    jsonschema.validate(settings, SGLANG)
    return float(settings["attention_backend_config"]["topk"])


TOPK = {"lightx2v": topk_of_lightx2v, "sglang": topk_of_sglang}


@pytest.mark.parametrize("engine", TOPK)
def test_one_topk_for_all_is_exported_whole(engine: str) -> None:
    found = export(Checkpoint(SERVED, WAN), engine)
    assert found.lost == ()
    assert found.differs == f"{ENGINES[engine].name} doesn't always compute the first key block"
    assert TOPK[engine](found.text) == pytest.approx(0.3)
    calibrated = Policy.uniform(LAYERS, HeadThresholds(-1.0, topk=0.3))  # what a search with topk makes
    assert export(Checkpoint(calibrated, WAN), engine) == found


def test_what_it_was_tuned_for_has_the_engines_names() -> None:
    lightx2v = json.loads(export(Checkpoint(SERVED, WAN), "lightx2v").text)
    assert lightx2v | {"sparge_attn_setting": None} == {
        "infer_steps": 4, "target_video_length": 81, "target_height": 480, "target_width": 832,
        "sample_guide_scale": 5.0, "self_attn_1_type": "sparge_attn", "sparge_attn_setting": None,
    }  # fmt: skip
    sglang = json.loads(export(Checkpoint(SERVED, WAN), "sglang").text)
    assert sglang["num_inference_steps"] == 4 and sglang["guidance_scale"] == 5.0
    xdit = read_xdit(export(Checkpoint(PAIR, WAN), "xdit", allow_loss=True).text)
    assert (xdit.num_frames, xdit.height, xdit.width, xdit.flow_shift) == (81, 480, 832, 3.0)


@pytest.mark.parametrize("engine", TOPK)
@pytest.mark.parametrize(
    ("policy", "lost"),
    [
        (PAIR, "cdfthreshd"),
        (Policy.uniform(LAYERS, HeadThresholds(0.3, topk=0.3), keep_text=False), "simthreshd1"),
        (replace(SERVED, layers=(SERVED.layers[0], *Policy.uniform(LAYERS[1:], HeadThresholds(-0.1, topk=0.5)).layers)),
         "2 values of topk"),
        (replace(SERVED, schedule=DenseSchedule(0.25)), "dense first steps (0.25 of all)"),
        (replace(SERVED, order="hilbert"), "token order hilbert"),
        (replace(SERVED, cache=StepCache("first_block", threshold=0.1)), "cache first_block"),
    ],
)  # fmt: skip
def test_a_loss_is_named_and_must_be_allowed(engine: str, policy: Policy, lost: str) -> None:
    with pytest.raises(CheckpointError, match="for all heads, layers and steps, so videos would differ") as error:
        export(Checkpoint(policy, WAN), engine)
    assert lost in str(error.value) and "--allow-loss" in str(error.value)
    found = export(Checkpoint(policy, WAN), engine, allow_loss=True)
    assert any(one.startswith(lost) for one in found.lost)
    assert TOPK[engine](found.text) == pytest.approx(0.59)


def test_text_that_is_always_computed_is_lost_only_where_attention_has_text() -> None:
    keeping = replace(SERVED, keep_text=True)
    found = export(Checkpoint(keeping, COGVIDEOX), "sglang", allow_loss=True)
    assert found.lost == ("keep_text",) and found.differs == ""
    assert export(Checkpoint(keeping, WAN), "sglang").lost == ()


def test_xdit_gets_one_pair_of_thresholds_in_raster_order_though_in_other_blocks() -> None:
    with pytest.raises(CheckpointError, match=r"lost: SpargeAttn's blocks \(xDiT's are of 256 × 256 tokens\); use"):
        export(Checkpoint(PAIR, WAN), "xdit")
    found = export(Checkpoint(PAIR, WAN), "xdit", allow_loss=True)
    args = read_xdit(found.text)
    assert (args.spargeattn_simthreshold, args.spargeattn_cdfthreshold) == (-0.1, 0.9)
    assert args.attention_backend == "flex_block_sparge"
    assert not args.spargeattn_reorder_sequence and not args.use_spargeattn_static_block_mask


@pytest.mark.parametrize(
    ("guidance", "schedule", "expected"),
    [
        (1.0, DenseSchedule(0.5), "sdpa,sdpa,flex_block_sparge,flex_block_sparge"),
        (1.0, DenseSchedule(0.0, (0.0, 1.0, 1.0, 0.0)), "sdpa,flex_block_sparge,flex_block_sparge,sdpa"),
        (5.0, DenseSchedule(0.25), ",".join(["sdpa"] * 2 + ["flex_block_sparge"] * 6)),
    ],
)
def test_dense_steps_become_xdits_schedule_of_transformer_calls(
    guidance: float, schedule: DenseSchedule, expected: str
) -> None:
    manifest = WAN.model_copy(update={"guidance_scale": guidance})
    found = export(Checkpoint(replace(PAIR, schedule=schedule), manifest), "xdit", allow_loss=True)
    assert read_xdit(found.text).hybrid_attn_schedule == expected
    assert found.lost == ("SpargeAttn's blocks (xDiT's are of 256 × 256 tokens)",)


def test_thresholds_by_head_become_for_xdit_the_hand_set_pair_of_the_same_sparsity() -> None:
    heads = (HeadThresholds(0.2, cdfthreshd=0.9), HeadThresholds(0.2, cdfthreshd=0.8))
    layers = (replace(PAIR.layers[0], heads=heads), *PAIR.layers[1:])
    policy = replace(PAIR, layers=layers, schedule=DenseSchedule(0.25))
    found = export(Checkpoint(policy, WAN), "xdit", allow_loss=True)
    assert "3 pairs of thresholds" in found.lost and "dense steps" in found.lost
    args = read_xdit(found.text)
    # Sparsity 0.41 lies midway between two pairs that drop 0.04 and 0.08: 0.04 · √2 is dropped.
    assert args.spargeattn_cdfthreshold == pytest.approx(1 - 0.04 * 2**0.5, abs=1e-4)
    assert (args.spargeattn_simthreshold, args.attention_backend) == (0.5, "flex_block_sparge")
    without = WAN.model_copy(update={"hand_set": ()})
    with pytest.raises(CheckpointError, match="no pair of thresholds for all heads"):
        export(Checkpoint(policy, without), "xdit", allow_loss=True)


def test_steps_that_xdit_cannot_know_are_refused() -> None:
    manifest = WAN.model_copy(update={"num_inference_steps": None})
    with pytest.raises(CheckpointError, match="steps or guidance aren't known"):
        export(Checkpoint(replace(PAIR, schedule=DenseSchedule(0.5)), manifest), "xdit", allow_loss=True)


@pytest.mark.parametrize(("engine", "kind"), [
    ("lightx2v", "CogVideoXTransformer3DModel"),
    ("xdit", "WanVACETransformer3DModel"),  # without `supports_sparge_attention_backends`
])  # fmt: skip
def test_another_model_is_refused(engine: str, kind: str) -> None:
    other = WAN.model_copy(update={"transformer_class": kind})
    with pytest.raises(CheckpointError, match=f"for Wan models, but the checkpoint is of {kind}"):
        export(Checkpoint(SERVED, other), engine, allow_loss=True)


def test_an_unknown_sparsity_is_refused() -> None:
    several = replace(SERVED, layers=(replace(SERVED.layers[0], heads=(HeadThresholds(-0.1, topk=0.9),) * 2),
                                      *SERVED.layers[1:]))  # fmt: skip
    with pytest.raises(CheckpointError, match="sparsity isn't known"):
        export(Checkpoint(several, WAN.model_copy(update={"metrics": {}})), "lightx2v", allow_loss=True)


def invoke(*args: Any) -> Any:
    return CliRunner().invoke(main, ["checkpoint", "export", *map(str, args)])


@pytest.mark.parametrize(
    ("engine", "advice"),
    [("diffusers", "sparsetune.sparsify"), ("tensorrt-llm", "Sol-Attn"), ("comfyui", "SLA")],
)
def test_engines_without_the_rule_say_why(engine: str, advice: str, tmp_path: Path) -> None:
    assert engine in NOT_EXPORTED
    folder = save_checkpoint(Checkpoint(SERVED, WAN), tmp_path / "served")
    refused = invoke(folder, "--to", engine, "--allow-loss")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert advice in refused.stderr and refused.stderr.count("\n") == 1


def test_the_command_writes_a_file_or_prints(tmp_path: Path) -> None:
    folder = save_checkpoint(Checkpoint(SERVED, WAN), tmp_path / "served")
    printed = invoke(folder, "--to", "lightx2v")
    assert json.loads(printed.stdout)["sparge_attn_setting"] == {"sparsity_ratio": 0.7}
    assert "LightX2V doesn't always compute the first key block" in printed.stderr
    target = tmp_path / "sparge.json"
    assert invoke(folder, "--to", "lightx2v", "-o", target).stdout == f"{target}\n"
    assert target.read_text() == printed.stdout
    lossy = save_checkpoint(Checkpoint(replace(SERVED, order="hilbert"), WAN), tmp_path / "lossy")
    refused = invoke(lossy, "--to", "lightx2v")
    assert refused.exit_code == 1 and "lost: token order hilbert" in refused.stderr
    allowed = invoke(lossy, "--to", "lightx2v", "--allow-loss")
    assert "lost: token order hilbert" in allowed.stderr and json.loads(allowed.stdout)
    arguments = invoke(save_checkpoint(Checkpoint(PAIR, WAN), tmp_path / "pair"), "--to", "xdit", "--allow-loss")
    assert read_xdit(arguments.stdout).spargeattn_cdfthreshold == 0.9


def test_the_choices_are_the_engines() -> None:
    command = main.get_command(None, "checkpoint").commands["export"]  # type: ignore[arg-type,union-attr]
    option = next(param for param in command.params if param.name == "engine")
    assert set(option.type.choices) == set(ENGINES) | set(NOT_EXPORTED)
