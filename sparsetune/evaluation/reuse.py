"""Reuse of an evaluation that was made before, under the same conditions and by the same code."""

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

from sparsetune.checkpoint.manifest import git_commit, versions
from sparsetune.errors import ResultError
from sparsetune.evaluation.aggregate import gate_section
from sparsetune.evaluation.outputs import OutputFolder
from sparsetune.evaluation.result import ConfigSection, EvaluationResult, load_result, save_result
from sparsetune.files import atomic_path
from sparsetune.metrics import Gate

_LOG = logging.getLogger(__name__)


def reused(
    folders: Iterable[Path],
    outputs: OutputFolder,
    config: ConfigSection,
    gate: Gate,
    device_name: str,
    *,
    ladder: bool,
    hand_set: bool,
    save_videos: bool,
) -> EvaluationResult | None:
    """Return the first folder's result that another evaluation would repeat, its files copied; None without any.

    A checkout with changes that aren't committed repeats nothing, nor does a result with failed prompts.
    """
    commit = git_commit()
    if commit is not None and commit.endswith("-dirty"):
        return None
    for folder in folders:
        path = folder / outputs.result_path.name
        try:
            found = load_result(path) if path.is_file() else None
        except ResultError:
            continue
        if found is None or found.failed or _conditions(found.config) != _conditions(config):
            continue
        made = found.environment
        if (made.versions, made.git_commit, made.device_name) != (versions(), commit, device_name):
            continue
        rows = found.detailed_results
        if found.gate != gate_section(gate, rows) or any(row.ladder for row in rows) != ladder:
            continue
        if (found.hand_set is not None) != hand_set or (save_videos and not (folder / "videos").is_dir()):
            continue
        _LOG.info("reused the same evaluation from %s, without a run of its own; --no-reuse renders again", folder)
        result = found.model_copy(update={"config": config})
        if folder.resolve() != outputs.folder.resolve():
            _copy(folder, outputs)
        save_result(result, outputs.result_path)
        return result
    return None


def _conditions(config: ConfigSection) -> ConfigSection:
    """Return what decides the figures: not by which path the checkpoint was named."""
    return config.model_copy(update={"tuned_path": None})


def _copy(folder: Path, outputs: OutputFolder) -> None:
    files = [path for name in ("videos", "stills") for path in sorted((folder / name).glob("prompt_*"))]
    written = []
    for path in (*files, folder / outputs.report_path.name):
        copy = outputs.folder / path.relative_to(folder)
        with atomic_path(copy) as temporary:
            shutil.copyfile(path, temporary)
        written.append(copy)
    outputs.remove_stale(written)
