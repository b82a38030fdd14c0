"""Results as text: tables, score, verdict, gate, and figures in a line."""

import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import click
from rich.box import Box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from sparsetune.cli.console import coloured_status
from sparsetune.metrics import interval_caveat, registry

if TYPE_CHECKING:
    from sparsetune.checkpoint import LayerSummary, PolicyDifference
    from sparsetune.evaluation.compare import Comparison
    from sparsetune.evaluation.prompt import PromptResult
    from sparsetune.evaluation.result import EvaluationResult, MetricStatistics
    from sparsetune.evaluation.videos import VideoComparison
    from sparsetune.metrics import Summary as MetricSummary
    from sparsetune.report.summary import Summary
    from sparsetune.tuning.events import TrialResult


Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Column heads, and rows of as many cells."""


def print_table(table: Table) -> None:
    click.echo(table_text(table))


def summary_text(parts: "Summary") -> str:
    return "\n".join(part if isinstance(part, str) else table_text(part) for part in parts)


def table_text(table: Table) -> str:
    """Format a table, text left and numbers right.

    On a terminal where it is too wide, heads and text are folded between words; where that isn't enough, columns of
    text but the first are left out, the widest first, and named in a line below. Numbers and the first column stay
    whole.
    """
    head, rows = table
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _WHOLE
    columns = [_column(name, [row[place] for row in rows], is_first=place == 0) for place, name in enumerate(head)]
    left_out = []
    while not (fitting := _fitted(columns, width)) and any(one.may_go for one in columns):
        left_out.append(max((one for one in columns if one.may_go), key=lambda one: one.least))
        columns.remove(left_out[-1])
    widths, gap = fitting or ([None] * len(columns), _GAPS[-1])
    shown = RichTable(box=_RULED, show_edge=False, pad_edge=False, padding=(0, gap - 1, 0, 0), header_style="")
    for one, column_width in zip(columns, widths, strict=True):
        justify: Literal["left", "right"] = "left" if one.is_text else "right"
        shown.add_column(Text(one.name), justify=justify, overflow="fold", width=column_width)
    for cells in zip(*(one.cells for one in columns), strict=True):
        shown.add_row(*map(Text.from_ansi, cells))
    console = Console(width=width, force_terminal=True, color_system="standard", no_color=False, legacy_windows=False)
    with console.capture() as captured:
        console.print(shown)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    names = [one.name for one in left_out if one.name]
    lines += [f"in a wider terminal also: {', '.join(names)}"] if names else []
    return "\n".join(lines)


@dataclass(frozen=True)
class _Column:
    name: str
    cells: Sequence[str]
    is_text: bool
    may_go: bool
    most: int  # widths in columns of the terminal: unfolded, and folded between words
    least: int


def _column(name: str, cells: Sequence[str], *, is_first: bool) -> _Column:
    plain = [click.unstyle(cell) for cell in cells]
    is_text = is_first or not all(map(_NUMBER.match, plain))
    words = name.split() + (plain if is_first or not is_text else [word for cell in plain for word in cell.split()])
    most, least = (max(map(cell_len, texts), default=0) for texts in ([name, *plain], words))
    return _Column(name, cells, is_text, is_text and not is_first, most, least)


def _fitted(columns: Sequence[_Column], width: int) -> tuple[Sequence[int | None], int] | None:
    """Return the columns' widths and the gap between them; None where the table can't be made so narrow."""
    for gap in _GAPS:
        widths = [one.most for one in columns]
        while (excess := sum(widths) + gap * (len(widths) - 1) - width) > 0:
            place = max(range(len(widths)), key=lambda place: widths[place] - columns[place].least)
            if widths[place] == columns[place].least:
                break
            widths[place] = max(columns[place].least, widths[place] - max(1, excess // len(widths)))
        else:
            return widths, gap
    return None


_RULED = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
_NUMBER = re.compile(r"[-+<>~]?\.?\d|-?$")
_WHOLE = 10_000
_GAPS = (2, 1)
"""Spaces between columns: where there is room, and where there isn't."""


def unit_of(name: str) -> str:
    """Return the unit of a metric; empty if it has none or is not registered in this process."""
    return registry.get(name).unit if name in registry.names() else ""


def value_text(value: float, unit: str, scale: float = 0.0) -> str:
    """Format a value without unit; `scale`, the row's largest, gives all its values as many decimals."""
    return f"{value:.2f}" if unit == "dB" or max(abs(value), abs(scale)) >= 10 else f"{value:.6f}"


def metric_text(name: str, value: float) -> str:
    unit = unit_of(name)
    return f"{name} {value_text(value, unit)}" + (f" {unit}" if unit else "")


def number_text(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def clock_text(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def figures_text(sparsity: float | None, psnr: float | None, worst: float | None = None) -> str:
    if sparsity is None or psnr is None:
        return "nothing measured"
    return f"sparsity {sparsity:.3f}, psnr {psnr:.2f} dB" + ("" if worst is None else f" (worst {worst:.2f})")


def trial_text(trial: "TrialResult") -> str:
    speed = "" if trial.speedup is None else f"{trial.speedup:.2f} times as fast as dense, "
    if trial.blocks_run is not None and trial.blocks_run < 1.0:
        speed += f"{trial.blocks_run:.0%} of the blocks run, "
    return speed + figures_text(trial.sparsity, trial.psnr, trial.psnr_worst)


def outcome_text(trial: "TrialResult") -> str:
    if trial.state != "complete":
        return f"{trial.state}: {trial.reason}"
    return f"{trial_text(trial)}, {'meets the gate' if trial.feasible else 'misses the gate'}"


_SHORT = ("psnr", "frame_cosine")


def prompt_text(result: "PromptResult", verbose: bool = False) -> str:
    """Format a prompt's psnr and frame_cosine, or all its metrics, with sparsity and seconds."""
    if result.error is not None:
        return f"failed: {result.error}"
    names = result.metrics if verbose else [name for name in _SHORT if name in result.metrics]
    parts = [metric_text(name, result.metrics[name]) for name in names]
    if result.sparsity is not None:
        parts.append(f"sparsity {result.sparsity:.3f}")
    if result.seconds_dense is not None and result.seconds_sparse is not None:
        dense = "cached" if result.dense_cached else f"{result.seconds_dense:.1f} s"
        parts.append(f"dense {dense}, sparse {result.seconds_sparse:.1f} s")
    return ", ".join(parts)


def statistics_table(statistics: "Mapping[str, MetricStatistics] | Mapping[str, MetricSummary]") -> Table:
    rows = []
    for name, one in statistics.items():
        unit = unit_of(name)
        scale = max(abs(one.min), abs(one.max))
        cells = [
            "-" if value is None else value_text(value, unit, scale) for value in (one.mean, one.std, one.min, one.max)
        ]
        interval = "-"
        if one.ci95_low is not None and one.ci95_high is not None:
            interval = f"{value_text(one.ci95_low, unit, scale)} .. {value_text(one.ci95_high, unit, scale)}"
        rows.append([f"{name} ({unit})" if unit else name, *cells, interval])
    return ("metric", "mean", "std", "min", "max", "95% interval"), rows


def brief_lines(result: "EvaluationResult") -> list[str]:
    """Gain, quality, gate and what went wrong; `evaluation_text` has the details."""
    from sparsetune.evaluation.report_markdown import seconds_text, verdict_text

    psnr, cosine, sparsity = result.statistics.get("psnr"), result.statistics.get("frame_cosine"), result.sparsity
    if result.config.use_tuned:
        lines = gain_lines(result)
    else:
        lines = [] if sparsity.overall is None else [f"sparsity {sparsity.overall:.3f} over all attention calls"]
        lines += [] if result.seconds is None else [seconds_text(result.seconds)]
    if psnr is not None:
        num_prompts = len(result.detailed_results) - len(result.failed)
        prompts = "1 prompt" if num_prompts == 1 else f"{num_prompts} prompts"
        in_table = result.config.use_tuned and result.hand_set is None  # each figure once
        mean = f"worst psnr {psnr.min:.2f} dB" if in_table else f"psnr {psnr.mean:.2f} dB (worst {psnr.min:.2f})"
        similar = "" if cosine is None else f", frame_cosine {cosine.mean:.6f}"
        lines.append(f"quality: {mean}{similar} over {prompts}")
    lines += ladder_lines(result) + yardstick_lines(result)
    lines += [f"score {coloured_status(result.verdict, verdict_text(result))}", gate_line(result.gate.failures)]
    if sparsity.fallbacks:
        lines.append(f"fell back to dense: {sum(sparsity.fallbacks.values())} calls; -v has the reasons")
    return lines + _trouble_lines(result)


def _trouble_lines(result: "EvaluationResult") -> list[str]:
    lines = [f"failed: prompt {row.index + 1} ({row.prompt}): {row.error}" for row in result.failed]
    if count := len(result.config.prompts_in_tune_set):
        lines.append(f"warning: {count} of these prompts were used for tuning, which inflates the result")
    return lines


def evaluation_text(result: "EvaluationResult") -> str:
    from sparsetune.evaluation.report_markdown import (
        cache_text,
        pooled_text,
        seconds_text,
        verdict_text,
    )

    lines = [*gain_lines(result), ""] if result.config.use_tuned else []
    lines += [table_text(statistics_table(result.statistics)), ""] if result.statistics else []
    if (pooled := pooled_text(result)) is not None:
        lines.append(pooled)
    if result.seconds is not None:
        lines.append(seconds_text(result.seconds))
    if (cached := cache_text(result)) is not None:
        lines.append(cached)
    sparsity = result.sparsity
    if sparsity.overall is not None:
        speed = sparsity.theoretical_speedup
        lines.append(
            f"sparsity {sparsity.overall:.3f} over all attention calls"
            + (f", theoretical attention speed-up {speed:.2f}x" if speed is not None else "")
        )
    if sparsity.fallbacks:
        reasons = ", ".join(f"{count} calls, {reason}" for reason, count in sparsity.fallbacks.items())
        lines.append(f"fell back to dense: {reasons}")
    lines += ladder_lines(result)
    lines += yardstick_lines(result)
    lines += [f"score {coloured_status(result.verdict, verdict_text(result))}", gate_line(result.gate.failures)]
    lines += _trouble_lines(result)
    lines += unavailable_lines(row.unavailable for row in result.detailed_results)
    lines += caveat_lines(len(result.detailed_results) - len(result.failed))
    return "\n".join(lines)


def gain_lines(result: "EvaluationResult") -> list[str]:
    from sparsetune.evaluation.gain import gain_notes, gain_table

    return [table_text(gain_table(result)), *gain_notes(result)]


def comparison_text(comparison: "VideoComparison") -> str:
    lines = [table_text(statistics_table(comparison.statistics)), ""]
    lines.append(f"score {comparison.score}/100, {coloured_status(comparison.verdict)}")
    if comparison.gate is not None:
        lines.append(gate_line(comparison.gate.failures))
    lines += unavailable_lines(pair.unavailable for pair in comparison.pairs)
    lines += caveat_lines(len(comparison.pairs))
    lines += [
        f"{pair.name}: only the first {pair.num_frames} frames were compared; dense has {pair.num_frames_dense}, "
        f"sparse {pair.num_frames_sparse}"
        for pair in comparison.pairs
        if pair.num_frames_dense != pair.num_frames_sparse
    ]
    lines += [f"warning: {pair.name}: {note}" for pair in comparison.pairs for note in pair.notes]
    return "\n".join([*lines, f"note: {comparison.note}"])


def ladder_lines(result: "EvaluationResult") -> list[str]:
    from sparsetune.evaluation.ladder import attribute

    found = attribute(result.detailed_results)
    if found is None:
        return []
    names = {"dense_again": "noise", "kernel": "kernel at sparsity 0", "policy": "policy"}
    parts = [
        f"{name} {found.psnr[rung]:.2f} dB" + (f" ({found.shares[rung]:.1%})" if found.shares else "")
        for rung, name in names.items()
    ]
    return [f"error sources: {', '.join(parts)}"]


def yardstick_lines(result: "EvaluationResult") -> list[str]:
    from sparsetune.evaluation.report_markdown import YARDSTICK_HEADS, yardstick_rows
    from sparsetune.evaluation.yardsticks import place_text, placed

    found = placed(result)
    return ["", table_text((YARDSTICK_HEADS, yardstick_rows(found))), place_text(found)] if found else []


def caveat_lines(num_prompts: int) -> list[str]:
    caveat = interval_caveat(num_prompts)
    return [f"note: {caveat}"] if caveat else []


def gate_line(failures: Sequence[str]) -> str:
    if failures:
        return f"gate to deploy: {coloured_status('not met')}: {'; '.join(failures)}"
    return f"gate to deploy: {coloured_status('passed')} on metrics; human review still required"


def unavailable_lines(rows: Iterable[Mapping[str, str]]) -> list[str]:
    return [f"no {name}: {reason}" for name, reason in sorted({item for row in rows for item in row.items()})]


def checkpoint_table(layers: Sequence["LayerSummary"]) -> Table:
    names = ("simthreshd1", "cdfthreshd", "topk", "pvthreshd")
    rows = []
    for layer in layers:
        thresholds = [number_text(getattr(layer, name), ".4g") for name in names]
        heads = f"{layer.sparse_heads}/{layer.num_heads}"
        rows.append([layer.name, layer.rule, heads, *thresholds, ", ".join(layer.orders) or "-"])
    return ("layer", "rule", "sparse heads", *names, "orders"), rows


def difference_text(found: "PolicyDifference") -> str:
    if found.is_empty:
        return "the policies are the same"
    lines = [f"{name}: {first} -> {second}" for name, (first, second) in found.rules.items()]
    lines += [f"only in the first: {name}" for name in found.only_first]
    lines += [f"only in the second: {name}" for name in found.only_second]
    rows = []
    for layer in found.layers:
        changes = [f"{n} {number_text(a, '.4g')} -> {number_text(b, '.4g')}" for n, (a, b) in layer.means.items()]
        changed, heads = f"{layer.changed_heads}/{max(layer.num_heads)}", " -> ".join(map(str, layer.sparse_heads))
        rows.append([layer.name, changed, heads, ", ".join(changes)])
    if rows:
        lines.append(table_text((("layer", "heads changed", "sparse heads", "mean thresholds"), rows)))
    return "\n".join(lines)


_SUMMARY_LABELS = {
    "gate": "gate to deploy",
    "measured": "measured speed-up",
    "theoretical": "theoretical attention speed-up",
    "failed": "failed prompts",
}


def before_after_text(comparison: "Comparison") -> str:
    from sparsetune.evaluation.compare import change_rows, summary_rows

    brief = [
        [
            _SUMMARY_LABELS.get(key, key),
            *(coloured_status(text) if key in ("verdict", "gate") else text for text in texts),
        ]
        for key, *texts in summary_rows(comparison, sparsity="{:.3f}")
        if key != "measured" or texts != ["-", "-"]
    ]
    changes = [
        [*row[:4], row.interval(" .. "), "*" if row.significant else "", row.worst, "/".join(map(str, row.counts))]
        for row in change_rows(comparison, decimals=6)
    ]
    heads = ("mean", "before", "after", "difference", "95% interval", "", "worst prompt", "better/worse/equal")
    lines = [table_text((("", "before", "after"), brief)), "", table_text((heads, changes)), ""]
    pairs = "1 prompt is" if comparison.num_pairs == 1 else f"{comparison.num_pairs} prompts are"
    lines.append(
        f"{pairs} paired by prompt and seed"
        + (f"; {comparison.num_unpaired} have no partner or no number" if comparison.num_unpaired else "")
    )
    if any(change.significant for change in comparison.changes):
        lines.append("* significant at 5%, corrected for the number of rows")
    for name, side in (("before", comparison.before), ("after", comparison.after)):
        lines += [f"gate {name}: {failure}" for failure in side.gate_failures]
    lines += caveat_lines(comparison.num_pairs)
    lines += [f"NOT comparable: {difference}" for difference in comparison.forced]
    return "\n".join([*lines, *(f"note: {note}" for note in comparison.notes)])
