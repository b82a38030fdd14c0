"""An evaluation as one MLflow run."""

import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparsetune.attention.policy import Policy
from sparsetune.checkpoint import load_checkpoint, save_checkpoint, summarize
from sparsetune.evaluation.events import EvaluationEnded, EvaluationStarted, PromptDone
from sparsetune.evaluation.pair import PromptResult
from sparsetune.evaluation.result import EvaluationResult, PromptRow
from sparsetune.tracking.runs import Run, flatten


def log_start(run: Run, event: EvaluationStarted) -> None:
    """Write what was asked for: the result's `config` as parameters, and the checkpoint judged."""
    run.log(params=flatten(event.config))
    path = event.config.get("tuned_path")
    if path is not None and Path(path).exists():
        log_checkpoint(run, Path(path))


def log_prompt(run: Run, event: PromptDone) -> None:
    """Write a prompt's metrics at its index as step, so that the UI draws them, and its side-by-side video."""
    run.log(prompt_metrics(event.result), step=event.index)
    if "compare" in event.videos:
        run.log_file(event.videos["compare"], "videos")


def log_end(run: Run, event: EvaluationEnded) -> None:
    """Write the statistics, verdict, gate and sparsity, and the files of the evaluation."""
    result = event.result
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
    )
    tables = {"prompts.json": [_prompt_row(row) for row in result.detailed_results]}
    if result.sparsity.by_layer:
        tables["sparsity_by_layer.json"] = layer_rows(result.sparsity.by_layer)
    run.log_tables(tables)
    if event.result_path is None:
        run.log_json(result.to_dict(), "result.json")
    else:
        run.log_file(event.result_path)
    if event.report_path is not None:
        run.describe(event.report_path.read_text(encoding="utf-8"), event.report_path.name)
        run.log_file(event.report_path)
    for path in event.artifacts:
        if path.suffix == ".png":
            run.log_file(path, "stills")


def log_checkpoint(run: Run, path: Path) -> None:
    """Write a checkpoint, whatever form it has, as the artifact folder `checkpoint` with a table of its layers."""
    checkpoint = load_checkpoint(path)
    with tempfile.TemporaryDirectory() as folder:
        run.log_file(save_checkpoint(checkpoint, Path(folder) / "checkpoint"), "checkpoint")
    run.log_tables({"thresholds.json": threshold_rows(checkpoint.policy)})


def threshold_rows(policy: Policy) -> list[dict[str, Any]]:
    """Make a table of a policy's layers, with mean thresholds."""
    return [asdict(layer) for layer in summarize(policy)]


def prompt_metrics(result: PromptResult) -> dict[str, float | None]:
    """Name one prompt's numbers as metrics, e.g. `prompt/psnr`."""
    metrics: dict[str, float | None] = {f"prompt/{name}": value for name, value in result.metrics.items()}
    return metrics | {
        "prompt/sparsity": result.sparsity,
        "prompt/seconds_dense": result.seconds_dense,
        "prompt/seconds_sparse": result.seconds_sparse,
    }


def result_metrics(result: EvaluationResult) -> dict[str, float | None]:
    """Name a whole evaluation's numbers as metrics, e.g. `psnr/mean` and `sparsity/overall`."""
    metrics: dict[str, float | None] = {
        f"{name}/{statistic}": getattr(summary, statistic)
        for name, summary in result.statistics.items()
        for statistic in ("mean", "std", "min", "max", "ci95_low", "ci95_high")
    }
    sparsity = result.sparsity
    metrics |= sparsity_metrics(sparsity.overall, sparsity.active, sparsity.by_layer)
    return metrics | {
        "score": result.overall_score,
        "gate_passed": float(result.gate.passed),
        "failed_prompts": float(len(result.failed)),
        "speedup/theoretical": sparsity.theoretical_speedup,
        "speedup/measured": sparsity.measured_speedup,
        "seconds/dense": sparsity.seconds_dense,
        "seconds/sparse": sparsity.seconds_sparse,
        "seconds/total": result.environment.seconds_total,
    }


def sparsity_metrics(
    overall: float | None, active: float | None, by_layer: Mapping[str, float]
) -> dict[str, float | None]:
    """Name sparsity as metrics: `sparsity/overall`, `sparsity/active`, `sparsity/layer_00` and so on.

    Layers are numbered in the policy's order; the table `sparsity_by_layer.json` has their names.
    """
    metrics: dict[str, float | None] = {"sparsity/overall": overall, "sparsity/active": active}
    width = max(2, len(str(len(by_layer) - 1)))
    return metrics | {f"sparsity/layer_{index:0{width}d}": value for index, value in enumerate(by_layer.values())}


def layer_rows(by_layer: Mapping[str, float]) -> list[dict[str, Any]]:
    """Make a table of the sparsity of each layer, numbered as in the metrics."""
    return [{"index": index, "layer": name, "sparsity": value} for index, (name, value) in enumerate(by_layer.items())]


def _prompt_row(row: PromptRow) -> dict[str, Any]:
    values = row.model_dump(mode="json")
    return {name: value for name, value in values.items() if not isinstance(value, Mapping)}
