"""Synthetic results and searches of any size, for reports without a model."""

from pathlib import Path
from typing import Any

import numpy as np

from sparsetune.evaluation.result import EvaluationResult
from sparsetune.report.source import Files, Source
from sparsetune.tuning.record import TuningRecord
from sparsetune.video import Frames, side_by_side, write_video
from tests.tracking.conftest import make_result

NUM_FRAMES = 17
NUM_STEPS = 10
HOSTILE = "</script><script>alert(1)</script><!-- \u2028 {{ 7 * 7 }} & \"'"
"""A prompt with markup that breaks a page without escaping."""


def result_of(
    num_prompts: int = 3, num_layers: int = 4, num_heads: int = 3, variant: int = 0, **config: Any
) -> EvaluationResult:
    """A result with everything that a report can show; prompt 0 contains markup, the last one failed.

    Variants differ in their numbers.
    """
    draw = np.random.default_rng(variant)
    value = make_result(tuple(draw.uniform(30.0, 42.0, num_prompts))).to_dict()
    layers = [f"transformer.transformer_blocks.{index}.attn1" for index in range(num_layers)]
    steps = draw.uniform(0.0, 0.6, (num_layers, NUM_STEPS)).tolist()
    value["sparsity"] |= {
        "by_layer": {name: float(np.mean(row)) for name, row in zip(layers, steps, strict=True)},
        "by_layer_and_step": dict(zip(layers, steps, strict=True)),
        "by_head": {name: draw.uniform(0.0, 0.7, num_heads).tolist() for name in layers},
    }
    value["thresholds"] = [
        {
            "name": name, "rule": "cdf", "num_heads": num_heads, "sparse_heads": num_heads, "simthreshd1": -0.5,
            "cdfthreshd": float(draw.uniform(0.8, 1.0)), "topk": None, "pvthreshd": 50.0,
        }
        for name in layers
    ]  # fmt: skip
    for row in value["detailed_results"]:
        frames = draw.uniform(row["psnr"] - 3.0, row["psnr"] + 3.0, NUM_FRAMES)
        row |= {"psnr_per_frame": frames.tolist(), "worst_frame": int(frames.argmin()), "seconds_sparse": 2.0}
        row["yardsticks"] = {
            name: {"dense": {"psnr": psnr, "ssim": 0.9}, "sparse": {"psnr": psnr - 1.0}}
            for name, psnr in (("kernel", 27.0), ("steps=50", 20.0))
        }
        row["ladder"] = {"dense_again": {"psnr": 60.0}, "kernel": {"psnr": 45.0}}
    value["detailed_results"][0]["prompt"] = HOSTILE
    last = value["detailed_results"][-1]
    value["detailed_results"][-1] = {
        "index": last["index"],
        "prompt": "a black hole",
        "seed": 42,
        "error": "black frames",
    }
    value["config"] |= {"num_frames": NUM_FRAMES, "height": 64, "width": 64, **config}
    bound = {"name": "mean psnr", "unit": "dB", "measured": 38.0, "bound": 35.0, "met": True}
    value["gate"] = {"passed": True, "failures": [], "conditions": [bound]}
    return EvaluationResult.model_validate(value)


def record_of(
    num_trials: int = 12, before: EvaluationResult | None = None, after: EvaluationResult | None = None
) -> TuningRecord:
    """A search whose trials have every state; the winner is the sparsest that meets the gate."""
    draw = np.random.default_rng(1)
    trials = [_trial(number, float(draw.uniform(0.02, 0.6)), draw) for number in range(num_trials)]
    feasible = [trial for trial in trials if trial["feasible"]]
    best = max(feasible, key=lambda trial: float(trial["sparsity"]))["number"] if feasible else None
    return TuningRecord.model_validate(
        {
            "study_name": "demo-12345678",
            "created": "2026-11-22T10:00:00+00:00",
            "config": {"model": {"name": "demo", "source": "demo"}, "tune": {"n_trials": num_trials}},
            "trials": trials,
            "best": best,
            "closest": None,
            "interrupted": False,
            "seconds": 210.0,
            "seconds_by_phase": {"calibration": 18.0, "sensitivity": 47.0, "trials": 76.0, "evaluation": 69.0},
            "insight": {"rank_correlation": -0.9, "importances": {"l1": 0.7, "order": 0.3}},
            "before": before,
            "evaluation": after,
        }
    )


def source_of(folder: Path | None = None, num_prompts: int = 3, num_trials: int = 12) -> Source:
    """A tuning with its two evaluations; with a folder also their videos, from `coded_frames`."""
    after, before = result_of(num_prompts), result_of(num_prompts, variant=9, use_tuned=False)
    record = record_of(num_trials, before, after)
    files = [write_videos(folder / side, num_prompts) if folder else Files() for side in ("evaluation", "before")]
    return Source("demo", after, before, record, *files)


def write_videos(folder: Path, num_prompts: int) -> Files:
    """Write side-by-side videos, the same for every prompt."""
    videos = {index: folder / "videos" / f"prompt_{index}_compare.mp4" for index in range(num_prompts)}
    dense, sparse = coded_frames()
    write_video(videos[0], side_by_side(dense, sparse), 8)
    for path in list(videos.values())[1:]:
        path.write_bytes(videos[0].read_bytes())
    return Files(videos)


def coded_frames() -> tuple[Frames, Frames]:
    """Two videos whose grey level encodes the frame: 10 + 12 t in the dense one, 4 more in the sparse one."""
    grey = (10 + 12 * np.arange(NUM_FRAMES, dtype=np.uint8))[:, None, None, None]
    dense = np.broadcast_to(grey, (NUM_FRAMES, 64, 64, 3)).copy()
    return dense, dense + np.uint8(4)


def _trial(number: int, sparsity: float, draw: np.random.Generator) -> dict[str, Any]:
    psnr = 60.0 - 50.0 * sparsity + float(draw.normal())
    state = ("complete", "complete", "complete", "pruned", "failed")[number % 5]
    rendered = state != "failed"
    return {
        "number": number,
        "params": {"l1": sparsity / 10, "order": "hilbert", "keep_text": True},
        "state": state,
        "reason": None if state == "complete" else "hopeless" if rendered else "black frames",
        "sparsity": sparsity if rendered else None,
        "psnr": psnr if rendered else None,
        "psnr_worst": psnr - 2.0 if rendered else None,
        "frame_cosine": 0.99 if rendered else None,
        "feasible": state == "complete" and psnr > 38.0,
        "seconds": 10.0,
        "seconds_sparse": 2.0 if rendered else None,
        "predicted_error": sparsity**2 if rendered else None,
    }
