"""`tuning.json`, the record of a tuning: its fields, and how it is read and written."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from sparsetune.checkpoint.manifest import utc_now
from sparsetune.config import Config
from sparsetune.evaluation.prompt import speedup
from sparsetune.evaluation.result import EvaluationResult, read_versioned, short_repr
from sparsetune.files import write_json
from sparsetune.tuning.events import Parameter, SearchStatistics, TrialResult, TrialState, TuningResult, Validation
from sparsetune.tuning.reproduce import recorded

RECORD_NAME: Final = "tuning.json"
SCHEMA_VERSION: Final = 1
"""Increment when a field of the JSON changes its meaning or is removed."""

SCHEMA_PATH: Final = Path(__file__).parent / "tuning.schema.json"
"""The JSON Schema of a tuning, shipped with the package."""

Seconds = Annotated[float, Field(ge=0.0)]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


class _Part(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, json_schema_serialization_defaults_required=True
    )


class TrialSection(_Part):
    """One trial; figures are over the tune prompts that it rendered, null where there is none."""

    number: int = Field(description="From 0, in the order in which the study asked.")
    params: dict[str, Parameter] = Field(description="What the search chose.")
    state: TrialState
    reason: str | None = Field(description="Why it was pruned or failed.")
    sparsity: float | None = Field(description="Mean.")
    psnr: float | None = Field(description="Mean, in dB.")
    psnr_worst: float | None = Field(description="Of the worst prompt, in dB.")
    frame_cosine: float | None = Field(description="Mean.")
    feasible: bool = Field(description="Whether it is complete and meets the gate, raised by the margin.")
    seconds: Seconds = Field(description="Wall-clock time.")
    seconds_sparse: Seconds | None = Field(
        description="Mean of its renderings; of their denoising alone where `seconds_dense` is known."
    )
    seconds_dense: Seconds | None = Field(None, description="Mean of a dense denoising, timed beside; null on a CPU.")
    seconds_noise: float | None = Field(None, description="Relative standard error of the prompts' mean speed-up.")
    blocks_run: float | None = Field(None, description="Of the blocks' forwards, mean; below 1 where a cache skipped.")
    predicted_error: float | None = Field(description="What calibration says of its policy's error.")
    predicted_seconds: Seconds | None = Field(None, description="Of its denoising, before it was rendered.")

    @property
    def speedup(self) -> float | None:
        """Dense over sparse seconds of denoising; None where it wasn't measured."""
        return speedup(self.seconds_dense, self.seconds_sparse)

    @classmethod
    def of(cls, trial: TrialResult) -> "TrialSection":
        """Convert a trial; figures that aren't finite become None."""
        values = {name: getattr(trial, name) for name in cls.model_fields}
        return cls(**{name: _finite(value) if isinstance(value, float) else value for name, value in values.items()})


class InsightSection(_Part):
    """What the trials say of the search."""

    rank_correlation: float | None = Field(description="Spearman's, between calibrated error and PSNR.")
    importances: dict[str, float] = Field(description="PED-ANOVA's share of each parameter, in [0, 1].")
    seconds_correlation: float | None = Field(None, description="Spearman's, of predicted and measured seconds.")
    seconds_error: float | None = Field(None, description="Mean relative error of the predicted seconds.")

    @classmethod
    def of(cls, statistics: SearchStatistics) -> "InsightSection":
        """Convert statistics; figures that aren't finite become None or are left out."""
        return cls(
            rank_correlation=_finite(statistics.rank_correlation),
            importances={name: share for name, share in statistics.importances.items() if math.isfinite(share)},
            seconds_correlation=_finite(statistics.seconds_correlation),
            seconds_error=_finite(statistics.seconds_error),
        )


class StepSection(_Part):
    """Seconds of a denoising step on the GPU; figures of attention are of one layer."""

    rest: Seconds = Field(description="Without self-attention.")
    dense: Seconds
    overhead: float = Field(description="Sparse attention takes overhead + pairs (1 - sparsity).")
    pairs: Seconds
    order: Seconds = Field(description="More, where a head has a token order other than raster.")
    num_layers: int


class PerHeadSection(_Part):
    """What thresholds for each head would save, as calibration predicts, at the error of the winner's one for all."""

    sparsity: float = Field(description="Of the winner over a whole generation, predicted.")
    per_head_sparsity: float = Field(description="With thresholds for each head.")
    seconds: Seconds | None = Field(description="Of the winner's denoising, predicted; null where sparsity saves none.")
    per_head_seconds: Seconds | None = Field(description="With thresholds for each head.")


class ValidationSection(_Part):
    """One of the best trials on the validation prompts."""

    number: int = Field(description="The trial's.")
    num_prompts: int = Field(description="Number of validation prompts.")
    psnr: float | None = Field(description="Mean, in dB; null where a rendering failed.")
    psnr_worst: float | None = Field(description="Of the worst prompt, in dB.")
    feasible: bool = Field(description="Whether it meets the gate, raised by the margin, on these prompts too.")

    @classmethod
    def of(cls, validation: Validation) -> "ValidationSection":
        """Convert a validation."""
        return cls(**{name: getattr(validation, name) for name in cls.model_fields})


class TuningRecord(_Part):
    """A whole tuning; its JSON has exactly these fields."""

    schema_version: Literal[1] = SCHEMA_VERSION
    study_name: str
    created: str = Field(description="When it ended: UTC, ISO 8601.")
    config: dict[str, JsonValue] = Field(description="The configuration, but for where things are kept.")
    trials: tuple[TrialSection, ...] = Field(description="All of the study, in order.")
    best: int | None = Field(description="Number of the winner; null where no trial meets the gate.")
    closest: int | None = Field(description="Without a winner, the sparse trial that misses the gate by the least.")
    interrupted: bool = Field(description="Whether Ctrl-C ended the search before its time.")
    seconds: Seconds = Field(description="Of this run, from loaded model to judged winner.")
    seconds_by_phase: dict[str, Seconds] = Field(
        description="The same by phase: preparation, calibration, refinement, sensitivity, trials, "
        "validation, evaluation."
    )
    insight: InsightSection | None
    step: StepSection | None = Field(None, description="Null where the kernel computes every pair.")
    per_head: PerHeadSection | None = Field(None, description="Null where the winner has thresholds for each head.")
    dense_because: str | None = Field(None, description="Why the dense model is recommended; null with a winner.")
    validations: tuple[ValidationSection, ...] = Field((), description="In the order in which they were rendered.")
    before: EvaluationResult | None = Field(description="SpargeAttn's default thresholds on the eval prompts.")
    evaluation: EvaluationResult | None = Field(description="The winner on the eval prompts.")

    @classmethod
    def of(cls, result: TuningResult, config: Config) -> "TuningRecord":
        """Convert the result of a tuning and its configuration."""
        return cls(
            study_name=result.study_name,
            created=utc_now(),
            config=recorded(config),
            trials=tuple(TrialSection.of(trial) for trial in result.trials),
            best=None if result.best is None else result.best.number,
            closest=None if result.closest is None else result.closest.number,
            interrupted=result.interrupted,
            seconds=result.seconds,
            seconds_by_phase=dict(result.seconds_by_phase),
            insight=None if result.insight is None else InsightSection.of(result.insight),
            step=None if result.step is None else StepSection(**asdict(result.step)),
            per_head=None if result.per_head is None else PerHeadSection(**asdict(result.per_head)),
            dense_because=result.dense_because,
            validations=tuple(ValidationSection.of(validation) for validation in result.validations),
            before=result.before,
            evaluation=result.evaluation,
        )

    def __repr__(self) -> str:
        own = {} if self.evaluation is None else self.evaluation.figures
        return short_repr(self, {"study": self.study_name, "trials": len(self.trials), "best": self.best, **own})

    __str__ = __repr__

    @property
    def model_name(self) -> str:
        """The model's short name."""
        model = self.config.get("model")
        return str(model.get("name", "?")) if isinstance(model, dict) else "?"


def save_record(record: TuningRecord, path: Path) -> None:
    """Write a record as JSON, atomically."""
    write_json(path, record.model_dump(mode="json"))


def load_record(path: Path) -> TuningRecord:
    """Read a record from its JSON file.

    Raises:
        ResultError: it can't be read, isn't a tuning, or a newer sparsetune wrote it.
    """
    return read_versioned(path, TuningRecord, SCHEMA_VERSION, "tuning")


def record_schema() -> dict[str, Any]:
    """Generate the JSON Schema of a record; a test checks that `SCHEMA_PATH` is equal to it."""
    schema = TuningRecord.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def write_schema() -> None:
    """Write `SCHEMA_PATH`, after a change to the models above."""
    write_json(SCHEMA_PATH, record_schema())
