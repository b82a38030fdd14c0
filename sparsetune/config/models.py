"""Pydantic models of the configuration: type, range, unit and default of every setting."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import platformdirs
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from sparsetune.config.files import configs_folder

Backend = Literal["auto", "reference", "sparge", "flex", "dense"]
Offload = Literal["none", "model", "sequential", "auto"]
Dtype = Literal["auto", "float32", "float16", "bfloat16"]
EngineName = Literal["local", "ray"]
Tuner = Literal["optuna", "calibrate", "builtin"]
Sampler = Literal["tpe", "gp", "nsga2", "cmaes", "random"]
Goal = Literal["sparsity", "speed", "pareto"]
KeepText = Literal["always", "never", "search"]
Space = Literal["budget", "raw"]
Granularity = Literal["global", "group", "layer"]
Rule = Literal["cdf", "topk"]
Order = Literal["raster", "fwh", "hfw", "hwf", "wfh", "whf", "tiles", "cubes", "hilbert", "hilbert3d"]


def _yaml_no(value: Any) -> Any:
    return "no" if value is False else value  # YAML reads a bare `no` as False


RandomWeights = Annotated[Literal["no", "full", "tiny"], BeforeValidator(_yaml_no)]
LocalPath = Annotated[Path, AfterValidator(Path.expanduser)]
"""A path with `~` expanded."""
FolderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
Workers = Annotated[str, BeforeValidator(str), Field(pattern=r"^(auto|[1-9]\d*)$")]
"""A number of workers, or auto."""
MetricNames = Annotated[tuple[str, ...], Field(min_length=1)]


DEFAULT_METRICS = (
    "frame_cosine", "psnr", "frame_l1", "frame_diff", "psnr_frame_mean", "psnr_frame_min", "ssim", "ms_ssim", "vmaf",
    "xpsnr",
)  # fmt: skip
"""Metrics that need no download; computing them takes seconds for 49 x 480 x 720."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class ModelConfig(_Section):
    """The model, and how it is loaded."""

    name: FolderName = Field("demo", description="Short name of the model; names its folder of results.")
    source: str = Field(
        "demo", min_length=1, description="`demo` (embedded), a local folder in the hub's layout, or a hub id."
    )
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    random_weights: RandomWeights = Field(
        "no", description="Build the model with random weights, without a download: at full size, or tiny."
    )
    dtype: Dtype = Field("auto", description="Weights' data type; auto is bfloat16 on a GPU, float32 on a CPU.")
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N; auto takes a GPU where there is one.")
    offload: Offload = Field("none", description="Keep idle modules off the GPU; auto does when its memory is short.")
    vae_tiling: bool = Field(False, description="Decode frames in tiles: less memory, a little slower.")
    vae_slicing: bool = Field(False, description="Decode one video of a batch at a time: less memory.")

    @property
    def results_folder(self) -> Path:
        """Default folder of the model's results: results/NAME."""
        return Path("results") / self.name


class GenerationConfig(_Section):
    """Settings of a generation; the defaults are those recommended for CogVideoX-2b."""

    num_frames: int = Field(49, gt=0, description="Frames of a video.")
    height: int = Field(480, gt=0, description="Height of a frame in pixels.")
    width: int = Field(720, gt=0, description="Width of a frame in pixels.")
    num_inference_steps: int = Field(50, gt=0, description="Denoising steps.")
    guidance_scale: float = Field(6.0, ge=0.0, description="Classifier-free guidance; 1 or less turns it off.")
    guidance_scale_2: float | None = Field(
        None, ge=0.0, description="Guidance of a second transformer (Wan 2.2 A14B); null is that of the first."
    )
    fps: int = Field(8, gt=0, le=240, description="Frames a second of the video files.")
    negative_prompt: str = Field("", description="What guidance steers away from; empty is the pipeline's own.")
    max_sequence_length: int | None = Field(None, gt=0, description="Text tokens; null is the pipeline's own.")


class TuneConfig(_Section):
    """Settings of the threshold search."""

    tuner: Tuner = Field(
        "optuna",
        description="optuna searches on rendered videos; calibrate searches each head's at a bound on its error; "
        "builtin is SpargeAttn's own search.",
    )
    n_trials: int = Field(30, gt=0, description="Trials of the study, those of earlier runs counted in.")
    num_prompts: int = Field(4, description="Prompts that a trial renders, from the top of the file.")
    prompt_file: LocalPath = Field(
        default_factory=lambda: configs_folder() / "prompts" / "tune.txt",
        description="Prompts to search on: one a line, or YAML or JSONL with images.",
    )
    seed: int = Field(42, ge=0, le=2**31, description="Seed of the videos and of the search.")
    sampler: Sampler = Field("tpe", description="Optuna's sampler.")
    objective: Goal = Field(
        "sparsity", description="What the gate's passers compete in: sparsity, measured speed, or sparsity and PSNR."
    )
    space: Space = Field("budget", description="Search calibrated error budgets, or raw thresholds.")
    granularity: Granularity = Field("group", description="One choice for all layers, three groups, or each layer.")
    schedule: bool = Field(True, description="Let steps that bear it drop more than others.")
    orders: Annotated[tuple[Order, ...], Field(min_length=1)] = Field(
        ("raster", "hfw", "wfh", "whf", "hilbert"),
        description="Token orders to choose from, a head at a time; `all` for every one.",
    )
    rules: Annotated[tuple[Rule, ...], Field(min_length=1)] = Field(("cdf",), description="Mask rules to choose from.")
    keep_text: KeepText = Field(
        "always", description="Compute the text's key blocks always, never (SpargeAttn's way), or search both."
    )
    skip_pv: bool = Field(False, description="Search pvthreshd too, which skips work that sparsity doesn't count.")
    select_partial: bool = Field(
        True, description="Choose a partial last block like any other; SpargeAttn always computes it."
    )
    calibration_steps: int = Field(6, gt=0, description="Denoising steps that calibration samples.")
    probe_prompts: int = Field(
        2, ge=0, description="Prompts on which each part of the generation is tried alone; 0 treats all parts alike."
    )
    l1: float = Field(0.06, gt=0.0, le=1.0, description="calibrate, builtin: bound on each head's relative L1 error.")
    pv_l1: float = Field(0.065, gt=0.0, le=1.0, description="The same with pvthreshd at work; must exceed l1.")
    parallel_tune: bool = Field(False, description="builtin: search heads in parallel over the GPUs of this host.")
    margin_db: float = Field(
        2.5, ge=0.0, description="Raise the gate's PSNR bounds by so many dB while searching: eval prompts differ."
    )
    storage: str | None = Field(None, description="Optuna storage URL; null is SQLite beside the tracking store.")
    study_name: str | None = Field(None, description="Study to start or resume; null names it after its settings.")
    max_minutes: float | None = Field(
        None, gt=0.0, description="End after so many minutes, at the next prompt's end, with the best so far."
    )

    @field_validator("orders", mode="before")
    @classmethod
    def _all_orders(cls, value: Any) -> Any:
        return get_args(Order) if value in ("all", ("all",), ["all"]) else value

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
        description="Prompts to judge by: one a line, or YAML or JSONL with images.",
    )
    seed: int = Field(42, ge=0, le=2**31, description="Seed of every video.")
    output_dir: LocalPath | None = Field(
        None, description="Folder of result, videos, report; null is results/MODEL/eval."
    )
    save_videos: bool = Field(True, description="Write dense, sparse and side-by-side videos.")
    metrics: MetricNames = Field(
        DEFAULT_METRICS, description="Metrics to compute, by name; your own registered ones always are."
    )
    metric_modules: tuple[str, ...] = Field(
        (), description="Python files or modules with metrics of your own, imported first."
    )
    ladder: bool = Field(False, description="Measure noise and quantisation floors too: two more renders a prompt.")


class GateConfig(_Section):
    """Quality thresholds for deployment."""

    min_frame_cosine: float = Field(0.95, ge=-1.0, le=1.0, description="Mean frame_cosine must be above this.")
    min_psnr: float = Field(35.0, ge=0.0, description="Mean psnr must be above this, in dB.")
    min_psnr_worst: float | None = Field(None, ge=0.0, description="Worst prompt's psnr must be above this, in dB.")
    min_psnr_frame: float | None = Field(None, ge=0.0, description="Worst frame's PSNR must be above this, in dB.")


class TrackingConfig(_Section):
    """Tracking of runs in MLflow."""

    enabled: bool = Field(True, description="Record runs in MLflow.")
    uri: str | None = Field(None, description="MLflow tracking URI; null is MLFLOW_TRACKING_URI, then SQLite in root.")
    experiment: str | None = Field(None, description="MLflow experiment; null names it after the model.")
    root: LocalPath = Field(Path("mlruns"), description="Folder of the default tracking store.")
    report: bool = Field(True, description="Add the HTML report and its figures to every tuning and evaluation.")


class EngineConfig(_Section):
    """Execution in this process, or by Ray workers that each load the model."""

    name: EngineName = Field("local", description="local works in this process, ray on many (sparsetune[ray]).")
    workers: Workers = Field(
        "auto", description="ray: workers; auto is one a GPU, or a core up to 8 a host, and more as hosts join."
    )
    gpus_per_worker: float | None = Field(
        None, gt=0.0, description="ray: GPUs of a worker; null is 1, or none where the model goes to the CPU."
    )
    threads_per_worker: int | None = Field(
        None, gt=0, description="ray: CPU threads of a worker; null shares a host's cores among its workers."
    )
    ray_address: str | None = Field(
        None, description="ray: HOST:PORT of a cluster, or auto for the one on this host; null starts Ray here."
    )
    mixed_gpus: bool = Field(
        False, description="ray: let trials compete in measured speed on GPUs of several kinds, which is unfair."
    )
    start_seconds: float = Field(
        120.0, gt=0.0, description="ray: seconds in which a cluster answers and workers start."
    )
    load_seconds: float = Field(
        3600.0, gt=0.0, description="ray: seconds in which a worker has the model, its download counted in."
    )


class CacheConfig(_Section):
    """Cache of dense baselines."""

    dir: LocalPath | None = Field(None, description="Folder of the dense baselines; null is the user's cache folder.")
    max_gb: float = Field(20.0, gt=0.0, description="Size bound in GB; the least recently used baselines go first.")

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
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    cache: CacheConfig = Field(default_factory=CacheConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    backend: Backend = Field("auto", description="What computes sparse attention; auto takes the fastest that runs.")
    break_even: LocalPath | None = Field(
        None, description="Table of `sparsetune bench`: layers that wouldn't gain run dense; null asks nothing of them."
    )
