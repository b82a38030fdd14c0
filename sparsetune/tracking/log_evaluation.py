"""An evaluation as one MLflow run."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from sparsetune.attention.policy import Policy
from sparsetune.attention.thresholds import HeadThresholds
from sparsetune.checkpoint import load_checkpoint, save_checkpoint, summarize
from sparsetune.config.files import flatten
from sparsetune.evaluation.events import EvaluationEnded, EvaluationStarted, PromptDone
from sparsetune.evaluation.gain import hand_set_change
from sparsetune.evaluation.prompt import PromptResult
from sparsetune.evaluation.result import EvaluationResult, PromptRow
from sparsetune.files import scratch_folder
from sparsetune.metrics import BASE_METRICS
from sparsetune.metrics.gate import POOLED
from sparsetune.tracking.logged_model import log_checkpoint_model
from sparsetune.tracking.run_logger import RunLogger, prompt_set


def log_start(run: RunLogger, event: EvaluationStarted, *, with_model: bool) -> None:
    """Log configuration, prompts and checkpoint; `with_model` is off in a tuning, whose run has the model already."""
    run.log(params=flatten(event.config))
    run.log_inputs([prompt_set(event.prompts, event.config.get("prompt_file"), "evaluation")])
    path = event.config.get("tuned_path")
    if path is not None and Path(path).exists():
        log_checkpoint(run, Path(path), with_model=with_model)


def log_prompt(run: RunLogger, event: PromptDone) -> None:
    """Log a prompt with its number, from 1, as step, so that the UI plots it."""
    run.log(prompt_metrics(event.result), step=event.index + 1)
    if "compare" in event.videos:
        run.log_file(event.videos["compare"], "videos")


def log_end(run: RunLogger, event: EvaluationEnded) -> None:
    result = event.result
    tables: dict[str, list[dict[str, Any]]] = {
        "prompts.json": [_prompt_row(row) for row in result.detailed_results],
        "statistics.json": [{"metric": name, **one.model_dump()} for name, one in result.statistics.items()],
    }
    if result.sparsity.by_layer:
        tables["layers/sparsity_by_layer.json"] = [
            {"index": index, "layer": name, "sparsity": value}
            for index, (name, value) in enumerate(result.sparsity.by_layer.items())
        ]
    run.log(
        result_metrics(result),
        tags={
            "verdict": result.verdict,
            "gate": "passed" if result.gate.passed else "failed",
            "gate.failures": "; ".join(result.gate.failures) or None,
            "device": result.environment.device_name,
            "platform": result.environment.platform,
            "kernels": sorted(set(result.sparsity.kernels.values())),
        },
        tables=tables,
    )
    run.log_json(result.to_dict(), "result.json")
    if event.report_path is not None:
        report = event.report_path.read_text(encoding="utf-8")
        run.describe(f"{verdict_line(result)}\n\n{report}", event.report_path.name)
        run.log_file(event.report_path)
    for path in event.artifacts:
        if path.suffix == ".png":
            run.log_file(path, "stills")


def log_checkpoint(run: RunLogger, path: Path, *, with_model: bool) -> None:
    """Log a checkpoint of any form as the folder `checkpoint`; `with_model` logs it as one of MLflow's models too."""
    checkpoint = load_checkpoint(path)
    with scratch_folder() as folder:
        saved = save_checkpoint(checkpoint, folder / "checkpoint")
        run.log_file(saved, "checkpoint")
        if with_model:
            log_checkpoint_model(run.client, run.run_id, saved)
    run.log(tables=threshold_tables(checkpoint.policy))


def threshold_tables(policy: Policy) -> dict[str, list[dict[str, Any]]]:
    """Tables of a policy, by artifact name: not under the logged model's, where MLflow looks for the model's files."""
    names = tuple(field.name for field in fields(HeadThresholds))  # asdict copies deeply: 40 ms for 900 heads
    rows = [
        {"index": index, "head": number, **{name: getattr(head, name) for name in names}, "order": order,
         "layer": layer.name}
        for index, (layer, orders) in enumerate(zip(policy.layers, policy.head_orders, strict=True))
        for number, (head, order) in enumerate(zip(layer.heads, orders, strict=True))
    ]  # fmt: skip
    by_layer = [{"index": index, **asdict(layer)} for index, layer in enumerate(summarize(policy))]
    return {"layers/thresholds.json": rows, "layers/thresholds_by_layer.json": by_layer}


def prompt_metrics(result: PromptResult) -> dict[str, float | None]:
    """The figures of a prompt that the UI plots; the table `prompts.json` has all."""
    return {
        "prompt/psnr": result.metrics.get("psnr"),
        "prompt/frame_cosine": result.metrics.get("frame_cosine"),
        "prompt/sparsity": result.sparsity,
        "prompt/seconds_sparse": result.seconds_sparse,
    }


def result_metrics(result: EvaluationResult) -> dict[str, float | None]:
    """An evaluation's metrics, at most 40 with those of prompts; its tables have all statistics and layers."""
    metrics: dict[str, float | None] = {f"{name}/mean": one.mean for name, one in result.statistics.items()}
    for name in BASE_METRICS:
        if (one := result.statistics.get(name)) is not None:
            metrics |= {f"{name}/max": one.max} if one.higher_is_better is False else {f"{name}/min": one.min}
    pooled = (one.measured for one in result.gate.conditions if one.name == POOLED)
    sparsity, at_gate = result.sparsity, None if result.hand_set is None else result.hand_set.at_gate
    return metrics | {
        "psnr/pooled": next(pooled, None),
        "sparsity/overall": sparsity.overall,
        "sparsity/active": sparsity.active,
        "blocks_run": sparsity.blocks_run,
        "attention_computed": sparsity.attention_computed,
        "score": result.overall_score,
        "gate_passed": float(result.gate.passed),
        "identical_prompts": float(result.gate.num_identical),
        "failed_prompts": float(len(result.failed)),
        "speedup/measured": sparsity.measured_speedup,
        "speedup/theoretical": sparsity.theoretical_speedup,
        "denoising/dense": None if result.seconds is None else result.seconds.dense,
        "denoising/sparse": None if result.seconds is None else result.seconds.sparse,
        "seconds/dense": sparsity.seconds_dense,
        "seconds/sparse": sparsity.seconds_sparse,
        "seconds/total": result.environment.seconds_total,
        "hand_set/psnr_change": hand_set_change(result),
        "hand_set/attention_saved": None if at_gate is None else at_gate.sparsity,
    }


def verdict_line(result: EvaluationResult) -> str:
    gate = "passed" if result.gate.passed else f"failed ({'; '.join(result.gate.failures)})"
    psnr = result.statistics.get("psnr")
    figures = f", PSNR {psnr.mean:.2f} dB, worst {psnr.min:.2f}" if psnr else ""
    speed = "" if result.seconds is None else f"{result.seconds.speedup:.2f} times as fast as dense, "
    sparsity = "–" if result.sparsity.overall is None else f"{result.sparsity.overall:.3g}"
    return f"{speed}{result.verdict}, gate {gate}, sparsity {sparsity}{figures}."


def _prompt_row(row: PromptRow) -> dict[str, Any]:
    values = {"number": row.index + 1, **row.model_dump(mode="json", exclude={"index"})}
    return {name: value for name, value in values.items() if not isinstance(value, Mapping | list)}
