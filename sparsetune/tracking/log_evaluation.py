"""An evaluation as one MLflow run."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsetune.attention.policy import Policy
from sparsetune.attention.thresholds import HeadThresholds
from sparsetune.checkpoint import load_checkpoint, save_checkpoint, summarize
from sparsetune.config.files import flatten
from sparsetune.evaluation.events import EvaluationEnded, EvaluationStarted, PromptDone
from sparsetune.evaluation.gain import hand_set_change, saved_attention
from sparsetune.evaluation.prompt import PromptResult
from sparsetune.evaluation.result import EvaluationResult, PromptRow
from sparsetune.files import scratch_folder
from sparsetune.metrics.gate import POOLED
from sparsetune.tracking.logged_model import log_checkpoint_model
from sparsetune.tracking.run_logger import RunLogger, metric_entries, prompt_set

if TYPE_CHECKING:
    from mlflow.entities import Metric


def log_start(run: RunLogger, event: EvaluationStarted, *, with_model: bool) -> None:
    """Log configuration, prompts and checkpoint; `with_model` is off in a tuning, whose run has the model already."""
    run.log(params=flatten(event.config))
    run.log_inputs([prompt_set(event.prompts, event.config.get("prompt_file"), "evaluation")])
    path = event.config.get("tuned_path")
    if path is not None and Path(path).exists():
        log_checkpoint(run, Path(path), with_model=with_model)


def log_prompt(run: RunLogger, event: PromptDone) -> None:
    """Log a prompt with its index as step, so that the UI plots it."""
    run.log(prompt_metrics(event.result), step=event.index)
    if "compare" in event.videos:
        run.log_file(event.videos["compare"], "videos")


def log_end(run: RunLogger, event: EvaluationEnded) -> None:
    result = event.result
    tables = {"prompts.json": [_prompt_row(row) for row in result.detailed_results]}
    if result.sparsity.by_layer:
        tables["sparsity_by_layer.json"] = [
            {"index": index, "layer": name, "sparsity": value}
            for index, (name, value) in enumerate(result.sparsity.by_layer.items())
        ]
    run.log(
        [*metric_entries(result_metrics(result)), *by_layer("sparsity", result.sparsity.by_layer.values())],
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
        run.describe(event.report_path.read_text(encoding="utf-8"), event.report_path.name)
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
    tables = threshold_tables(checkpoint.policy) | {"thresholds_by_layer.json": summary_rows(checkpoint.policy)}
    run.log(threshold_metrics(checkpoint.policy), tables=tables)


def threshold_tables(policy: Policy) -> dict[str, list[dict[str, Any]]]:
    names = tuple(field.name for field in fields(HeadThresholds))  # asdict copies deeply: 40 ms for 900 heads
    rows = [
        {"index": index, "head": number, **{name: getattr(head, name) for name in names}, "order": order,
         "layer": layer.name}
        for index, (layer, orders) in enumerate(zip(policy.layers, policy.head_orders, strict=True))
        for number, (head, order) in enumerate(zip(layer.heads, orders, strict=True))
    ]  # fmt: skip
    return {"thresholds.json": rows}


def summary_rows(policy: Policy) -> list[dict[str, Any]]:
    return [{"index": index, **asdict(layer)} for index, layer in enumerate(summarize(policy))]


def threshold_metrics(policy: Policy) -> "list[Metric]":
    """Each layer's mean thresholds as metrics, e.g. `layers/cdfthreshd`, with the layer as step."""
    rows = summary_rows(policy)
    names = ("sparse_heads", "simthreshd1", "cdfthreshd", "topk", "pvthreshd")
    return [entry for name in names for entry in by_layer(name, [row[name] for row in rows])]


def by_layer(name: str, values: Iterable[float | None]) -> "list[Metric]":
    """Return one metric `layers/NAME` with the layers, in the policy's order, as its steps: the UI plots a line."""
    return [entry for step, value in enumerate(values) for entry in metric_entries({f"layers/{name}": value}, step)]


def prompt_metrics(result: PromptResult) -> dict[str, float | None]:
    metrics: dict[str, float | None] = {f"prompt/{name}": value for name, value in result.metrics.items()}
    return metrics | {
        "prompt/sparsity": result.sparsity,
        "prompt/seconds_dense": result.seconds_dense,
        "prompt/seconds_sparse": result.seconds_sparse,
    }


def result_metrics(result: EvaluationResult) -> dict[str, float | None]:
    metrics: dict[str, float | None] = {
        f"{name}/{statistic}": getattr(summary, statistic)
        for name, summary in result.statistics.items()
        for statistic in ("mean", "std", "min", "max", "ci95_low", "ci95_high")
    }
    pooled = (one.measured for one in result.gate.conditions if one.name == POOLED)
    metrics["psnr/pooled"] = next(pooled, None)
    sparsity, at_gate = result.sparsity, None if result.hand_set is None else result.hand_set.at_gate
    metrics |= sparsity_metrics(sparsity.overall, sparsity.active, sparsity.by_layer)
    return metrics | {
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
        "attention_saved": saved_attention(result),
    }


def sparsity_metrics(
    overall: float | None, active: float | None, by_layer: Mapping[str, float]
) -> dict[str, float | None]:
    """Number layers in the policy's order, `sparsity/layer_00`; the table `sparsity_by_layer.json` has their names."""
    metrics: dict[str, float | None] = {"sparsity/overall": overall, "sparsity/active": active}
    width = max(2, len(str(len(by_layer) - 1)))
    return metrics | {f"sparsity/layer_{index:0{width}d}": value for index, value in enumerate(by_layer.values())}


def _prompt_row(row: PromptRow) -> dict[str, Any]:
    values = row.model_dump(mode="json")
    return {name: value for name, value in values.items() if not isinstance(value, Mapping | list)}
