"""Result of an evaluation: its JSON schema, read and written."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from sparsetune.documents import read_json, read_text
from sparsetune.errors import ResultError
from sparsetune.files import similar_path, write_json
from sparsetune.metrics import BASE_METRICS, Verdict
from sparsetune.metrics.gate import relation

SCHEMA_VERSION: Final = 1
"""Increment when a field of the JSON changes its meaning or is removed."""

SCHEMA_PATH: Final = Path(__file__).parent / "result.schema.json"
"""The JSON Schema of a result, shipped with the package."""

RESULT_GLOB: Final = "*_accuracy_*.json"
Rung = Literal["dense_again", "kernel"]
"""Lower rungs of the attribution ladder: the dense video rendered again, and the kernel at sparsity 0."""

Model = TypeVar("Model", bound=BaseModel)
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Seconds = Annotated[float, Field(ge=0.0)]


class _Part(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, json_schema_serialization_defaults_required=True
    )


class ModelSection(_Part):
    """The model that rendered."""

    source: str = Field(description="`demo`, a folder or a hub id.")
    revision: str | None = Field(description="Commit or tag on the hub.")
    fingerprint: str = Field(description="Hash of the weights.")
    pipeline_class: str
    transformer_class: str
    num_layers: int = Field(description="Self-attention layers.")
    num_heads: int = Field(description="Attention heads of all layers together.")
    random_weights: str = Field("no", description="full or tiny where its weights are random, else no.")
    lora: str | None = Field(None, description="LoRA fused into its weights: file, folder or hub id.")
    lora_scale: float | None = Field(None, description="Weight of the LoRA.")
    flow_shift: float | None = Field(None, description="Shift of the scheduler's sigmas; null is the model's own.")


class Spread(_Part):
    """Mean and range of a threshold over the sparse heads."""

    mean: float
    min: float
    max: float


class PolicySection(_Part):
    """Summary of the policy; the checkpoint holds the whole of it."""

    digest: str = Field(description="SHA-256 of the whole policy.")
    rule: str = Field(description="cdf, topk, or both where layers differ.")
    num_layers: int
    num_heads: int
    num_sparse_heads: int
    simthreshd1: Spread | None
    cdfthreshd: Spread | None
    topk: Spread | None
    pvthreshd: Spread | None
    dense_fraction: Fraction = Field(description="Fraction of the denoising steps, at the start, that run dense.")
    drop_scale: Spread | None = Field(None, description="Factors on the dropped attention, by step; null is 1.")
    order: str = Field(description="Token order; all of them where layers differ.")
    keep_text: bool = Field(description="Whether key blocks with text tokens are always computed.")
    select_partial: bool = Field(False, description="Whether a partial last block is selected like any other.")
    cache: str | None = Field(None, description="Step cache with its parameters; null is none.")


class ConfigSection(_Part):
    """Everything that decides the numbers, and so which results are comparable."""

    model_name: str = Field(description="The hub's id, or the short name of another model.")
    short_name: str = Field("", description="Short name; that of its results folder and its runs.")
    use_tuned: bool = Field(description="False tests SpargeAttn's default thresholds.")
    num_prompts: int
    seed: int = Field(description="Of all renderings.")
    tuned_path: str | None = Field(description="Path of the checkpoint, as given.")
    tuner: str | None = Field(description="Tuner that produced the checkpoint.")
    model: ModelSection
    height: int = Field(gt=0)
    width: int = Field(gt=0)
    num_frames: int = Field(gt=0)
    fps: int = Field(gt=0)
    num_inference_steps: int = Field(gt=0)
    guidance_scale: float
    guidance_scale_2: float | None = Field(None, description="Of a second transformer; null is the first's.")
    sigmas: tuple[float, ...] = Field((), description="Noise levels of the steps; empty is the pipeline's own.")
    negative_prompt: str
    max_sequence_length: int | None
    scheduler: str = Field(description="Class and hash of its configuration.")
    dtype: str
    device: str
    vae_tiling: bool
    compile: bool = Field(False, description="Whether the transformer's repeated blocks were compiled.")
    backend: str = Field(description="Kernel requested for sparse calls.")
    break_even: str | None = Field(None, description="Break-even table; layers that it says wouldn't gain ran dense.")
    policy: PolicySection
    metrics: tuple[str, ...]
    yardsticks: tuple[str, ...] = Field((), description="Harmless changes that were measured beside the policy.")
    prompt_file: str | None
    prompts_hash: str = Field(description="SHA-256 of the list of prompts.")
    prompts_in_tune_set: tuple[str, ...] = Field(description="Also in the tune set, which inflates scores.")

    @model_validator(mode="before")
    @classmethod
    def _fill_short_name(cls, value: Any) -> Any:
        """An earlier version's `model_name` is the short name."""
        return (
            {"short_name": value["model_name"], **value} if isinstance(value, dict) and "model_name" in value else value
        )


class MetricStatistics(_Part):
    """Statistics of a metric over the prompts that rendered, identical pairs counted in; see the gate for psnr."""

    mean: float
    std: float | None = Field(description="Sample standard deviation; null for a single prompt.")
    min: float
    max: float
    ci95_low: float | None = Field(description="Lower end of the mean's 95% interval by Student's t; null likewise.")
    ci95_high: float | None = Field(description="Upper end of that interval; null likewise.")
    unit: str = Field(default="", description="Of the values.")
    higher_is_better: bool | None = Field(default=None, description="The metric's direction; null where unknown.")


def _with_psnr(metrics: dict[str, float]) -> dict[str, float]:
    if "psnr" not in metrics:
        raise ValueError("must hold psnr")
    return metrics


Metrics = Annotated[dict[str, float], AfterValidator(_with_psnr)]


class YardstickSection(_Part):
    """Metrics of a dense video with one harmless change."""

    dense: Metrics = Field(description="Of the changed video against the dense one.")
    sparse: Metrics = Field(description="Of the sparse video against the changed one.")


class PromptRow(_Part):
    """Row of one prompt; further metrics are numbers under their own names. A failed prompt has only `error`."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float]

    index: int
    prompt: str
    seed: int
    frame_cosine: float | None = None
    psnr: float | None = Field(default=None, description="dB over the whole video, 100 for identical videos.")
    frame_l1: float | None = None
    frame_diff: float | None = None
    sparsity: Fraction | None = None
    sparsity_active: Fraction | None = None
    seconds_dense: Seconds | None = None
    seconds_sparse: Seconds | None = None
    denoising_dense: Seconds | None = Field(None, description="Of dense steps timed just before the sparse ones.")
    denoising_sparse: Seconds | None = Field(None, description="Null, as above, where every pair is computed.")
    dense_cached: bool = Field(default=False, description="Whether the dense video was rendered by an earlier run.")
    worst_frame: int | None = Field(default=None, description="The frame with the lowest PSNR, from 0.")
    psnr_per_frame: tuple[float, ...] | None = Field(None, description="In dB, 100 for identical frames.")
    error: str | None = None
    unavailable: dict[str, str] = Field(default_factory=dict, description="Reasons of metrics without a value.")
    ladder: dict[Rung, Metrics] | None = Field(None, description="Of the dense video again, and at sparsity 0.")
    yardsticks: dict[str, YardstickSection] = Field(
        default_factory=dict, description="What harmless changes to the dense model do, by their name."
    )

    @property
    def metrics(self) -> dict[str, float]:
        """All metrics by name; empty when the prompt failed."""
        base = {name: getattr(self, name) for name in BASE_METRICS}
        return {name: value for name, value in (base | self.__pydantic_extra__).items() if value is not None}


class ConditionSection(_Part):
    """One bound of the gate; `measured` must be above `bound`, or below it where it is a maximum.

    Means are over the prompts whose videos differ. `pooled psnr` is the PSNR of their mean squared error.
    """

    name: str
    unit: str
    measured: float
    bound: float
    met: bool
    is_maximum: bool = Field(False, description="Whether lower is better, so that the bound is an upper one.")

    @property
    def relation(self) -> str:
        """How the measured value relates to the bound, e.g. `>`."""
        return relation(self.met, self.is_maximum)

    @property
    def wanted(self) -> str:
        """The bound as text, e.g. `> 35 dB`."""
        return f"{relation(True, self.is_maximum)} {self.bound:g} {self.unit}".rstrip()


class GateSection(_Part):
    """Whether the gate is passed on metrics; human review is still required."""

    passed: bool
    failures: tuple[str, ...]
    conditions: tuple[ConditionSection, ...]
    num_identical: int = Field(0, description="Prompts with identical videos, which means leave out unless all are.")


class SparsitySection(_Part):
    """Sparsity and speed-up; block pairs are counted over all prompts that rendered."""

    overall: Fraction | None = Field(description="Over all self-attention calls; null when no prompt rendered.")
    active: Fraction | None = Field(description="Over sparse calls only.")
    theoretical_speedup: float | None = Field(description="Of attention: 1 / (1 - overall).")
    measured_speedup: float | None = Field(description="Of the denoising, as `seconds` has it; null without that.")
    seconds_dense: Seconds | None = Field(description="Mean of a rendering.")
    seconds_sparse: Seconds | None = Field(description="Mean of a rendering.")
    blocks_run: Fraction | None = Field(None, description="Of the transformer blocks' forwards; 1 without a cache.")
    attention_computed: Fraction | None = Field(
        None, description="Of a dense generation's block pairs: neither left out nor in a block that a cache skipped."
    )
    blocks_run_by_step: tuple[float, ...] = ()
    by_layer: dict[str, float]
    by_step: tuple[float, ...] = Field(description="Block pairs not computed, skipped blocks counted in.")
    by_layer_and_step: dict[str, tuple[float, ...]] = Field(description="The same by layer.")
    by_head: dict[str, tuple[float, ...]]
    kernels: dict[str, str] = Field(description="Kernel that really ran, by layer.")
    num_calls: dict[str, int] = Field(description="Sparse, dense and fallback calls, and those that a cache skipped.")
    fallbacks: dict[str, int] = Field(description="Calls that fell back to dense, by reason.")


MIN_NOISE = 0.005
"""Relative noise of seconds that is assumed at least: few measurements can agree by chance."""


def is_faster(speedup: float, noise: float | None) -> bool:
    """Whether a speed-up is more than twice the noise, its relative standard error over the prompts."""
    return speedup > 1.0 + 2.0 * max(noise or 0.0, MIN_NOISE)


class SecondsSection(_Part):
    """Seconds of the denoising: dense steps were timed just before each sparse rendering, in the same process."""

    dense: Seconds = Field(description="Mean over the prompts.")
    sparse: Seconds = Field(description="Mean over the prompts.")
    speedup: float = Field(description="dense / sparse.")
    ci95_low: float | None = Field(
        description="Lower end of the 95% interval by Student's t of the prompts' mean speed-up; null for one prompt."
    )
    ci95_high: float | None = Field(description="Upper end of that interval; null for one prompt.")
    lowest: float | None = Field(None, description="The lowest speed-up of a prompt.")
    noise: float = Field(description="Relative standard error of the prompts' mean speed-up.")
    attention_share: Fraction = Field(description="Fraction of a dense step that self-attention takes.")
    ceiling: float = Field(description="Upper bound of the speed-up by any attention method: 1 / (1 - share).")

    @property
    def is_faster(self) -> bool:
        """Whether sparse is shown to be faster than dense, and by more than the noise; one prompt can't tell."""
        return self.ci95_low is not None and self.ci95_low > 1.0 and is_faster(self.speedup, self.noise)


class HandSetPoint(_Part):
    """One pair of thresholds for all heads, as a user without a tuner sets it, rendered on one prompt."""

    simthreshd1: float
    cdfthreshd: float
    sparsity: Fraction
    psnr: float = Field(description="In dB.")
    frame_cosine: float
    speedup: float | None = Field(description="Of the denoising; null where the kernel computes every pair.")
    meets_gate: bool = Field(description="On this prompt.")


class HandSetSection(_Part):
    """Hand-set thresholds beside a tuned policy, on the prompt whose PSNR is nearest to the tuned policy's mean."""

    prompt: int = Field(description="Its index.")
    points: tuple[HandSetPoint, ...] = Field(
        min_length=1, description="First the pair that saves as much attention, then pairs nearer to the gate."
    )

    @property
    def at_sparsity(self) -> HandSetPoint:
        """The pair that saves as much attention as the tuned policy."""
        return self.points[0]

    @property
    def at_gate(self) -> HandSetPoint | None:
        """The sparsest pair that meets the gate; None where none of those rendered did."""
        met = [point for point in self.points if point.meets_gate]
        return max(met, key=lambda point: point.sparsity, default=None)


class LayerSection(_Part):
    """One layer of the policy; thresholds are means over its sparse heads, null where none has them."""

    name: str = Field(description="Module path of the attention layer in the pipeline.")
    rule: str = Field(description="cdf or topk.")
    num_heads: int
    sparse_heads: int
    simthreshd1: float | None
    cdfthreshd: float | None
    topk: float | None
    pvthreshd: float | None
    orders: tuple[str, ...] = Field((), description="Token orders of its sparse heads, sorted.")


class EnvironmentSection(_Part):
    """Hardware and software of the run."""

    created: str = Field(description="UTC, ISO 8601.")
    platform: str
    device_name: str
    backend_reason: str | None = Field(None, description="Why that kernel was chosen.")
    num_threads: int = Field(description="Of PyTorch on the CPU.")
    versions: dict[str, str]
    git_commit: str | None
    seconds_total: Seconds = Field(description="The whole evaluation.")
    seconds_generation: Seconds = Field(description="Of rendering, summed over all workers.")
    workers: tuple[str, ...] = Field((), description="Host, GPU and device of each worker.")
    incidents: tuple[str, ...] = Field((), description="Workers lost or joined.")


class EvaluationResult(_Part):
    """Result of an evaluation; its JSON has exactly these sections."""

    schema_version: Literal[1] = SCHEMA_VERSION
    config: ConfigSection
    statistics: dict[str, MetricStatistics]
    detailed_results: tuple[PromptRow, ...]
    overall_score: int | None = Field(description="0 to 100; null when no prompt rendered.")
    verdict: Verdict | Literal["failed"] = Field(description="`failed` when no prompt rendered.")
    gate: GateSection
    sparsity: SparsitySection
    seconds: SecondsSection | None = Field(None, description="Null where the kernel computes every pair.")
    hand_set: HandSetSection | None = Field(None, description="Null where the tuner had no calibrated thresholds.")
    thresholds: tuple[LayerSection, ...] = Field(default=(), description="The policy by layer.")
    environment: EnvironmentSection

    @property
    def failed(self) -> tuple[PromptRow, ...]:
        """The prompts that failed."""
        return tuple(row for row in self.detailed_results if row.error is not None)

    @property
    def figures(self) -> dict[str, str]:
        """Seconds, sparsity, quality and gate as short texts; what wasn't measured is left out."""
        seconds, psnr, cosine = self.seconds, self.statistics.get("psnr"), self.statistics.get("frame_cosine")
        found: dict[str, Any] = {
            "seconds": seconds and f"{seconds.dense:.2f} -> {seconds.sparse:.2f} ({seconds.speedup:.2f}x)",
            "sparsity": None if self.sparsity.overall is None else f"{self.sparsity.overall:.3f}",
            "psnr": psnr and f"{psnr.mean:.2f} dB (worst {psnr.min:.2f})",
            "frame_cosine": cosine and f"{cosine.mean:.4f}",
            "verdict": self.verdict,
            "gate": "passed" if self.gate.passed else f"not met: {'; '.join(self.gate.failures)}",
        }
        return {name: text for name, text in found.items() if text}

    def __repr__(self) -> str:
        return short_repr(self, {"model": self.config.short_name, "prompts": self.config.num_prompts, **self.figures})

    __str__ = __repr__

    def _repr_html_(self) -> str:
        return html_table({"model": self.config.short_name, "prompts": self.config.num_prompts, **self.figures})

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON value."""
        value: dict[str, Any] = self.model_dump(mode="json")
        return value


def short_repr(of: object, figures: Mapping[str, object]) -> str:
    """Return a repr of some figures, for a value whose fields would fill pages."""
    return f"{type(of).__name__}({', '.join(f'{name}: {value}' for name, value in figures.items())})"


def html_table(figures: Mapping[str, object]) -> str:
    """Return some figures as an HTML table of two columns, for a notebook."""
    rows = (f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in figures.items())
    return f"<table>{''.join(rows)}</table>"


def save_result(result: EvaluationResult, path: Path) -> None:
    """Write a result as JSON, atomically."""
    write_json(path, result.to_dict())


def load_result(path: Path | str) -> EvaluationResult:
    """Read a result from its JSON file, or from a folder that holds one.

    Raises:
        ResultError: there is none or several, it is not a result, or a newer sparsetune wrote it.
    """
    path = Path(path)
    if not path.exists():
        raise ResultError(
            f"there is no result {path}{similar_path(path) or '; run `sparsetune eval`'}",
            is_usage=True,
        )
    if path.is_dir():
        found = sorted(path.glob(RESULT_GLOB))
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise ResultError(f"{path} must hold one {RESULT_GLOB} file, found {names}; pass the file itself")
        path = found[0]
    return read_versioned(path, EvaluationResult, SCHEMA_VERSION, "evaluation")


def read_versioned(path: Path, model: type[Model], version: int, kind: Literal["evaluation", "tuning"]) -> Model:
    """Read a JSON file as a pydantic model, after a check of its `schema_version`; ResultError says what to do."""
    again = f"run `sparsetune {'eval' if kind == 'evaluation' else 'tune'}` again"
    try:
        value = read_json(read_text(path))
    except (OSError, ValueError) as error:
        raise ResultError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}; {again}") from error
    found = value.get("schema_version") if isinstance(value, dict) else None
    if found != version:
        newer = isinstance(found, int) and found > version
        raise ResultError(
            f"{path} must be the JSON of sparsetune's {kind} with schema_version {version}, got {found}; "
            + ("update sparsetune" if newer else again)
        )
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ResultError(f"{path} is not a valid {kind} result: {where}: {first['msg']}; {again}") from error


def result_schema() -> dict[str, Any]:
    """Generate the JSON Schema of a result, as `SCHEMA_PATH` holds it."""
    schema = EvaluationResult.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def write_schema() -> None:
    """Regenerate `SCHEMA_PATH`, after a change to the models above."""
    write_json(SCHEMA_PATH, result_schema())
