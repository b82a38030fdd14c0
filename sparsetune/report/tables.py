"""Tables of a report: cell texts and sort values."""

from collections.abc import Sequence
from dataclasses import dataclass

from sparsetune.evaluation.compare import ChangeRow, Comparison, change_rows, summary_rows
from sparsetune.evaluation.gain import budget_used, cells, gain_rows, hand_set_change
from sparsetune.evaluation.report_markdown import number, percent
from sparsetune.evaluation.result import EvaluationResult, PromptRow
from sparsetune.evaluation.yardsticks import placed
from sparsetune.report.figures import Saving, front, kind
from sparsetune.report.words import Words
from sparsetune.tuning.record import TrialSection, TuningRecord

_DIRECTIONS = {True: "up", False: "down", None: ""}


@dataclass(frozen=True)
class Cell:
    """A text and its sort value; None sorts last."""

    text: str
    value: float | str | None = None


@dataclass(frozen=True)
class Head:
    """A column heading; `better` is `up`, `down` or empty."""

    text: str
    better: str = ""


@dataclass(frozen=True)
class Row:
    key: int  # a prompt's index or a trial's number
    cells: tuple[Cell, ...]
    note: str = ""  # a failed prompt's error
    mark: str = ""  # CSS class


@dataclass(frozen=True)
class Table:
    heads: tuple[Head, ...]
    rows: tuple[Row, ...]


def prompt_table(result: EvaluationResult, words: Words) -> Table:
    """All prompts with all metrics, failed ones first, then by PSNR, the worst first."""
    metrics = tuple(result.statistics)
    heads = [Head("#"), Head(words("table.prompt"))]
    heads += [
        Head(f"{name} ({spread.unit})" if spread.unit else name, _DIRECTIONS[spread.higher_is_better])
        for name, spread in result.statistics.items()
    ]
    heads += [Head(words("table.sparsity"), "up"), Head(words("table.seconds_sparse"), "down")]
    heads += [Head(words("table.worst_frame"))]
    ranked = sorted(result.detailed_results, key=lambda row: (row.error is None, row.psnr if row.psnr else 0.0))
    return Table(tuple(heads), tuple(_prompt_row(row, metrics) for row in ranked))


def trial_table(record: TuningRecord, words: Words) -> Table:
    """All trials, the winner first, then those that meet the gate, by what they save."""
    saving = Saving.of_trials(record.trials)
    speed = ("table.speedup", "table.blocks") if saving.name == "speedup" else ()
    names = ("table.trial", "table.state", *speed, "table.sparsity", "table.psnr", "table.psnr_worst", "table.cosine")
    heads = (*(Head(words(name)) for name in names), Head(words("table.seconds")))
    best = {trial.number for trial in front(record.trials)}
    ranked = sorted(
        record.trials, key=lambda trial: (trial.number != record.best, not trial.feasible, -(saving.of(trial) or 0.0))
    )
    rows = (_trial_row(trial, record.best, best, words, timed=bool(speed)) for trial in ranked)
    return Table(heads, tuple(rows))


def trial_details(trial: TrialSection, best: int | None, words: Words) -> dict[str, list[list[str]] | str]:
    figures = [
        [words("table.state"), _state(trial, best, words)],
        [words("table.speedup"), "" if trial.speedup is None else f"{trial.speedup:.2f}×"],
        [words("table.blocks"), "" if trial.blocks_run in (None, 1.0) else percent(trial.blocks_run)],
        [words("table.sparsity"), percent(trial.sparsity)],
        [words("table.psnr"), number(trial.psnr)],
        [words("table.psnr_worst"), number(trial.psnr_worst)],
        [words("table.cosine"), _cosine(trial.frame_cosine)],
        [words("table.predicted"), "" if trial.predicted_error is None else f"{trial.predicted_error:.3g}"],
        [words("table.seconds"), f"{trial.seconds:.1f}"],
        [words("table.reason"), trial.reason or ""],
    ]
    return {
        "title": words("search.trial", number=trial.number),
        "figures": [figure for figure in figures if figure[1]],
        "params": [[name, _value(value)] for name, value in trial.params.items()],
    }


def comparison_rows(comparison: Comparison, words: Words) -> list[tuple[str, str, str]]:
    def translated(key: str, text: str) -> str:
        if key == "gate":
            return words("gate.met" if text == "met" else "gate.missed")
        return words(f"verdict.{text}") if key == "verdict" else text

    rows = summary_rows(comparison, speedup="{:.2f}×", missing="–")
    return [(words(f"outcome.{key}"), translated(key, one), translated(key, other)) for key, one, other in rows]


def metric_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """Cell texts of each metric's change; a star marks a significant difference."""
    return [
        (*row[:4], row.interval(" … ", "–") + (" *" if row.significant else ""), row.worst, _counts(row))
        for row in change_rows(comparison)
    ]


def yardstick_rows(result: EvaluationResult, words: Words) -> list[tuple[str, ...]]:
    """Name, PSNR, SSIM, and PSNR of the sparse video against it, of the policy and each yardstick; none without any."""
    return [
        (
            words.known(f"yardstick.{one.name}", "") or words("yardstick.steps", steps=one.name.partition("=")[2]),
            *(number(value) for value in (one.metrics["psnr"], one.metrics.get("ssim"), one.sparse_psnr)),
        )
        for one in placed(result)
    ]


def _counts(row: ChangeRow) -> str:
    return "/".join(map(str, row.counts))


def gain_table(result: EvaluationResult, words: Words) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads and cell texts of the gain; see `sparsetune.evaluation.gain`."""
    psnr = words("table.psnr") if result.hand_set is None else words("gain.psnr_of", number=result.hand_set.prompt + 1)
    heads = ("", words("gain.speedup"), words("gain.saved"), psnr, words("outcome.gate"))
    rows = [
        (
            words(f"gain.{row.name}") + (f" ({row.pair})" if row.pair else ""),
            *(text.replace("x", "×").replace("-", "–") for text in cells(row)),
            words("gate.met" if row.meets_gate else "gate.missed"),
        )
        for row in gain_rows(result)
    ]
    return heads, rows


def gain_notes(result: EvaluationResult, words: Words) -> list[str]:
    change = hand_set_change(result)
    notes = [] if change is None else [words("gain.change", change=f"{change:+.1f}")]
    used = [
        f"{words.known(f'condition.{one.name}', one.name)} {share:.0%}"
        for one in result.gate.conditions
        if (share := budget_used(one)) is not None
    ]
    return [*notes, words("gain.budget", used=", ".join(used))] if used else notes


def settings_rows(result: EvaluationResult, words: Words) -> list[tuple[str, str]]:
    config, environment = result.config, result.environment
    rows = [
        ("model", " @ ".join(filter(None, (config.model.source, config.model.revision)))),
        ("classes", f"{config.model.pipeline_class}, {config.model.transformer_class}"),
        ("video", f"{config.num_frames} × {config.width} × {config.height}, {config.fps} fps"),
        ("generation", words("env.steps", steps=config.num_inference_steps, guidance=f"{config.guidance_scale:g}")),
        ("scheduler", config.scheduler),
        ("seed", str(config.seed)),
        ("tuner", config.tuner or ""),
        ("checkpoint", config.tuned_path or ""),
        ("cache", config.policy.cache or ""),
        ("kernel", ", ".join(sorted(set(result.sparsity.kernels.values()))) or config.backend),
        ("device", f"{environment.device_name}, {config.dtype}{', torch.compile' if config.compile else ''}"),
        ("platform", environment.platform),
        ("versions", ", ".join(f"{name} {version}" for name, version in environment.versions.items())),
        ("commit", environment.git_commit or ""),
        ("created", environment.created),
        ("policy", config.policy.digest),
    ]
    return [(words(f"env.{name}"), text) for name, text in rows if text]


def _prompt_row(row: PromptRow, metrics: Sequence[str]) -> Row:
    first = (Cell(str(row.index + 1), row.index), Cell(row.prompt, row.prompt))
    if row.error is not None:
        blank = tuple(Cell("–") for _ in range(len(metrics) + 3))
        return Row(row.index, (*first, *blank), row.error, "failed")
    values = [row.metrics.get(name) for name in metrics]
    cells = [Cell("–" if value is None else number(value), value) for value in values]
    cells.append(Cell(percent(row.sparsity) or "–", row.sparsity))
    cells.append(Cell("–" if row.seconds_sparse is None else f"{row.seconds_sparse:.2f}", row.seconds_sparse))
    cells.append(Cell("–" if row.worst_frame is None else str(row.worst_frame), row.worst_frame))
    return Row(row.index, (*first, *cells))


def _trial_row(trial: TrialSection, best: int | None, front: set[int], words: Words, *, timed: bool) -> Row:
    state = _state(trial, best, words)
    speed = (
        Cell("–" if trial.speedup is None else f"{trial.speedup:.2f}×", trial.speedup),
        Cell(percent(trial.blocks_run) or "–", trial.blocks_run),
    )
    cells = (
        Cell(str(trial.number), trial.number),
        Cell(state, state),
        *(speed if timed else ()),
        Cell(percent(trial.sparsity) or "–", trial.sparsity),
        Cell(number(trial.psnr) or "–", trial.psnr),
        Cell(number(trial.psnr_worst) or "–", trial.psnr_worst),
        Cell(_cosine(trial.frame_cosine) or "–", trial.frame_cosine),
        Cell(f"{trial.seconds:.1f}", trial.seconds),
    )
    mark = "winner" if trial.number == best else "front" if trial.number in front else ""
    return Row(trial.number, cells, mark=mark)


def _state(trial: TrialSection, best: int | None, words: Words) -> str:
    return words("search.winner") if trial.number == best else words(f"search.{kind(trial)}")


def _cosine(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)
