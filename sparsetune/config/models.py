"""Pydantic models of the configuration: type, range, unit and default of every setting."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import platformdirs
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from sparsetune.config.files import configs_folder
from sparsetune.files import expand

Backend = Literal["auto", "reference", "sparge", "flex", "dense"]
Offload = Literal["none", "model", "sequential", "auto"]
Dtype = Literal["auto", "float32", "float16", "bfloat16"]
EngineName = Literal["local", "ray"]
Tuner = Literal["optuna", "calibrate", "builtin"]
Sampler = Literal["tpe", "gp", "nsga2", "cmaes", "random"]
Goal = Literal["sparsity", "speed", "pareto"]
Objective = Literal["auto", "sparsity", "speed", "pareto"]
KeepText = Literal["always", "never", "search"]
Caches = Literal["none", "auto", "first_block", "mag", "taylorseer", "sea"]
Space = Literal["budget", "raw"]
GatePreset = Literal["strict", "trajectory", "quality"]
TrialVideos = Literal["none", "worst", "all"]
Granularity = Literal["global", "group", "layer", "served", "uniform"]
Rule = Literal["cdf", "topk"]
Order = Literal["raster", "fwh", "hfw", "hwf", "wfh", "whf", "tiles", "cubes", "hilbert", "hilbert3d"]


def _yaml_no(value: Any) -> Any:
    return "no" if value is False else value  # YAML reads a bare `no` as False


# Of any setting: a clock, a wait and a kernel's integers overflow far beyond what is of use.
_MAX_NUMBER = 2**31

RandomWeights = Annotated[Literal["no", "full", "tiny"], BeforeValidator(_yaml_no)]
LocalPath = Annotated[Path, AfterValidator(expand)]  # with `~` expanded
FolderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
Workers = Annotated[str, BeforeValidator(str), Field(pattern=r"^(auto|[1-9]\d*)$")]
Yardstick = Annotated[str, Field(pattern=r"^(kernel|dtype|fp8|seed|steps=[1-9]\d*)$")]
MetricBounds = tuple[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*\??=[-+.\deE]+$")], ...]
MetricNames = Annotated[tuple[str, ...], Field(min_length=1)]


DEFAULT_METRICS = (
    "frame_cosine", "psnr", "frame_l1", "frame_diff", "psnr_frame_mean", "psnr_frame_min", "ssim", "ms_ssim", "vmaf",
    "xpsnr",
)  # fmt: skip
"""Metrics that need no download; computing them takes seconds for 49 x 480 x 720."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    @field_validator("*")
    @classmethod
    def _is_usable(cls, value: Any) -> Any:
        if isinstance(value, int | float) and abs(value) > _MAX_NUMBER:
            raise PydanticCustomError("too_large", "Number should be at most 2147483648")
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise PydanticCustomError("no_text", "Text should be UTF-8")
        return value


class ModelConfig(_Section):
    """The model, and how it is loaded."""

    name: FolderName = Field("demo", description="Short name of the model, and of its results folder.")
    source: str = Field(
        "demo", min_length=1, description="`demo` (included), a local folder in diffusers' layout, or a hub id."
    )
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    random_weights: RandomWeights = Field(
        "no", description="Build the model with random weights, without a download: full size, or tiny."
    )
    dtype: Dtype = Field("auto", description="Data type of the weights; auto is bfloat16 on a GPU, float32 on a CPU.")
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N; auto uses a GPU if there is one.")
    offload: Offload = Field(
        "none", description="Keep idle modules in CPU memory; auto does so if GPU memory is too small."
    )
    vae_tiling: bool = Field(False, description="Decode frames in tiles: less memory, slightly slower.")
    vae_slicing: bool = Field(False, description="Decode one video of a batch at a time: less memory.")
    lora: str | None = Field(
        None,
        min_length=1,
        description="LoRA to fuse into the weights: a file, a folder, or a hub id, with a file or folder of it after "
        "another slash, e.g. for few steps.",
    )
    lora_scale: float = Field(1.0, description="Weight of the LoRA.")
    flow_shift: float | None = Field(
        None, gt=0.0, description="Shift of a flow-matching scheduler's sigmas; null is the model's own."
    )
    compile: bool = Field(
        False, description="Compile the transformer's repeated blocks (torch.compile), for dense and sparse alike."
    )

    @property
    def results_folder(self) -> Path:
        """Default folder of the model's results: results/NAME."""
        return Path("results") / self.name


class GenerationConfig(_Section):
    """Settings of a generation; the defaults are those recommended for CogVideoX-2b."""

    num_frames: int = Field(49, gt=0, description="Frames per video.")
    height: int = Field(480, gt=0, description="Frame height in pixels.")
    width: int = Field(720, gt=0, description="Frame width in pixels.")
    num_inference_steps: int = Field(50, gt=0, description="Denoising steps.")
    guidance_scale: float = Field(6.0, ge=0.0, description="Classifier-free guidance; 1 or less turns it off.")
    guidance_scale_2: float | None = Field(
        None, ge=0.0, description="Guidance of a second transformer (Wan 2.2 A14B); null is the same as the first."
    )
    sigmas: tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...] = Field(
        (), description="Noise levels of the steps that a model was distilled to; empty is the pipeline's own."
    )
    fps: int = Field(8, gt=0, le=240, description="Frames per second of the video files.")
    negative_prompt: str = Field("", description="Negative prompt; empty is the pipeline's own.")
    max_sequence_length: int | None = Field(
        None, gt=0, description="Maximum number of text tokens; null is the pipeline's own."
    )


ENGINE_GRANULARITIES = ("served", "uniform")
_SERVED: Mapping[str, Any] = {
    "orders": ("raster",), "rules": ("topk",), "keep_text": "never", "select_partial": False, "caches": ("none",),
}  # fmt: skip
"""What engines run that call SpargeAttn's kernel as it is; the user's own settings take precedence."""


class TuneConfig(_Section):
    """Settings of the threshold search."""

    tuner: Tuner = Field(
        "optuna",
        description="optuna searches on rendered videos; calibrate finds each head's thresholds for a fixed error "
        "bound; builtin is SpargeAttn's own search.",
    )
    n_trials: int = Field(30, gt=0, description="Total trials, including earlier runs.")
    num_prompts: int = Field(4, description="Prompts per trial, from the top of the file.")
    validation_prompts: int = Field(
        4,
        ge=0,
        description="Further prompts of the file on which the winner has to meet the gate too, up to as many as it "
        "has; 0 skips that. Only optuna uses them.",
    )
    prompt_file: LocalPath = Field(
        default_factory=lambda: configs_folder() / "prompts" / "tune.txt",
        description="Prompts to tune on: one a line, or YAML, JSON or CSV with images.",
    )
    seed: int = Field(42, ge=0, le=2**31, description="Seed of the videos and of the search.")
    sampler: Sampler = Field("tpe", description="Optuna's sampler.")
    objective: Objective = Field(
        "auto",
        description="What to maximise among trials that pass the gate: measured speed, sparsity, or sparsity and PSNR; "
        "auto is speed where the kernel skips work or caches are searched, and sparsity elsewhere.",
    )
    space: Space = Field("budget", description="Search calibrated error budgets, or thresholds directly.")
    granularity: Granularity = Field(
        "group",
        description="One choice for all layers, for three groups, or for each layer; or what serving engines take: "
        "one threshold for all heads beside dense layers (served), or for all heads and layers (uniform). These two "
        "also default to topk in raster order without a cache, and to SpargeAttn's treatment of text and last blocks.",
    )
    schedule: bool = Field(
        True,
        description="Use more sparsity in less sensitive denoising steps; with granularity served or uniform, "
        "run first and last steps dense.",
    )
    orders: Annotated[tuple[Order, ...], Field(min_length=1)] = Field(
        ("raster", "hfw", "wfh", "whf", "hilbert"),
        description="Token orders to choose from for each head; `all` for every one.",
    )
    caches: Annotated[tuple[Caches, ...], Field(min_length=1)] = Field(
        ("auto",),
        description="Step caches to search together with sparsity, which skip whole blocks: none, auto for all that "
        "work on the model, or some of first_block, mag, taylorseer and sea. Only optuna searches them, and only for "
        "speed.",
    )
    rules: Annotated[tuple[Rule, ...], Field(min_length=1)] = Field(("cdf",), description="Mask rules to choose from.")
    keep_text: KeepText = Field(
        "always", description="Keep all key blocks of the text: always, never (as SpargeAttn), or search both."
    )
    skip_pv: bool = Field(False, description="Also search pvthreshd, which skips work that sparsity does not count.")
    select_partial: bool = Field(
        True, description="Select a partial last block like any other; SpargeAttn always computes it."
    )
    calibration_steps: int = Field(6, gt=0, description="Denoising steps that calibration samples.")
    probe_prompts: int = Field(
        2, ge=0, description="Prompts on which the sensitivity of each part of the generation is measured; 0 skips it."
    )
    l1: float = Field(0.06, gt=0.0, le=1.0, description="calibrate, builtin: bound of each head's relative L1 error.")
    pv_l1: float = Field(0.065, gt=0.0, le=1.0, description="The same with pvthreshd in use; must exceed l1.")
    parallel_tune: bool = Field(False, description="builtin: search heads in parallel on the GPUs of this host.")
    margin_db: float = Field(
        2.5, ge=0.0, description="Margin in dB added to the gate's PSNR bounds while tuning, since eval prompts differ."
    )
    storage: str | None = Field(None, description="Optuna storage URL; null is SQLite beside the tracking store.")
    study_name: str | None = Field(
        None, description="Study to start or resume; null derives the name from the settings."
    )
    max_minutes: float | None = Field(
        None, gt=0.0, description="Time limit in minutes; ends after the current prompt, with the best so far."
    )

    @model_validator(mode="before")
    @classmethod
    def _what_engines_take(cls, data: Any) -> Any:
        is_served = isinstance(data, dict) and data.get("granularity") in ENGINE_GRANULARITIES
        return {**_SERVED, **data} if is_served else data

    @field_validator("orders", mode="before")
    @classmethod
    def _all_orders(cls, value: Any) -> Any:
        return get_args(Order) if value in ("all", ("all",), ["all"]) else value

    @model_validator(mode="after")
    def _caches_fit(self) -> Self:
        if len(self.caches) > 1 and {"none", "auto"} & set(self.caches):
            raise ValueError(f"tune.caches must be none, auto, or names of caches, got {', '.join(self.caches)}")
        if {"none", "auto"} & set(self.caches):
            return self
        if self.tuner != "optuna":
            raise ValueError(f"only --tuner optuna searches caches, got {self.tuner}; use --caches none")
        if self.objective not in ("auto", "speed"):
            raise ValueError(
                f"caches save seconds, not block pairs, but tune.objective is {self.objective}; use --objective speed"
            )
        return self

    @model_validator(mode="after")
    def _granularity_fits(self) -> Self:
        if self.granularity in ENGINE_GRANULARITIES and (self.tuner, self.space) != ("optuna", "budget"):
            raise ValueError(
                f"granularity {self.granularity} needs --tuner optuna and --space budget, got {self.tuner} and "
                f"{self.space}"
            )
        return self

    @property
    def searches_caches(self) -> bool:
        """Whether step caches are wanted of a search that has a use for them."""
        return self.caches != ("none",) and self.tuner == "optuna" and self.objective in ("auto", "speed")

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        if self.pv_l1 <= self.l1:
            raise ValueError(
                f"tune.pv_l1 must exceed tune.l1, since it bounds both errors, got {self.pv_l1:g} and {self.l1:g}; "
                "raise --pv-l1"
            )
        return self


class EvalConfig(_Section):
    """Settings of an evaluation against the dense model."""

    num_prompts: int = Field(5, description="Prompts to render, from the top of the file.")
    prompt_file: LocalPath = Field(
        default_factory=lambda: configs_folder() / "prompts" / "eval.txt",
        description="Prompts to evaluate on: one a line, or YAML, JSON or CSV with images.",
    )
    seed: int = Field(42, ge=0, le=2**31, description="Seed of every video.")
    output_dir: LocalPath | None = Field(
        None, description="Folder for result, videos and report; null is results/MODEL/eval."
    )
    save_videos: bool = Field(True, description="Write dense, sparse and side-by-side videos.")
    metrics: MetricNames = Field(
        DEFAULT_METRICS, description="Metrics to compute, by name; custom ones are always computed."
    )
    metric_modules: tuple[str, ...] = Field(
        (), description="Python files or modules with custom metrics, imported first."
    )
    yardsticks: tuple[Yardstick, ...] = Field(
        (),
        description="Harmless changes to measure beside the policy: kernel, dtype, fp8, seed, or all of these; steps=N "
        "is a dense video of N steps. One more rendering each per prompt.",
    )
    lpips_weights: LocalPath | None = Field(
        None, description="File of AlexNet's weights for the metric lpips; null is the one in torch's cache."
    )
    ladder: bool = Field(
        False, description="Also measure noise and kernel rounding error: two more renderings per prompt."
    )

    @field_validator("yardsticks", mode="before")
    @classmethod
    def _all_yardsticks(cls, value: Any) -> Any:
        return ("kernel", "dtype", "fp8", "seed") if value in ("all", ("all",), ["all"]) else value


GATE_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "strict": {},
    "trajectory": {
        "min_psnr": 25.0, "min_psnr_worst": 20.0, "min_metrics": ("ssim=0.85",), "max_metrics": ("lpips?=0.15",),
    },
    "quality": {
        "min_frame_cosine": 0.9, "min_psnr": 20.0, "min_psnr_worst": None, "min_metrics": ("vmaf=80",),
    },
}  # fmt: skip
"""What each preset sets beyond the defaults.

trajectory is about what sparse attention for servers is published with (SVG2 on Wan2.1-14B: 25.8 dB, SSIM .854, LPIPS
.138); quality is `good` on VMAF's scale, with bounds that exclude another video altogether.
"""


class GateConfig(_Section):
    """Quality thresholds for deployment; a preset sets those that aren't given."""

    preset: GatePreset = Field(
        "strict",
        description="strict: interchangeable videos, by PSNR; trajectory: the same video, by SSIM and LPIPS; quality: "
        "as good a video, by VMAF. Other gate options change single bounds.",
    )
    min_frame_cosine: float = Field(0.95, ge=-1.0, le=1.0, description="Mean frame_cosine must be above this.")
    min_psnr: float = Field(35.0, ge=0.0, description="Mean and pooled psnr must be above this, in dB.")
    min_psnr_worst: float | None = Field(
        28.0, ge=0.0, description="psnr of the worst prompt must be above this, in dB; null is no bound."
    )
    min_psnr_frame: float | None = Field(None, ge=0.0, description="PSNR of the worst frame must be above this, in dB.")
    min_metrics: MetricBounds = Field(
        (),
        description="Means of metrics that must be above a bound, e.g. ssim=.9; NAME?=VALUE where it can be computed.",
    )
    max_metrics: MetricBounds = Field(
        (), description="Means of metrics that must be below a bound, where lower is better, e.g. lpips=.1."
    )

    @model_validator(mode="before")
    @classmethod
    def _of_preset(cls, given: Any) -> Any:
        preset = given.get("preset", "strict") if isinstance(given, dict) else None
        return {**GATE_PRESETS.get(preset, {}), **given} if isinstance(preset, str) else given

    @property
    def bounds(self) -> dict[str, Any]:
        """The bounds by name, as the arguments of `sparsetune.metrics.Gate`."""
        return self.model_dump(exclude={"preset"})


class PromotionConfig(_Section):
    """What a candidate may lose against the champion, and against the first champion under the same gate."""

    margin_db: float = Field(
        0.5, gt=0.0, description="Mean loss of psnr in dB that is accepted; it must be shown to be smaller."
    )
    margin_worst_db: float = Field(3.0, gt=0.0, description="Loss of psnr in dB that is accepted on any prompt.")
    margin_speed: float = Field(
        0.02, gt=0.0, lt=1.0, description="Fraction of the speed-up that may be lost; shown to be smaller likewise."
    )


class TrackingConfig(_Section):
    """Tracking of runs in MLflow."""

    enabled: bool = Field(True, description="Record runs in MLflow.")
    uri: str | None = Field(None, description="MLflow tracking URI; null is MLFLOW_TRACKING_URI, then SQLite in root.")
    experiment: str | None = Field(None, description="MLflow experiment; null names it after the model.")
    root: LocalPath = Field(Path("mlruns"), description="Folder of the default tracking store.")
    trial_videos: TrialVideos = Field(
        "worst",
        description="Side-by-side videos of every trial: none, of its worst prompt (of every prompt for the best three "
        "so far), or of all.",
    )
    report: bool = Field(
        True, description="Write report.html for every tuning and evaluation, and record it with its figures."
    )


class EngineConfig(_Section):
    """Execution in this process, or by Ray workers that each load the model."""

    name: EngineName = Field(
        "local", description="local runs in this process, ray on many workers (needs sparsetune[ray])."
    )
    workers: Workers = Field(
        "auto",
        description="ray: number of workers; auto is one per GPU, or per core up to 8 a host, also as hosts join.",
    )
    gpus_per_worker: float | None = Field(
        None, gt=0.0, description="ray: GPUs per worker; null is 1, or 0 for a model on the CPU."
    )
    threads_per_worker: int | None = Field(
        None, gt=0, description="ray: CPU threads per worker; null divides a host's cores among its workers."
    )
    ray_address: str | None = Field(
        None, description="ray: HOST:PORT of a cluster, or auto for the one on this host; null starts Ray locally."
    )
    mixed_gpus: bool = Field(
        False, description="ray: allow --objective speed on several GPU models, whose times are not comparable."
    )
    start_seconds: float = Field(
        120.0, gt=0.0, description="ray: timeout in seconds for the cluster to answer and workers to start."
    )
    load_seconds: float = Field(
        3600.0, gt=0.0, description="ray: timeout in seconds for a worker to load the model, including its download."
    )


class CacheConfig(_Section):
    """Cache of dense baselines."""

    dir: LocalPath | None = Field(None, description="Folder of the dense baselines; null is the user's cache folder.")
    max_gb: float = Field(
        20.0, gt=0.0, description="Maximum size in GB; the least recently used baselines are deleted first."
    )

    @property
    def folder(self) -> Path:
        """`dir`, or sparsetune's folder in the user's cache folder."""
        return self.dir if self.dir is not None else platformdirs.user_cache_path("sparsetune") / "baselines"


class Config(_Section):
    """All settings."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    generation: GenerationConfig = Field(default_factory=GenerationConfig)
    tune: TuneConfig = Field(default_factory=TuneConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    gate: GateConfig = Field(default_factory=GateConfig)
    promotion: PromotionConfig = Field(default_factory=PromotionConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    cache: CacheConfig = Field(default_factory=CacheConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    backend: Backend = Field("auto", description="Sparse attention backend; auto is the fastest available.")
    break_even: LocalPath | None = Field(
        None, description="Table of `sparsetune bench`: layers that would not gain run dense; null disables this."
    )
