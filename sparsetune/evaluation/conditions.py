"""Conditions of an evaluation: model, policy, settings and environment, as sections of the result."""

import functools
import platform
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsetune.attention.breakeven import dtype_name
from sparsetune.attention.policy import Policy
from sparsetune.checkpoint.manifest import git_commit, hash_prompts, utc_now, versions
from sparsetune.evaluation.baseline import BaselineKey, canonical_hash
from sparsetune.evaluation.result import ConfigSection, EnvironmentSection, ModelSection, PolicySection, Spread
from sparsetune.executor import Executor
from sparsetune.models.prompts import AnyPrompt, as_prompt, image_digest, texts
from sparsetune.models.runtime import RuntimeDescription, device_kind, scheduler, vae_tiling

if TYPE_CHECKING:
    from sparsetune.models.generation import Renderer

_RENDERING_PACKAGES = ("torch", "diffusers", "transformers")  # whose version can change a dense video's pixels


def baseline_key(renderer: "Renderer", prompt: AnyPrompt, seed: int) -> BaselineKey:
    loaded, identity = renderer.loaded, renderer.loaded.identity
    settings = renderer.settings.model_dump(exclude={"fps"})
    given = as_prompt(prompt)
    if given.negative_prompt is not None:
        settings["negative_prompt"] = given.negative_prompt
    return BaselineKey(
        source=identity.source,
        revision=identity.revision,
        fingerprint=identity.fingerprint,
        pipeline_class=identity.pipeline_class,
        prompt=given.text,
        seed=seed if given.seed is None else given.seed,
        **settings,
        scheduler=scheduler(loaded.pipe),
        dtype=dtype_name(loaded.dtype),
        device=device_kind(loaded.device),
        vae_tiling=vae_tiling(loaded.pipe),
        versions=_rendering_versions(),
        image=None if given.image is None else image_digest(given.image),
        compiled=loaded.compiled,
    )


def policy_digest(policy: Policy) -> str:
    """SHA-256 of a policy, in hexadecimal.

    Fields with their default value are left out, so that a field added later doesn't change older policies' digests.
    """
    return canonical_hash(_non_defaults(policy))


def policy_section(policy: Policy) -> PolicySection:
    heads = [head for layer in policy.layers for head in layer.heads]
    sparse = [head for head in heads if head.is_sparse]
    return PolicySection(
        digest=policy_digest(policy),
        rule=" and ".join(sorted({layer.rule for layer in policy.layers})),
        num_layers=len(policy.layers),
        num_heads=len(heads),
        num_sparse_heads=len(sparse),
        simthreshd1=_spread([head.simthreshd1 for head in sparse]),
        cdfthreshd=_spread([head.cdfthreshd for head in sparse if head.cdfthreshd is not None]),
        topk=_spread([head.topk for head in sparse if head.topk is not None]),
        pvthreshd=_spread([head.pvthreshd for head in sparse]),
        dense_fraction=policy.schedule.dense_fraction,
        drop_scale=_spread(policy.schedule.drop_scale),
        order=" and ".join(policy.order_names),
        keep_text=policy.keep_text,
        select_partial=policy.select_partial,
        cache=None if policy.cache is None else str(policy.cache),
    )


def config_section(
    runtime: RuntimeDescription,
    policy: Policy,
    prompts: Sequence[AnyPrompt],
    seed: int,
    tuned: bool,
    checkpoint: str | None,
    tuner: str | None,
    break_even: Path | None,
    metrics: tuple[str, ...],
    prompt_file: Path | None,
    tune_prompts: Sequence[AnyPrompt],
    yardsticks: tuple[str, ...],
) -> ConfigSection:
    tuned_on = set(tune_prompts) if tuned else set()
    identity = runtime.identity
    return ConfigSection(
        model_name=identity.published_name,
        short_name=identity.name,
        use_tuned=tuned,
        num_prompts=len(prompts),
        seed=seed,
        tuned_path=checkpoint,
        tuner=tuner,
        model=ModelSection(
            source=identity.source,
            revision=identity.revision,
            fingerprint=identity.fingerprint,
            pipeline_class=identity.pipeline_class,
            transformer_class=identity.transformer_class,
            num_layers=len(identity.layers),
            num_heads=sum(num_heads for _, num_heads, _ in identity.layers),
            random_weights=identity.random_weights,
            lora=identity.lora,
            lora_scale=identity.lora_scale,
            flow_shift=identity.flow_shift,
        ),
        **runtime.settings.model_dump(),
        scheduler=runtime.scheduler,
        dtype=runtime.dtype,
        device=runtime.device,
        vae_tiling=runtime.vae_tiling,
        compile=runtime.compiled,
        backend=runtime.kernel,
        break_even=str(break_even) if break_even is not None else None,
        policy=policy_section(policy),
        metrics=metrics,
        yardsticks=yardsticks,
        prompt_file=str(prompt_file) if prompt_file is not None else None,
        prompts_hash=hash_prompts(prompts),
        prompts_in_tune_set=texts([prompt for prompt in dict.fromkeys(prompts) if prompt in tuned_on]),
    )


def environment_section(
    runtime: RuntimeDescription, executor: Executor, seconds_total: float, seconds_generation: float
) -> EnvironmentSection:
    return EnvironmentSection(
        created=utc_now(),
        platform=platform.platform(),
        device_name=runtime.device_name,
        backend_reason=runtime.chosen_because,
        num_threads=runtime.num_threads,
        versions=versions(),
        git_commit=git_commit(),
        seconds_total=seconds_total,
        seconds_generation=seconds_generation,
        workers=tuple(f"{worker.label}, {worker.device}" for worker in executor.workers),
        incidents=tuple(incident.text for incident in executor.incidents),
    )


@functools.cache
def _rendering_versions() -> tuple[tuple[str, str], ...]:
    installed = versions()
    return tuple((name, installed.get(name, "none")) for name in _RENDERING_PACKAGES)


def _non_defaults(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_non_defaults(one) for one in value]
    if not is_dataclass(value):
        return value
    found = {}
    for field in fields(value):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        own = getattr(value, field.name)
        if own != default:
            found[field.name] = _non_defaults(own)
    return found


def _spread(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    return Spread(mean=sum(values) / len(values), min=min(values), max=max(values))
