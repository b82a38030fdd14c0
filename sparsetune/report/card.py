"""Model card of a checkpoint, for the Hugging Face Hub."""

import re
from collections.abc import Sequence
from pathlib import Path

from sparsetune.checkpoint import Checkpoint, Manifest
from sparsetune.errors import ReportError
from sparsetune.evaluation.conditions import policy_digest
from sparsetune.evaluation.report_markdown import (
    cell,
    gain_section,
    gate_section,
    metrics_section,
    number,
    percent,
    seconds_text,
    table,
)
from sparsetune.evaluation.result import EvaluationResult
from sparsetune.report.source import Source, from_folder
from sparsetune.tuning.record import RECORD_NAME


def source_of(checkpoint: Checkpoint, path: Path, given: Path | None) -> Source | None:
    """Find the results of a checkpoint: in a `given` folder, or of the tuning that saved it at `path`, if any.

    Raises:
        ReportError: what was given has no result, or that of another policy.
        ResultError: it can't be read.
    """
    beside = path.parent / RECORD_NAME
    if given is None and not beside.is_file():
        return None
    source = from_folder(given or beside)
    settings = checkpoint.manifest.tuner_settings
    if source.tuning is not None:
        # A search judges its winner before the thresholds are rounded to be saved.
        winner = source.tuning.study_name, source.tuning.best
        is_of_it = source.evaluation is not None and winner == (settings.get("study_name"), settings.get("trial"))
    else:
        judged = None if source.evaluation is None else source.evaluation.config.policy.digest
        is_of_it = judged == policy_digest(checkpoint.policy)
    if is_of_it:
        return source
    if given is None:
        return None
    raise ReportError(f"{given} has no evaluation of this checkpoint; run `sparsetune eval --checkpoint {path}`")


def videos_of(source: Source | None) -> dict[str, tuple[Path, str]]:
    """Return the side-by-side videos of the worst and the median prompt: their file name, path and prompt."""
    if source is None or source.evaluation is None:
        return {}
    rows = sorted((row.psnr, row.index) for row in source.evaluation.detailed_results if row.psnr is not None)
    chosen = dict.fromkeys(index for _, index in rows[:1] + rows[len(rows) // 2 :][:1])
    files = source.files.videos
    prompts = {row.index: row.prompt for row in source.evaluation.detailed_results}
    return {files[index].name: (files[index], prompts[index]) for index in chosen if index in files}


def model_card(checkpoint: Checkpoint, repo: str, source: Source | None = None, license: str | None = None) -> str:
    """Write the card: how to load the checkpoint, what was measured, what it was tuned for; `license` is the Hub's id.

    Without results, the figures of the search are given, which are of the tune prompts.
    """
    manifest, result = checkpoint.manifest, None if source is None else source.evaluation
    base = manifest.base_source if _is_hub_id(manifest.base_source) else None
    metadata = {"library_name": "sparsetune", "base_model": base, "license": license}
    head = "\n".join(f"{name}: {value}" for name, value in metadata.items() if value)
    parts = (
        f"---\n{head}\ntags:\n- sparse-attention\n- spargeattn\n---",
        f"# {repo.partition('/')[2]}",
        f"Sparse attention for {cell(base or manifest.base_model or 'a video diffusion model')}: thresholds of "
        "SpargeAttn for each head, dense steps and step cache, tuned with sparsetune. The repository has no weights "
        "and no code.",
        f'## Use\n\n```python\nfrom sparsetune import sparsify\n\nwith sparsify(pipe, "hf://{repo}"):\n'
        '    video = pipe("a panda eats bamboo").frames[0]\n```\n\n`pipe` is the diffusers pipeline of the base model.',
        _searched(manifest) if result is None else _measured(result),
        _videos(videos_of(source)),
        _tuned_for(manifest),
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def _measured(result: EvaluationResult) -> str:
    config, sparsity = result.config, result.sparsity
    speed = "not measured: this kernel computes every pair" if result.seconds is None else seconds_text(result.seconds)
    figures = (
        f"Over {config.num_prompts} prompts that the search didn't see, against the dense videos with the same seeds."
        if not config.prompts_in_tune_set
        else f"Over {config.num_prompts} prompts, {len(config.prompts_in_tune_set)} of which the search saw."
    )
    lines = (
        f"- Sparsity: {percent(sparsity.overall)} of the block pairs of all self-attention calls",
        f"- Speed: {speed}",
        f"- Measured on {cell(result.environment.device_name)}, {result.environment.created}",
    )
    return "\n\n".join(
        part
        for part in (metrics_section(result), figures, "\n".join(lines), gain_section(result), gate_section(result))
        if part
    )


def _searched(manifest: Manifest) -> str:
    if not manifest.metrics:
        return ""
    rows = [(cell(name), number(value)) for name, value in manifest.metrics.items()]
    return "## Measured on the tune prompts\n\n" + table(("Metric", "Mean"), rows)


def _videos(videos: dict[str, tuple[Path, str]]) -> str:
    if not videos:
        return ""
    lines = [f"- [{cell(prompt)}](videos/{name})" for name, (_, prompt) in videos.items()]
    return "## Videos\n\nDense and sparse side by side, of the worst and the median prompt:\n\n" + "\n".join(lines)


def _tuned_for(manifest: Manifest) -> str:
    def joined(values: Sequence[object], text: str) -> str | None:
        return None if None in values else text.format(*values)

    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    source = manifest.base_source if _is_hub_id(manifest.base_source) else None
    rows = {
        "Base model": source or manifest.base_model,
        "Revision": manifest.base_revision,
        "Transformer": manifest.transformer_class,
        "Video": joined((manifest.num_frames, manifest.width, manifest.height), "{} frames of {} x {}"),
        "Steps": manifest.num_inference_steps,
        "Guidance": manifest.guidance_scale,
        "Scheduler": manifest.scheduler,
        "Data type": manifest.dtype,
        "GPU": manifest.device,
        "Kernel": manifest.kernel,
        "Tuner": manifest.tuner,
        "Created": manifest.created,
        "Versions": versions or None,
    }
    found = [(name, cell(str(value))) for name, value in rows.items() if value is not None]
    return "## Tuned for\n\n" + table(("Setting", "Value"), found)


def _is_hub_id(source: str | None) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", source or "", re.ASCII) is not None and not Path(source or "").exists()
