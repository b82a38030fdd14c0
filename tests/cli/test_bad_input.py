"""Errors of the commands: one line, the right exit code, no partial output."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from sparsetune.attention.policy import Policy
from sparsetune.checkpoint import Checkpoint, Manifest, save_checkpoint
from sparsetune.cli.main import main
from sparsetune.models.demo import WEIGHTS
from sparsetune.video import write_video

SMALL = ("--num-frames", "9", "--num-inference-steps", "2", "--num-prompts", "1", "--no-track")


def run(*args: str, status: int) -> Result:
    result = CliRunner().invoke(main, list(args))
    assert result.exit_code == status, result.output
    return result


def fails(message: str, *args: str, status: int) -> None:
    """Run a command that must end with one line that holds `message`."""
    result = run(*args, status=status)
    (line_printed,) = (line for line in result.stderr.splitlines() if line.startswith("sparsetune: "))
    assert message in line_printed
    assert "unexpected" not in line_printed
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (("--num-prompts", "0"), 2, "the number of prompts must be from 1 to the 2 that prompts.txt holds, got 0"),
        (("--num-prompts", "3"), 2, "the number of prompts must be from 1 to the 2 that prompts.txt holds, got 3"),
        (("--prompt-file", "empty.txt"), 2, "the prompt file empty.txt is empty"),
        (("--prompt-file", "none.txt"), 2, "cannot read the prompt file none.txt: No such file"),
        (("--num-inference-steps", "0"), 2, "sparsetune: --num-inference-steps must be "),
        (("--num-frames", "10"), 2, "num_frames must be a multiple of 8 plus 1, got 10; the nearest is 9"),
        (("--height", "60"), 2, "height must be a multiple of 8, got 60; the nearest is 64"),
        (("--use-tuned",), 2, "there is no checkpoint results/demo/checkpoint; check the path"),
        (("--checkpoint", "other"), 1, "don't match the model's 8 self-attention layers"),
        (("--metrics", "psnrr"), 2, "unknown metric 'psnrr'; choose from psnr"),
        (("--metric-module", "none.py"), 2, "no metric module at none.py"),
        (("--model", "no/such/folder"), 2, "there is no folder no/such/folder"),
        (("--offload", "model"), 1, "--offload model needs a CUDA GPU"),
        (("--output-dir", "prompts.txt/out"), 1, "cannot write"),
    ],
)
def test_eval_says_in_one_line_what_cant_be_done(
    working_folder: Path, args: tuple[str, ...], status: int, message: str
) -> None:
    if torch.cuda.is_available() and "--offload" in args:
        pytest.skip("a GPU can offload")
    (working_folder / "prompts.txt").write_text("a red circle\na blue star\n")
    (working_folder / "empty.txt").write_text("# nothing\n")
    other = Policy.uniform([("transformer.transformer_blocks.0.attn1", 4)])
    save_checkpoint(Checkpoint(other, Manifest(tuner="manual")), working_folder / "other")
    before = sorted(working_folder.rglob("*"))
    fails(message, "eval", *SMALL, "--prompt-file", "prompts.txt", *args, status=status)
    written = set(working_folder.rglob("*")) - set(before)
    assert not [path for path in written if path.is_file()]


def test_nan_frames_are_a_failed_prompt_and_nothing_rendered_is_a_failure(working_folder: Path) -> None:
    model = shutil.copytree(WEIGHTS, working_folder / "broken")
    (weights,) = (model / "transformer").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["proj_out.weight"].fill_(float("nan"))
    save_file(tensors, weights)
    args = ("--config", "demo", "--model", "./broken", "--output-dir", "out", "--cache-dir", "cache")
    result = run("eval", *SMALL, *args, status=1)
    assert "gate to deploy: not met: 1 of 1 prompts failed to render" in result.stdout
    assert result.stderr.splitlines()[-1].startswith(
        "sparsetune: all 1 prompts failed, the first with: the model returned NaN"
    )
    assert not (working_folder / "out" / "videos").exists()
    assert not list((working_folder / "cache").glob("*.npz"))


@pytest.fixture
def films(working_folder: Path) -> Path:
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), dtype=np.uint8)
    write_video(working_folder / "whole.mp4", frames, 8)
    write_video(working_folder / "short.mp4", frames[:4], 8)
    write_video(working_folder / "small.mp4", frames[:, :16], 8)
    write_video(working_folder / "slow.mp4", frames, 4)
    content = (working_folder / "whole.mp4").read_bytes()
    (working_folder / "cut.mp4").write_bytes(content[: len(content) // 2])
    (working_folder / "empty.mp4").write_bytes(b"")
    (working_folder / "text.mp4").write_text("not a video\n" * 100)
    return working_folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short.mp4", "got 5 frames in whole.mp4 and 4 frames in short.mp4"),
        ("small.mp4", "got 48x32 pixels in whole.mp4 and 48x16 pixels in small.mp4"),
        ("cut.mp4", "cut.mp4 is truncated"),
        ("empty.mp4", "ffmpeg can't decode empty.mp4"),
        ("text.mp4", "ffmpeg can't decode text.mp4"),
        ("none.mp4", "no video file or folder at none.mp4"),
        (".", "whole.mp4 is a file and . a folder"),
    ],
)
def test_metrics_says_in_one_line_what_cant_be_compared(films: Path, name: str, message: str) -> None:
    fails(message, "metrics", "whole.mp4", name, status=2 if name == "none.mp4" else 1)


def test_another_frame_rate_is_said_and_refused_when_strict(films: Path) -> None:
    printed = run("metrics", "whole.mp4", "slow.mp4", "--metrics", "psnr", status=0).stdout
    assert "warning: whole.mp4: dense and sparse differ in frame rate (8 and 4)\n" in printed
    fails(
        "whole.mp4 and slow.mp4 differ in frame rate (8 and 4)",
        "metrics",
        "whole.mp4",
        "slow.mp4",
        "--strict",
        status=1,
    )


def test_frames_that_only_one_has_are_left_out_on_request_and_that_is_said(films: Path) -> None:
    printed = run("metrics", "whole.mp4", "short.mp4", "--align", "shortest", status=0).stdout
    assert "only the first 4 frames were compared; dense has 5, sparse 4" in printed


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ("none", "there is no result none; run `sparsetune eval`"),
        ("text.json", "cannot read text.json"),
        ("other.json", "other.json must be the JSON of sparsetune's evaluation with schema_version 1, got None"),
        ("folder", "folder must hold one *_accuracy_*.json file, found none"),
    ],
)
def test_compare_says_in_one_line_what_is_no_result(working_folder: Path, after: str, message: str) -> None:
    (working_folder / "folder").mkdir()
    (working_folder / "text.json").write_text("no JSON")
    (working_folder / "other.json").write_text("{}")
    fails(message, "compare", after, after, status=2 if after == "none" else 1)
