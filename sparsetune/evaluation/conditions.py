"""The conditions of an evaluation: all that decides its numbers, read off what renders."""

import functools
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsetune.attention.policy import Policy
from sparsetune.checkpoint.environment import git_commit, versions
from sparsetune.checkpoint.manifest import hash_prompts, utc_now
from sparsetune.evaluation.entry import BaselineKey, canonical_hash
from sparsetune.evaluation.result import ConfigSection, EnvironmentSection, ModelSection, PolicySection, Spread

if TYPE_CHECKING:
    from sparsetune.models.generation import Renderer

_RENDERING_PACKAGES = ("torch", "diffusers", "transformers")
"""Packages whose version can change a dense video's pixels."""


def baseline_key(renderer: "Renderer", prompt: str, seed: int) -> BaselineKey:
    """Give the address of a prompt's dense video."""
    loaded, settings = renderer.loaded, renderer.settings
    return BaselineKey(
        source=loaded.identity.source,
        revision=loaded.identity.revision,
        fingerprint=loaded.identity.fingerprint,
        pipeline_class=loaded.identity.pipeline_class,
        prompt=prompt,
        negative_prompt=settings.negative_prompt,
        seed=seed,
        num_frames=settings.num_frames,
        height=settings.height,
        width=settings.width,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        max_sequence_length=settings.max_sequence_length,
        scheduler=scheduler(loaded.pipe),
        dtype=dtype_name(loaded.dtype),
        device=device_kind(loaded.device),
        vae_tiling=vae_tiling(loaded.pipe),
        versions=_rendering_versions(),
    )


def model_section(renderer: "Renderer") -> ModelSection:
    """Describe the model."""
    identity = renderer.loaded.identity
    return ModelSection(
        source=identity.source,
        revision=identity.revision,
        fingerprint=identity.fingerprint,
        pipeline_class=identity.pipeline_class,
        transformer_class=identity.transformer_class,
        num_layers=len(identity.layers),
        num_heads=sum(num_heads for _, num_heads, _ in identity.layers),
    )


def policy_section(policy: Policy) -> PolicySection:
    """Describe a policy in brief."""
    heads = [head for layer in policy.layers for head in layer.heads]
    sparse = [head for head in heads if head.is_sparse]
    return PolicySection(
        digest=canonical_hash(asdict(policy)),
        rule=" and ".join(sorted({layer.rule for layer in policy.layers})),
        num_layers=len(policy.layers),
        num_heads=len(heads),
        num_sparse_heads=len(sparse),
        simthreshd1=_spread([head.simthreshd1 for head in sparse]),
        cdfthreshd=_spread([head.cdfthreshd for head in sparse if head.cdfthreshd is not None]),
        topk=_spread([head.topk for head in sparse if head.topk is not None]),
        pvthreshd=_spread([head.pvthreshd for head in sparse]),
        dense_fraction=policy.schedule.dense_fraction,
        order=policy.order,
        keep_text=policy.keep_text,
    )


def config_section(
    renderer: "Renderer",
    policy: Policy,
    prompts: Sequence[str],
    *,
    seed: int,
    tuned: bool,
    checkpoint: str | None,
    tuner: str | None,
    backend: str,
    metrics: tuple[str, ...],
    prompt_file: Path | None,
    tune_prompts: Sequence[str],
) -> ConfigSection:
    """Put together everything that decides an evaluation's numbers; the arguments are those of `evaluate`."""
    loaded, settings = renderer.loaded, renderer.settings
    tuned_on = set(tune_prompts) if tuned else set()
    return ConfigSection(
        model_name=loaded.identity.name,
        use_tuned=tuned,
        num_prompts=len(prompts),
        seed=seed,
        tuned_path=checkpoint,
        tuner=tuner,
        model=model_section(renderer),
        height=settings.height,
        width=settings.width,
        num_frames=settings.num_frames,
        fps=settings.fps,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        negative_prompt=settings.negative_prompt,
        max_sequence_length=settings.max_sequence_length,
        scheduler=scheduler(loaded.pipe),
        dtype=dtype_name(loaded.dtype),
        device=device_kind(loaded.device),
        vae_tiling=vae_tiling(loaded.pipe),
        backend=backend,
        policy=policy_section(policy),
        metrics=metrics,
        prompt_file=str(prompt_file) if prompt_file is not None else None,
        prompts_hash=hash_prompts(prompts),
        prompts_in_tune_set=tuple(prompt for prompt in dict.fromkeys(prompts) if prompt in tuned_on),
    )


def environment_section(renderer: "Renderer", seconds_total: float, seconds_generation: float) -> EnvironmentSection:
    """Describe the machine and the software."""
    return EnvironmentSection(
        created=utc_now(),
        platform=platform.platform(),
        device_name=device_name(renderer.loaded.device),
        num_threads=torch.get_num_threads(),
        versions=versions(),
        git_commit=git_commit(),
        seconds_total=seconds_total,
        seconds_generation=seconds_generation,
    )


def scheduler(pipe: Any) -> str:
    """Name a pipeline's scheduler by its class and a hash of its configuration, e.g. `DDIMScheduler-1f0c...`."""
    config: Mapping[str, Any] = pipe.scheduler.config
    # Keys with an underscore say where the configuration came from, not what it does.
    deciding = {name: value for name, value in config.items() if not name.startswith("_")}
    text = json.dumps(deciding, sort_keys=True, default=str)
    return f"{type(pipe.scheduler).__name__}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def vae_tiling(pipe: Any) -> bool:
    """Whether the VAE decodes in tiles."""
    return bool(getattr(getattr(pipe, "vae", None), "use_tiling", False))


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype without its package, e.g. `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def device_kind(device: torch.device) -> str:
    """Name what computes: `cpu` with its vector instructions, or the accelerator."""
    if device.type == "cpu":
        return f"cpu {torch.backends.cpu.get_cpu_capability()}"
    return f"{device.type} {device_name(device)}"


def device_name(device: torch.device) -> str:
    """Name the device as a person would, e.g. `NVIDIA H100 80GB HBM3`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


@functools.cache
def _rendering_versions() -> tuple[tuple[str, str], ...]:
    installed = versions()
    return tuple((name, installed.get(name, "none")) for name in _RENDERING_PACKAGES)


def _spread(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    return Spread(mean=sum(values) / len(values), min=min(values), max=max(values))
