"""Input of a report: evaluation results, a tuning record, and their files."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from sparsetune.errors import ReportError
from sparsetune.evaluation.result import RESULT_GLOB, EvaluationResult, load_result
from sparsetune.tuning.record import RECORD_NAME, TuningRecord, load_record

_VIDEO = re.compile(r"prompt_(\d+)_compare\.mp4")
_STILL = re.compile(r"prompt_(\d+)_frame_\d+\.png")


@dataclass(frozen=True)
class Files:
    """Side-by-side videos and stills of an evaluation, by prompt index."""

    videos: Mapping[int, Path] = field(default_factory=dict)
    stills: Mapping[int, Path] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> "Files":
        return cls(_numbered(folder / "videos", _VIDEO), _numbered(folder / "stills", _STILL))


@dataclass(frozen=True)
class Source:
    """Everything that a report shows."""

    name: str  # of the run or folder
    evaluation: EvaluationResult | None  # None for a tuning without a winner
    before: EvaluationResult | None = None  # of SpargeAttn's default thresholds
    tuning: TuningRecord | None = None  # None for a single evaluation
    files: Files = field(default_factory=Files)
    files_before: Files = field(default_factory=Files)

    def beside(self, before: "Source") -> "Source":
        return replace(self, before=before.evaluation, files_before=before.files)

    @property
    def model_name(self) -> str:
        if self.evaluation is not None:
            return self.evaluation.config.model_name
        return self.tuning.model_name if self.tuning is not None else "?"


def of_tuning(record: TuningRecord, name: str, after: Path, before: Path) -> Source:
    """Source of a tuning; `after` and `before` are the folders of its evaluations."""
    return Source(
        name,
        record.evaluation,
        record.before,
        record,
        Files.of(after) if record.evaluation is not None else Files(),
        Files.of(before) if record.before is not None else Files(),
    )


def from_folder(path: Path) -> Source:
    """Read the results in a tuning's or an evaluation's folder, or from the JSON file in it."""
    if not path.exists():
        raise ReportError(f"no run or folder {path}; list runs with `sparsetune runs`")
    folder, name = (path, path.name) if path.is_dir() else (path.parent, path.parent.name)
    if path.name == RECORD_NAME or (path.is_dir() and (path / RECORD_NAME).is_file()):
        return of_tuning(load_record(folder / RECORD_NAME), name, folder / "evaluation", folder / "before")
    if path.is_dir() and not any(path.glob(RESULT_GLOB)):
        raise ReportError(
            f"{path} holds neither a {RECORD_NAME} of `sparsetune tune` nor a {RESULT_GLOB} of `sparsetune eval`; "
            "pass their output folder"
        )
    return Source(name, load_result(path), files=Files.of(folder))


def _numbered(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    found = ((pattern.fullmatch(path.name), path) for path in sorted(folder.glob("prompt_*")))
    numbered = {int(match[1]): path for match, path in found if match is not None}
    return dict(sorted(numbered.items()))
