"""A checkpoint and its manifest: where its policy comes from and what it was tuned for."""

import contextlib
import functools
import hashlib
import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Final, Protocol

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError

from sparsetune import __version__
from sparsetune.attention.policy import Policy
from sparsetune.documents import read_json, read_text
from sparsetune.errors import CheckpointError

SCHEMA_VERSION: Final = 2  # of the manifest and the policy's metadata; increment when a field changes its meaning


def utc_now() -> str:
    """Return the current time in UTC as ISO 8601 with seconds, e.g. `2026-11-22T10:16:37+00:00`."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class _Identified(Protocol):
    @property
    def identity(self) -> dict[str, Any]: ...


def hash_prompts(prompts: Sequence[str | _Identified]) -> str:
    """Return the SHA-256 of a list of prompts (texts or their `identity`), in hexadecimal; order matters."""
    text = json.dumps(list(prompts), ensure_ascii=False, default=lambda prompt: prompt.identity)
    return hashlib.sha256(text.encode()).hexdigest()


def _in_utc(text: str) -> str:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"must be an ISO 8601 time, got {text!r}") from error
    if moment.tzinfo is None:
        raise ValueError(f"must have a time zone, got {text!r}")
    return moment.astimezone(UTC).isoformat(timespec="seconds")


def _without_storage(settings: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Drop the study's storage, which earlier versions recorded with its password."""
    return {name: value for name, value in settings.items() if name != "storage"}


class LayerShape(BaseModel):
    """One self-attention layer of the base model: its module path, heads and head dimension."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    num_heads: int = Field(gt=0)
    head_dim: int | None = Field(default=None, gt=0)


class Manifest(BaseModel):
    """Provenance of a policy; None or empty means unknown.

    Args:
        tuner: `optuna`, `builtin`, `calibrate`, `manual`, or `unknown`.
        created: when, in UTC as ISO 8601 (other time zones are converted).
        base_model, base_source, base_revision: name, hub id or folder, and revision of the model tuned for.
        base_fingerprint: SHA-256 of its weights' index.
        base_lora, base_lora_scale: file, folder or hub id of the LoRA fused into its weights, and its weight.
        pipeline_class, transformer_class, layers: its classes and self-attention layers.
        num_frames, height, width, num_inference_steps, guidance_scale, guidance_scale_2, sigmas, dtype, scheduler,
            flow_shift, compile: as tuned on.
        kernel, device: the attention kernel and the GPU or CPU tuned with.
        tuner_settings: the tuner's own settings, without the study's storage.
        search: the whole configuration of the search, for `tune --from-manifest`.
        prompts_hash, seeds: `hash_prompts` of the tune prompts and the seeds rendered.
        eval_prompts_hash: `hash_prompts` of the prompts that judged the search's winner.
        versions, git_commit: from `versions()` and `git_commit()`.
        policy_sha256: SHA-256 of the file policy.safetensors beside it, which loading verifies; None in memory.
        hand_set: pairs of thresholds for all heads alike that evaluations compare the policy with: simthreshd1,
            cdfthreshd and predicted sparsity of each.
        metrics: measured, e.g. `psnr` in dB and `sparsity` in [0, 1].
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tuner: str
    created: Annotated[str, AfterValidator(_in_utc)] = Field(default_factory=utc_now)
    schema_version: int = SCHEMA_VERSION

    base_model: str | None = None
    base_source: str | None = None
    base_revision: str | None = None
    base_fingerprint: str | None = None
    base_lora: str | None = None
    base_lora_scale: float | None = None
    pipeline_class: str | None = None
    transformer_class: str | None = None
    layers: tuple[LayerShape, ...] = ()

    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    sigmas: tuple[float, ...] = ()
    dtype: str | None = None
    scheduler: str | None = None
    flow_shift: float | None = None
    compile: bool | None = None

    kernel: str | None = None
    device: str | None = None
    tuner_settings: Annotated[dict[str, JsonValue], AfterValidator(_without_storage)] = Field(default_factory=dict)
    search: dict[str, JsonValue] = Field(default_factory=dict)
    prompts_hash: str | None = None
    eval_prompts_hash: str | None = None
    seeds: tuple[int, ...] = ()
    versions: dict[str, str] = Field(default_factory=dict)
    git_commit: str | None = None
    policy_sha256: str | None = None
    hand_set: tuple[tuple[float, float, float], ...] = ()
    metrics: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A policy and its manifest, and the calibration that policies of other sparsities are read off, if any.

    `dial` is the content of dial.npz, see `sparsetune.tuning.dial`; None for a checkpoint of another origin.
    """

    policy: Policy
    manifest: Manifest
    dial: bytes | None = field(default=None, repr=False)


def read_manifest(path: Path) -> Manifest:
    """Read a manifest.json; CheckpointError where it can't be read, is none, or is from a newer sparsetune."""
    try:
        value = read_json(read_text(path))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot read the manifest {path}: {reason}; save the checkpoint again") from error
    check_schema_version(path, value.get("schema_version") if isinstance(value, dict) else None)
    try:
        return Manifest.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: {where}: {first['msg']}; correct it or save the checkpoint again") from error


def check_schema_version(path: Path, version: object) -> None:
    """Raise CheckpointError unless `version` is one that this sparsetune reads."""
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(f"{path} needs schema_version {SCHEMA_VERSION}, got {version!r}; save it again")
    if version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema_version {version}, from a newer sparsetune that this one can't read; update sparsetune"
        )


PACKAGES = ("torch", "diffusers", "transformers", "optuna", "mlflow", "spas-sage-attn", "triton")
"""Packages beside sparsetune whose versions can affect a search or its videos."""


def package_version(package: str) -> str:
    """Return an installed package's version; PackageNotFoundError without it. MLflow is whole or only its client."""
    return metadata.version("mlflow-skinny" if package == "mlflow" else package)


def versions() -> dict[str, str]:
    """Return the versions of Python, sparsetune and the installed `PACKAGES`.

    Those of packages are read from their metadata: nothing is imported. sparsetune itself may be a checkout that was
    never installed, or installed with the metadata of an earlier version.
    """
    found = {"python": platform.python_version(), "sparsetune": __version__}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = package_version(package)
    return found


@functools.cache
def git_commit() -> str | None:
    """Return the commit of sparsetune's checkout, `-dirty` when files differ; None for a wheel or without git."""
    package = Path(__file__).resolve().parent
    # Site-packages may lie inside another repository, whose commit would say nothing about this code.
    if _git(package, "ls-files", "--error-unmatch", "--", Path(__file__).name) is None:
        return None
    commit = _git(package, "rev-parse", "HEAD")
    changed = _git(package, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if commit and changed else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
