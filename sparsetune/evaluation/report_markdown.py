"""The Markdown report of an evaluation, report.md."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from sparsetune.attention.schedule import DenseSchedule
from sparsetune.evaluation.gain import gain_notes, gain_table
from sparsetune.evaluation.ladder import Attribution, attribute
from sparsetune.evaluation.outputs import REPORT_TITLE
from sparsetune.evaluation.result import EvaluationResult, SecondsSection, Spread
from sparsetune.evaluation.yardsticks import Placed, label, place_text, placed
from sparsetune.metrics import interval_caveat
from sparsetune.metrics.gate import POOLED
from sparsetune.metrics.score import psnr_grade


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table; cells must be escaped already, see `cell`."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(text: str) -> str:
    """Escape any text for a cell of a Markdown table."""
    escaped = re.sub(r"([\\|*`\[\]_~])", r"\\\1", " ".join(text.split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;")


def number(value: float | None, scale: float | None = None) -> str:
    """Format with two decimals from 10 on, four below; `scale` decides instead of the value where it is given."""
    decimals = 2 if abs(scale or value or 0.0) >= 10 else 4
    return "" if value is None else f"{value:.{decimals}f}"


def relative(path: Path, folder: Path) -> str:
    return quote(Path(os.path.relpath(path, folder)).as_posix())


CHECKLIST = (
    ("Content", "the sparse video shows the same things in the same places"),
    ("Motion", "movements are as smooth, with no added jumps or flicker"),
    ("Detail", "textures, edges and small objects are kept"),
    ("Artifacts", "there are no blocks, smears or ghosts that the dense video lacks"),
    ("Colour", "colours and brightness are the same"),
)

_ARROWS = {True: " ↑", False: " ↓", None: ""}

_VERDICTS = {
    "excellent": "Excellent: hardly any visible difference.",
    "good": "Good: the video keeps its quality.",
    "acceptable": "Acceptable: some differences; review them before deploying.",
    "degraded": "Degraded: the videos differ visibly; use less sparsity or tune.",
    "failed": "Failed: no prompt rendered.",
}


def verdict_text(result: EvaluationResult) -> str:
    """Score and verdict as a sentence, e.g. "85/100 (…). Good: the video keeps its quality."."""
    if result.overall_score is None:
        return f"no score. {_VERDICTS[result.verdict]}"
    return f"{result.overall_score}/100{_grade(result)}. {_VERDICTS[result.verdict]}"


def _grade(result: EvaluationResult) -> str:
    """Where psnr lies between the bounds of its grade, e.g. " (pooled psnr 36.34 dB, between 35 and 40)"."""
    pooled = next((one.measured for one in result.gate.conditions if one.name == POOLED), None)
    if pooled is None:
        return ""
    below, above = psnr_grade(pooled)
    if below is not None and above is not None:
        bounds = f"between {below:g} and {above:g}"
    else:
        bounds = f"above {below:g}" if above is None else f"up to {above:g}"
    return f" (pooled psnr {pooled:.2f} dB, {bounds})"


def report_markdown(
    result: EvaluationResult,
    folder: Path,
    videos: Mapping[int, Mapping[str, Path]] | None = None,
    stills: Mapping[int, Path] | None = None,
) -> str:
    """Format the report in `folder`; videos by prompt index and kind, stills by prompt index, the worst one first."""
    parts = (
        f"{REPORT_TITLE}{result.config.model_name}: accuracy report",
        _configuration(result),
        gain_section(result),
        _seconds(result),
        metrics_section(result),
        _prompts(result, folder, videos or {}),
        _sparsity(result),
        _ladder(result),
        _yardsticks(result),
        _stills(result, folder, stills or {}),
        "## Human review\n\nWatch the side-by-side videos and tick what is true:\n\n"
        + "\n".join(f"- [ ] {name}: {question}" for name, question in CHECKLIST),
        gate_section(result),
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def _configuration(result: EvaluationResult) -> str:
    config, policy = result.config, result.config.policy
    also = [name for name in dict.fromkeys((config.short_name, config.model.source)) if name != config.model_name]
    also += [f"revision {config.model.revision}"] if config.model.revision else []
    scales = (config.guidance_scale, config.guidance_scale_2)
    guidance = ", then ".join(f"{scale:g}" for scale in scales if scale is not None)
    tuned = f"yes ({config.tuned_path or 'a policy in memory'})" if config.use_tuned else "no (SpargeAttn's defaults)"
    thresholds = {"simthreshd1": policy.simthreshd1, "cdfthreshd": policy.cdfthreshd, "topk": policy.topk}
    rows = [
        ("Model", ", ".join((config.model_name, *also, config.model.transformer_class))),
        ("Tuned", tuned + (f", by {config.tuner}" if config.tuner else "")),
        (
            "Policy",
            f"{policy.num_sparse_heads} of {policy.num_heads} heads sparse; "
            + ", ".join(f"{name} {_spread(spread)}" for name, spread in thresholds.items() if spread)
            + f"; {_dense_steps(result)}; order {policy.order}; "
            + ("text kept" if policy.keep_text else "text not kept")
            + (f"; cache {policy.cache}" if policy.cache else ""),
        ),
        ("Video", f"{config.num_frames} frames of {config.width} x {config.height} at {config.fps}/s"),
        ("Generation", f"{config.num_inference_steps} steps, guidance {guidance}, {config.scheduler}"),
        (
            "Prompts",
            f"{config.num_prompts}, all with seed {config.seed}"
            + (f", from {cell(config.prompt_file)}" if config.prompt_file else ""),
        ),
        (
            "Computed with",
            f"{config.dtype} on {config.device}, backend {config.backend}"
            + (", torch.compile" if config.compile else ""),
        ),
        ("Versions", ", ".join(f"{name} {version}" for name, version in result.environment.versions.items())),
        *([("Workers", "; ".join(result.environment.workers))] if len(result.environment.workers) > 1 else []),
        *([("Incidents", "; ".join(incidents))] if (incidents := result.environment.incidents) else []),
        (
            "Created",
            result.environment.created
            + (f", commit {result.environment.git_commit}" if result.environment.git_commit else ""),
        ),
    ]
    text = "## Configuration\n\n" + table(("Setting", "Value"), [(name, cell(value)) for name, value in rows])
    if config.prompts_in_tune_set:
        text += (
            f"\n\n**{len(config.prompts_in_tune_set)} of {config.num_prompts} prompts are also in the tune set, "
            "which inflates scores.**"
        )
    return text


def metrics_section(result: EvaluationResult) -> str:
    """Every metric's mean with its 95% interval, and the score, as Markdown."""
    rows = []
    for name, spread in result.statistics.items():
        unit, direction = f" ({spread.unit})" if spread.unit else "", _ARROWS[spread.higher_is_better]
        mean, std, low, high, ci95_low, ci95_high = (
            number(value, max(abs(spread.min), abs(spread.max)))
            for value in (spread.mean, spread.std, spread.min, spread.max, spread.ci95_low, spread.ci95_high)
        )
        interval = f"{ci95_low} to {ci95_high}" if ci95_low else ""
        rows.append((f"{name}{unit}{direction}", f"{mean} ± {std}" if std else mean, low, high, interval))
    body = table(("Metric", "Mean ± std", "Min", "Max", "95% interval of the mean"), rows) if rows else "None."
    reasons = {name: why for row in result.detailed_results for name, why in row.unavailable.items()}
    notes = "".join(f"\n\n{name} could not be computed: {why}." for name, why in reasons.items())
    caveat = interval_caveat(len(result.detailed_results) - len(result.failed))
    notes += f"\n\nNote: {caveat}." if caveat and rows else ""
    notes += f"\n\n{pooled.capitalize()}." if (pooled := pooled_text(result)) else ""
    return f"## Objective metrics\n\n{body}{notes}\n\n**Score: {verdict_text(result)}**"


def _prompts(result: EvaluationResult, folder: Path, videos: Mapping[int, Mapping[str, Path]]) -> str:
    rows = []
    for row in result.detailed_results:
        if row.error is not None:
            rows.append((str(row.index + 1), f"{cell(row.prompt)} (**failed**: {cell(row.error)})", *[""] * 6))
            continue
        links = ", ".join(f"[{kind}]({relative(path, folder)})" for kind, path in videos.get(row.index, {}).items())
        rows.append(
            (
                str(row.index + 1),
                cell(row.prompt),
                *(number(value) for value in (row.psnr, row.frame_cosine, row.frame_l1, row.frame_diff)),
                percent(row.sparsity),
                links,
            )
        )
    head = ("#", "Prompt", "psnr (dB)", "frame_cosine", "frame_l1", "frame_diff", "Sparsity", "Videos")
    return "## Prompts\n\n" + table(head, rows)


def pooled_text(result: EvaluationResult) -> str | None:
    """The pooled psnr, and how many prompts the gate's means leave out; None for a result without it."""
    pooled = next((one.measured for one in result.gate.conditions if one.name == POOLED), None)
    if pooled is None:
        return None
    left_out, total = result.gate.num_identical, len(result.detailed_results)
    return f"pooled psnr {pooled:.2f} dB, of the mean squared error over the prompts" + (
        f"; the gate's means leave out {left_out} of {total} prompts, whose videos are identical" if left_out else ""
    )


def seconds_text(part: SecondsSection) -> str:
    """The seconds as a sentence, e.g. "2.70 s of denoising dense, 1.78 s sparse: 1.52 times as fast (...)"."""
    verdict, interval = "", "no 95% interval for one prompt"
    if part.ci95_low is not None and part.ci95_high is not None:
        interval = f"95% interval {part.ci95_low:.2f} to {part.ci95_high:.2f}"
    lowest = "" if part.lowest is None else f", lowest {part.lowest:.2f}"
    if not part.is_faster:
        slower = part.ci95_high is not None and part.ci95_high < 1
        verdict = ", slower than dense" if slower else ", no difference beyond the noise"
    return (
        f"{part.dense:.3g} s of denoising dense, {part.sparse:.3g} s sparse: {part.speedup:.2f} times as fast{verdict} "
        f"({interval}{lowest}, noise {part.noise:.1%}); attention is "
        f"{part.attention_share:.0%} of a dense step, which limits what sparse attention alone can gain to "
        f"{part.ceiling:.2f}x"
    )


def cache_text(result: EvaluationResult) -> str | None:
    """What the step cache did as a sentence; None without one."""
    cache, part = result.config.policy.cache, result.sparsity
    if cache is None or part.blocks_run is None or part.attention_computed is None:
        return None
    return (
        f"cache {cache}: {part.blocks_run:.1%} of the blocks ran, and {part.attention_computed:.1%} of a dense "
        "generation's attention was computed"
    )


def gain_section(result: EvaluationResult) -> str:
    """The gain of a tuned policy as Markdown; empty for default thresholds."""
    head, rows = gain_table(result)
    if not rows or not result.config.use_tuned:
        return ""
    notes = "".join(f"\n\n{note[:1].upper()}{note[1:]}." for note in gain_notes(result))
    return f"## Gain\n\n{table(head, [tuple(row) for row in rows])}{notes}"


def _seconds(result: EvaluationResult) -> str:
    return "" if result.seconds is None else f"## Seconds\n\n{seconds_text(result.seconds)}."


def _sparsity(result: EvaluationResult) -> str:
    part = result.sparsity
    if part.overall is None:
        return "## Sparsity\n\nNothing was rendered."
    calls = ", ".join(f"{count} {kind}" for kind, count in part.num_calls.items())
    kernels = ", ".join(sorted(set(part.kernels.values())))
    theoretical, measured = (
        "not known" if value is None else f"{value:.2f}x" for value in (part.theoretical_speedup, part.measured_speedup)
    )
    dense, sparse = ("?" if value is None else f"{value:.2f} s" for value in (part.seconds_dense, part.seconds_sparse))
    num_cached = sum(row.dense_cached for row in result.detailed_results)
    lines = [
        f"- Sparsity: {percent(part.overall)} of the block pairs of all self-attention calls "
        f"({percent(part.active)} of the sparse calls)",
        *([f"- With the {text}"] if (text := cache_text(result)) else []),
        f"- Theoretical speed-up of attention: {theoretical}",
        f"- Measured speed-up of the denoising: {measured}",
        f"- Mean of a whole rendering: {dense} dense, {sparse} sparse"
        + (f"; {num_cached} of the dense times were measured by an earlier run" if num_cached else ""),
        f"- Kernels that ran: {kernels}; calls: {calls}",
        *(f"- Fell back to dense {count} times: {cell(reason)}" for reason, count in part.fallbacks.items()),
    ]
    layers = table(
        ("Layer", "Sparsity", "Kernel"),
        [(f"`{name}`", percent(value), part.kernels.get(name, "")) for name, value in part.by_layer.items()],
    )
    return "## Sparsity\n\n" + "\n".join(lines) + f"\n\n<details><summary>By layer</summary>\n\n{layers}\n\n</details>"


YARDSTICK_HEADS = ("change", "psnr (dB)", "ssim", "sparse video against it (dB)")


def yardstick_rows(found: Sequence[Placed]) -> list[list[str]]:
    """Cells below `YARDSTICK_HEADS`, the smallest change first."""
    return [
        [label(one.name), *(number(value) for value in (one.metrics["psnr"], one.metrics.get("ssim"), one.sparse_psnr))]
        for one in found
    ]


def _yardsticks(result: EvaluationResult) -> str:
    found = placed(result)
    if not found:
        return ""
    rows = [tuple(row) for row in yardstick_rows(found)]
    place = place_text(found)
    return f"## Yardsticks\n\n{table(YARDSTICK_HEADS, rows)}\n\n{place[0].upper()}{place[1:]}."


def _ladder(result: EvaluationResult) -> str:
    found = attribute(result.detailed_results)
    if found is None:
        return ""
    rows = [
        ("Noise: dense rendered again", *_rung(found, "dense_again")),
        ("Kernel rounding: sparsity 0", *_rung(found, "kernel")),
        ("Sparsity: the policy", *_rung(found, "policy")),
    ]
    note = (
        f"Means over {found.num_prompts} prompts, against the dense baseline. The share is what each row adds to the "
        "squared error of the row above; only the last is due to the policy."
    )
    head = ("Source", "psnr (dB)", "Mean squared error", "Share of the error")
    return f"## Error sources\n\n{table(head, rows)}\n\n{note}"


def _rung(found: Attribution, rung: str) -> tuple[str, str, str]:
    share = "none" if found.shares is None else f"{found.shares[rung]:.1%}"
    return number(found.psnr[rung]), f"{found.mse[rung]:.3g}", share


def _stills(result: EvaluationResult, folder: Path, stills: Mapping[int, Path]) -> str:
    if not stills:
        return ""
    parts = []
    for name, (index, path) in zip(("worst", "median"), stills.items(), strict=False):
        row = result.detailed_results[index]
        parts.append(
            f"The worst frame ({row.worst_frame}) of the {name} prompt ({index + 1}, {number(row.psnr)} dB), "
            f"*{cell(row.prompt)}*: dense, sparse, difference amplified.\n\n"
            f"![{name} prompt]({relative(path, folder)})"
        )
    return "## Stills\n\n" + "\n\n".join(parts)


def gate_section(result: EvaluationResult) -> str:
    """Whether the gate is met, and by how much, as Markdown."""
    conditions = "\n".join(
        f"- {'met' if one.met else '**not met**'}: {one.name} {number(one.measured)} (must be "
        f"{'below' if one.is_maximum else 'above'} {one.bound:g}{' ' + one.unit if one.unit else ''})"
        for one in result.gate.conditions
    )
    if result.gate.passed:
        verdict = "Passed on metrics; human review still required."
    else:
        verdict = "Do not deploy: " + "; ".join(result.gate.failures) + "."
    return f"## Conclusion\n\n{verdict}" + (f"\n\n{conditions}" if conditions else "")


def _spread(spread: Spread) -> str:
    if spread.min == spread.max:
        return f"{spread.mean:.3g}"
    return f"{spread.mean:.3g} ({spread.min:.3g} to {spread.max:.3g})"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _dense_steps(result: EvaluationResult) -> str:
    num_steps = result.config.num_inference_steps
    num_dense = DenseSchedule(result.config.policy.dense_fraction).num_dense_steps(num_steps)
    dense = f"the first {num_dense} of {num_steps} steps dense" if num_dense else "no dense steps"
    scale = result.config.policy.drop_scale
    return dense if scale is None else f"{dense}, {_spread(scale)} times the dropped attention by step"
