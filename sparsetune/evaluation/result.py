"""The result of an evaluation: what its JSON holds, read and written."""

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparsetune.errors import ResultError
from sparsetune.files import write_json
from sparsetune.metrics import BASE_METRICS, Verdict

Model = TypeVar("Model", bound=BaseModel)


def read_versioned(path: Path, model: type[Model], version: int, kind: Literal["evaluation", "tuning"]) -> Model:
    """Read a file that sparsetune wrote.

    Args:
        path: the file.
        model: what it holds.
        version: the `schema_version` that this sparsetune knows.
        kind: what the file says of itself, for messages.

    Raises:
        ResultError: it can't be read, is something else, or a newer sparsetune wrote it.
    """
    article, command = {"evaluation": ("an", "sparsetune eval"), "tuning": ("a", "sparsetune tune")}[kind]
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ResultError(
            f"{path} must be the JSON of {article} {kind}, but: {reason}; run `{command}` anew"
        ) from error
    found = value.get("schema_version") if isinstance(value, dict) else None
    if found != version:
        newer = isinstance(found, int) and found > version
        raise ResultError(
            f"{path} must be {article} {kind} with schema_version {version}, but has {found}; "
            f"{'update sparsetune' if newer else f'run `{command}`'}"
        )
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ResultError(
            f"{path} must hold a whole {kind}, but {where}: {first['msg']}; run `{command}` anew"
        ) from error


SCHEMA_VERSION: Final = 1
"""Raised whenever a field of the JSON changes its meaning or goes away."""

SCHEMA_PATH: Final = Path(__file__).parent / "result.schema.json"
"""The JSON Schema of a result, shipped with the package."""

RESULT_GLOB: Final = "*_accuracy_*.json"

Rung = Literal["dense_again", "kernel"]
"""The lower rungs of the attribution ladder: the dense video rendered again, and the kernel at sparsity 0."""

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Seconds = Annotated[float, Field(ge=0.0)]


class _Part(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, json_schema_serialization_defaults_required=True
    )


class ModelSection(_Part):
    """Which model rendered."""

    source: str = Field(description="`demo`, a folder or a hub id.")
    revision: str | None = Field(description="Commit or tag on the hub.")
    fingerprint: str = Field(description="Hash of the weights.")
    pipeline_class: str
    transformer_class: str
    num_layers: int = Field(description="Self-attention layers.")
    num_heads: int = Field(description="Attention heads of all layers together.")
    random_weights: str = Field("no", description="full or tiny where it was built with random weights, else no.")


class Spread(_Part):
    """Mean and range of a threshold over the sparse heads."""

    mean: float
    min: float
    max: float


class PolicySection(_Part):
    """The policy in brief; the checkpoint holds all of it."""

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
    drop_scale: Spread | None = Field(
        None, description="Factors on what the thresholds leave out, by denoising step; null is 1 throughout."
    )
    order: str = Field(description="Token order; all of them where layers differ.")
    keep_text: bool = Field(description="Whether key blocks with text tokens are always computed.")
    select_partial: bool = Field(False, description="Whether a partial last block is chosen like any other.")


class ConfigSection(_Part):
    """Everything that decides the numbers, and so what they may be compared with."""

    model_name: str
    use_tuned: bool = Field(description="False tests SpargeAttn's default thresholds.")
    num_prompts: int
    seed: int = Field(description="Of every prompt's dense and sparse rendering.")
    tuned_path: str | None = Field(description="The checkpoint, as it was given.")
    tuner: str | None = Field(description="What found the checkpoint's policy.")
    model: ModelSection
    height: int
    width: int
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float | None = Field(None, description="Of a second transformer; null is that of the first.")
    negative_prompt: str
    max_sequence_length: int | None
    scheduler: str = Field(description="Class and a hash of its configuration.")
    dtype: str
    device: str
    vae_tiling: bool
    backend: str = Field(description="The kernel that sparse calls were to run on.")
    break_even: str | None = Field(None, description="Table by which layers that wouldn't gain ran dense.")
    policy: PolicySection
    metrics: tuple[str, ...]
    prompt_file: str | None
    prompts_hash: str = Field(description="SHA-256 of the list of prompts.")
    prompts_in_tune_set: tuple[str, ...] = Field(
        description="Prompts that the policy may have been tuned on; a result on these flatters it."
    )


class MetricStatistics(_Part):
    """A metric over the prompts that rendered."""

    mean: float
    std: float
    min: float
    max: float
    ci95_low: float = Field(description="Lower end of the 95 % bootstrap interval of the mean.")
    ci95_high: float = Field(description="Upper end of the 95 % bootstrap interval of the mean.")
    unit: str = Field(default="", description="Of the values.")
    higher_is_better: bool | None = Field(default=None, description="The metric's direction; None where unknown.")


class PromptRow(_Part):
    """One prompt; every further metric is a number under its own name.

    A prompt that failed has `error`, and no number.
    """

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
    dense_cached: bool = Field(default=False, description="Whether the dense video was rendered by an earlier run.")
    worst_frame: int | None = Field(default=None, description="The frame with the lowest PSNR, from 0.")
    psnr_per_frame: tuple[float, ...] | None = Field(
        default=None, description="PSNR in dB of every frame by itself, 100 for identical frames."
    )
    error: str | None = None
    unavailable: dict[str, str] = Field(
        default_factory=dict, description="Metrics that can't be computed here, with the reason."
    )
    ladder: dict[Rung, dict[str, float]] | None = Field(
        default=None, description="The same metrics of the dense video rendered again and of the kernel at sparsity 0."
    )

    @property
    def metrics(self) -> dict[str, float]:
        """Every metric of the prompt by name; empty when it failed."""
        base = {name: getattr(self, name) for name in BASE_METRICS}
        return {name: value for name, value in (base | self.__pydantic_extra__).items() if value is not None}


class ConditionSection(_Part):
    """One bound of the gate; `measured` must be above `bound`."""

    name: str
    unit: str
    measured: float
    bound: float
    met: bool


class GateSection(_Part):
    """Whether the numbers permit to deploy; a person's look at the videos comes on top."""

    passed: bool
    failures: tuple[str, ...]
    conditions: tuple[ConditionSection, ...]


class SparsitySection(_Part):
    """What was not computed, and what that saved; block pairs are counted over all prompts that rendered."""

    overall: Fraction | None = Field(description="Over all self-attention calls; None when no prompt rendered.")
    active: Fraction | None = Field(description="Over the sparse calls only.")
    theoretical_speedup: float | None = Field(description="Of attention: 1 / (1 - overall).")
    measured_speedup: float | None = Field(
        description="Of renderings: the fastest dense over the fastest sparse one; null with the reference kernel."
    )
    seconds_dense: Seconds | None = Field(description="Mean of a rendering.")
    seconds_sparse: Seconds | None = Field(description="Mean of a rendering.")
    by_layer: dict[str, float]
    by_step: tuple[float, ...]
    by_layer_and_step: dict[str, tuple[float, ...]]
    by_head: dict[str, tuple[float, ...]]
    kernels: dict[str, str] = Field(description="The kernel that really ran, by layer.")
    num_calls: dict[str, int] = Field(description="Sparse, dense and fallback calls.")
    fallbacks: dict[str, int] = Field(description="Calls that fell back to dense, by reason.")


class LayerSection(_Part):
    """One layer of the policy; thresholds are means over its sparse heads, null where it has none of the kind."""

    name: str = Field(description="The attention module's path from the pipeline.")
    rule: str = Field(description="cdf or topk.")
    num_heads: int
    sparse_heads: int
    simthreshd1: float | None
    cdfthreshd: float | None
    topk: float | None
    pvthreshd: float | None
    orders: tuple[str, ...] = Field((), description="Token orders of its sparse heads, sorted.")


class EnvironmentSection(_Part):
    """Where and when it ran."""

    created: str = Field(description="UTC, ISO 8601.")
    platform: str
    device_name: str
    backend_reason: str | None = Field(None, description="Why the sparse calls ran on that kernel.")
    num_threads: int = Field(description="Of PyTorch on the CPU.")
    versions: dict[str, str]
    git_commit: str | None
    seconds_total: Seconds = Field(description="The whole evaluation.")
    seconds_generation: Seconds = Field(
        description="Of those, the ones spent rendering; added up over the workers, so more where there are several."
    )
    workers: tuple[str, ...] = Field((), description="Who rendered: host, GPU and device of each worker.")
    incidents: tuple[str, ...] = Field((), description="What happened to workers: one lost, one joined.")


class EvaluationResult(_Part):
    """The whole result; its JSON has exactly these sections."""

    schema_version: Literal[1] = SCHEMA_VERSION
    config: ConfigSection
    statistics: dict[str, MetricStatistics]
    detailed_results: tuple[PromptRow, ...]
    overall_score: int | None = Field(description="0 to 100; None when no prompt rendered.")
    verdict: Verdict | Literal["failed"] = Field(description="`failed` when no prompt rendered.")
    gate: GateSection
    sparsity: SparsitySection
    thresholds: tuple[LayerSection, ...] = Field(
        default=(), description="The policy layer by layer; empty in results of versions before this field."
    )
    environment: EnvironmentSection

    @property
    def failed(self) -> tuple[PromptRow, ...]:
        """The prompts that have no numbers."""
        return tuple(row for row in self.detailed_results if row.error is not None)

    def to_dict(self) -> dict[str, Any]:
        """Give the JSON's value."""
        value: dict[str, Any] = self.model_dump(mode="json")
        return value


def save_result(result: EvaluationResult, path: Path) -> None:
    """Write a result as JSON, whole or not at all."""
    write_json(path, result.to_dict())


def load_result(path: Path | str) -> EvaluationResult:
    """Read a result from its JSON file, or from a folder that holds one.

    Raises:
        ResultError: there is none or several, it is not a result, or a newer sparsetune wrote it.
    """
    file = _find(Path(path))
    return read_versioned(file, EvaluationResult, SCHEMA_VERSION, "evaluation")


def result_schema() -> dict[str, Any]:
    """Generate the JSON Schema of a result; `SCHEMA_PATH` holds it, and a test keeps the two equal."""
    schema = EvaluationResult.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def write_schema() -> None:
    """Write `SCHEMA_PATH` anew, after a change to the models above."""
    write_json(SCHEMA_PATH, result_schema())


def _find(path: Path) -> Path:
    if not path.is_dir():
        if not path.exists():
            raise ResultError(f"a result must be a JSON file or a folder that holds one, but there is no {path}")
        return path
    found = sorted(path.glob(RESULT_GLOB))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ResultError(f"{path} must hold one {RESULT_GLOB} file, but holds {names}; name the file itself")
    return found[0]
