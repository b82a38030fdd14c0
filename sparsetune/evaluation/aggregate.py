"""Aggregation of prompt results into the sections of an evaluation's result."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sparsetune.bench.step_time import StepTimes
from sparsetune.evaluation.prompt import PromptResult
from sparsetune.evaluation.result import (
    GateSection,
    MetricStatistics,
    PromptRow,
    Rung,
    SecondsSection,
    SparsitySection,
    YardstickSection,
)
from sparsetune.metrics import Gate, get, relative_error, summarize

_COUNTERS = ("by_layer", "by_layer_and_step", "by_head", "kernels", "num_calls", "fallbacks")


def prompt_row(
    index: int,
    result: PromptResult,
    ladder: Mapping[Rung, Mapping[str, float]] | None = None,
    psnr_per_frame: Sequence[float] | None = None,
    yardsticks: Mapping[str, YardstickSection] | None = None,
    unavailable: Mapping[str, str] | None = None,
) -> PromptRow:
    values: dict[str, Any] = {
        "index": index,
        "prompt": result.prompt,
        "seed": result.seed,
        **result.metrics,
        "sparsity": _fraction(result.sparsity),
        "sparsity_active": _fraction(result.sparsity_active),
        "seconds_dense": result.seconds_dense,
        "seconds_sparse": result.seconds_sparse,
        "denoising_dense": result.denoising_dense,
        "denoising_sparse": result.denoising_sparse,
        "dense_cached": result.dense_cached,
        "worst_frame": None if psnr_per_frame is None else psnr_per_frame.index(min(psnr_per_frame)),
        "psnr_per_frame": psnr_per_frame,
        "error": result.error,
        "unavailable": {**result.unavailable, **(unavailable or {})},
        "ladder": ladder,
        "yardsticks": yardsticks or {},
    }
    return PromptRow.model_validate(values)


def statistics(rows: Sequence[PromptRow]) -> dict[str, MetricStatistics]:
    columns: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.metrics.items():
            columns.setdefault(name, []).append(value)
    metrics = {name: get(name) for name in columns}
    return {
        name: MetricStatistics(**asdict(summarize(columns[name])), unit=one.unit, higher_is_better=one.higher_is_better)
        for name, one in metrics.items()
    }


def gate_section(gate: Gate, rows: Sequence[PromptRow]) -> GateSection:
    measured = [row.metrics for row in rows if row.error is None]
    checked = gate.check(measured, num_failed=len(rows) - len(measured))  # a failed prompt fails it
    return GateSection.model_validate(checked.to_dict())


def sparsity_section(results: Sequence[PromptResult], seconds: SecondsSection | None) -> SparsitySection:
    counted = [result.stats for result in results if result.stats is not None]
    dense = _mean([result.seconds_dense for result in results if result.seconds_dense is not None])
    sparse = _mean([result.seconds_sparse for result in results if result.seconds_sparse is not None])
    merged = counted[0].merged(counted[1:]) if counted else None
    overall = _fraction(merged.sparsity) if merged else None
    return SparsitySection(
        overall=overall,
        active=_fraction(merged.sparsity_active) if merged else None,
        theoretical_speedup=None if overall is None or overall == 1.0 else 1.0 / (1.0 - overall),
        measured_speedup=None if seconds is None else seconds.speedup,
        seconds_dense=dense,
        seconds_sparse=sparse,
        blocks_run=merged.blocks_run if merged else None,
        attention_computed=_fraction(merged.attention_computed) if merged else None,
        blocks_run_by_step=merged.blocks_run_by_step if merged else (),
        by_step=merged.by_step if merged else (),
        **{name: getattr(merged, name) if merged else {} for name in _COUNTERS},
    )


def seconds_section(results: Sequence[PromptResult], step: StepTimes | None) -> SecondsSection | None:
    """Compare the denoising's seconds; `step` has the share of attention. None where nothing was timed."""
    pairs = [
        (result.denoising_dense, result.denoising_sparse)
        for result in results
        if result.denoising_dense and result.denoising_sparse
    ]
    if not pairs or step is None:
        return None
    dense, sparse = (summarize(column) for column in zip(*pairs, strict=True))
    speedups = [result.speedup for result in results if result.speedup is not None]
    speedup = summarize(speedups)
    return SecondsSection(
        dense=dense.mean,
        sparse=sparse.mean,
        speedup=dense.mean / sparse.mean,
        ci95_low=speedup.ci95_low,
        ci95_high=speedup.ci95_high,
        lowest=speedup.min,
        noise=relative_error(speedups) or 0.0,
        attention_share=min(max(step.attention_share, 0.0), 1.0),
        ceiling=step.ceiling,
    )


def _fraction(value: float | None) -> float | None:
    return None if value is None else min(max(value, 0.0), 1.0)  # rounding errors


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
