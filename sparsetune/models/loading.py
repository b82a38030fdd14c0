"""Loading of pipelines: the embedded demo, a folder in the hub's layout, or a model of the hub."""

import hashlib
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn

from sparsetune.attention.device import device_of
from sparsetune.attention.sites import TransformerSite
from sparsetune.config import ModelConfig
from sparsetune.config.files import DEMO, find_model
from sparsetune.errors import ModelError
from sparsetune.files import expand
from sparsetune.models import modular
from sparsetune.models.demo import WEIGHTS
from sparsetune.models.families import attention_sites, family_of, main_transformer
from sparsetune.models.family import Family
from sparsetune.models.random_weights import blueprint, build_pipeline

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_COMMIT = re.compile("[0-9a-f]{40}")
_NOISE_LEVELS = ("high_noise_model.safetensors", "low_noise_model.safetensors")
"""A LoRA's files for Wan 2.2's two transformers."""
_HASHED_WHOLE = 1 << 28
_HASHED_CHUNK = 1 << 16
_HASHED_EVERY = 1 << 23


@dataclass(frozen=True)
class ModelIdentity:
    name: str  # e.g. `cogvideox-2b`
    source: str  # `demo`, a folder, or a hub id
    revision: str | None  # the hub's commit; the branch or tag where that isn't known; None for other folders
    fingerprint: str  # SHA-256 of the model's files; of one above 256 MiB, 64 KiB in every 8 MiB are read
    pipeline_class: str
    transformer_class: str
    layers: tuple[tuple[str, int, int], ...]  # (name, heads, head_dim) of every self-attention layer, in order
    random_weights: Literal["no", "full", "tiny"] = "no"
    lora: str | None = None  # file, folder or hub id of a LoRA that is fused into the weights; in the fingerprint too
    lora_scale: float | None = None  # its weight
    flow_shift: float | None = None  # of the scheduler's sigmas, where it isn't the model's own

    @property
    def published_name(self) -> str:
        """The hub's id, e.g. `THUDM/CogVideoX-2b`; the short name of a model that the hub doesn't have."""
        is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", self.source) and not Path(self.source).is_dir()
        return self.source if is_hub_id and self.random_weights == "no" else self.name


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a commit, which pins the files; branches and tags can move."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def _identity_of_files(pipe: Any, config: ModelConfig, source: str) -> ModelIdentity:
    """Identify a pipeline that was loaded from a folder or hub id, and warn where its revision isn't pinned."""
    local = Path(source).is_dir()
    # A hub model is loaded from the cache's snapshot folder, which is named after the commit.
    folder = Path(source if local else main_transformer(pipe).config._name_or_path)
    if not local and folder.parent.name != "snapshots":  # the transformer's own
        folder = folder.parent
    commit = folder.name if folder.parent.name == "snapshots" else None
    revision = commit or (None if local else config.revision)
    if not local and not is_commit(config.revision):
        logger.warning(
            "%s was loaded at %s, but its revision isn't pinned; pin it with --set model.revision=COMMIT",
            config.source,
            revision or "an unknown commit",
        )
    return _identity(pipe, config, revision, _fingerprint(folder))


def _identity(pipe: Any, config: ModelConfig, revision: str | None, fingerprint: str) -> ModelIdentity:
    return ModelIdentity(
        name=config.name,
        source=config.source,
        revision=revision,
        fingerprint=fingerprint,
        pipeline_class=type(pipe).__name__,
        transformer_class=type(main_transformer(pipe)).__name__,
        layers=tuple((layer.name, layer.num_heads, layer.head_dim) for layer in attention_sites(pipe).layers),
        random_weights=config.random_weights,
    )


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix in {".safetensors", ".bin", ".json"}:
            digest.update(f"{file.relative_to(folder)}:{file.stat().st_size}\n".encode())
            whole = file.stat().st_size <= _HASHED_WHOLE
            with file.open("rb") as content:
                while chunk := content.read(_HASHED_EVERY if whole else _HASHED_CHUNK):
                    digest.update(chunk)
                    if not whole:
                        content.seek(_HASHED_EVERY - _HASHED_CHUNK, os.SEEK_CUR)
    return digest.hexdigest()


@dataclass(frozen=True)
class LoadedModel:
    pipe: Any
    identity: ModelIdentity
    family: Family
    device: torch.device  # where it computes
    dtype: torch.dtype  # its transformer's
    compiled: bool = False  # whether the transformer's repeated blocks are


def load_pipeline(config: ModelConfig) -> LoadedModel:
    """Load a pipeline and put it where it computes; ModelError where that fails or the family isn't supported."""
    device = _device(config.device)
    dtype = _DTYPES.get(config.dtype) or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    pipe, find_identity = _load_or_build(config, dtype)
    family = family_of(pipe)
    lora_digest = None if config.lora is None else _fuse_lora(pipe, config.lora, config.lora_scale)
    if config.flow_shift is not None:
        _shift_sigmas(pipe, config.flow_shift)
    try:
        _place(pipe, config, device)
    except torch.cuda.OutOfMemoryError as error:
        raise ModelError(f"the model doesn't fit into the memory of {device}; try --offload model") from error
    if config.compile:
        _compile_blocks(pipe, config)
    modular.hide_progress(pipe)
    identity = find_identity()
    if lora_digest is not None:  # neither dense videos nor checkpoints of the base model fit
        together = f"{identity.fingerprint} {lora_digest} {config.lora_scale}"
        fingerprint = hashlib.sha256(together.encode()).hexdigest()
        identity = replace(identity, fingerprint=fingerprint, lora=config.lora, lora_scale=config.lora_scale)
    identity = replace(identity, flow_shift=config.flow_shift)
    return LoadedModel(pipe, identity, family, device, dtype, config.compile)


def loaded_model(pipe: Any, name: str, source: str) -> LoadedModel:
    """Describe a pipeline that its user loaded, placed and perhaps changed; its weights are identified as they are now.

    ModelError where the family isn't supported, or weights aren't in memory.
    """
    family, transformer = family_of(pipe), main_transformer(pipe)
    modules = [module for module in pipe.components.values() if isinstance(module, nn.Module)]
    compiled = any(part._compiled_call_impl is not None for module in modules for part in module.modules())
    device = torch.device(getattr(pipe, "_execution_device", None) or pipe.device)
    identity = _identity(pipe, ModelConfig(name=name, source=source), None, _weights_digest(pipe))
    return LoadedModel(pipe, identity, family, device, transformer.dtype, compiled)


def source_of(pipe: Any) -> str:
    """Return what a pipeline was loaded from, as `--model` takes it; its class's name where it doesn't say."""
    source = str(pipe.config.get("_name_or_path") or type(pipe).__name__)
    return DEMO if source == str(WEIGHTS) else source


def _weights_digest(pipe: Any) -> str:
    """Return the SHA-256 of all weights in memory; 64 KiB in every 8 MiB of a tensor are read."""
    digest = hashlib.sha256()
    for name, module in sorted(pipe.components.items()):
        for key, weight in module.state_dict().items() if isinstance(module, nn.Module) else ():
            if weight.is_meta:
                raise ModelError(
                    f"{name} has weights that aren't in memory, so that they can't be identified; "
                    "use enable_model_cpu_offload() instead of sequential offload"
                )
            digest.update(f"{name}.{key} {tuple(weight.shape)} {weight.dtype}".encode())
            content = weight.detach().contiguous().flatten().view(torch.uint8)
            for start in range(0, len(content), _HASHED_EVERY):
                digest.update(content[start : start + _HASHED_CHUNK].cpu().numpy().tobytes())
    return digest.hexdigest()


def _load_or_build(config: ModelConfig, dtype: torch.dtype) -> tuple[Any, Callable[[], ModelIdentity]]:
    """Return a pipeline, and a function for its identity, which reads its files once it is placed."""
    if config.random_weights == "no":
        source = _resolve(config.source)
        pipe = _from_pretrained(source, config, dtype)
        return pipe, lambda: _identity_of_files(pipe, config, source)
    plan, size = blueprint(config.source), config.random_weights
    logger.info("building %s (%s) with random weights", plan.name, size)
    built = build_pipeline(plan, size, dtype)
    digest = hashlib.sha256(f"{size} {dtype} {torch.__version__} {plan}".encode()).hexdigest()
    return built, lambda: _identity(built, config, None, digest)


def _device(name: str) -> torch.device:
    device = device_of(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"there is no device {name}: this machine has {torch.cuda.device_count()} GPUs; use --device cpu"
        )
    return device


def _resolve(source: str) -> str:
    return str(WEIGHTS) if source == DEMO else find_model(source)


def _from_pretrained(source: str, config: ModelConfig, dtype: torch.dtype) -> Any:
    from diffusers import DiffusionPipeline

    try:
        if modular.has_index(source):
            return modular.load_modular(source, dtype)
        try:
            return DiffusionPipeline.from_pretrained(  # type: ignore[no-untyped-call]
                source, revision=config.revision, dtype=dtype
            )
        except OSError:  # as of a repository whose only index is a modular pipeline's
            if Path(source).is_dir() or (folder := modular.download(source, config.revision)) is None:
                raise
            return modular.load_modular(folder, dtype)
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, ImportError, SafetensorError) as error:
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        if Path(source).is_dir():
            raise ModelError(f"cannot load the folder {source} as a diffusers pipeline: {cause}") from error
        raise ModelError(
            f"cannot load {source} from the hub: {cause}; use a local folder, or --model {DEMO}, which is embedded"
        ) from error


def _fuse_lora(pipe: Any, source: str, scale: float) -> str:
    """Fuse a LoRA into a pipeline's weights; returns the SHA-256 of its tensors."""
    if not hasattr(pipe, "load_lora_weights"):
        raise ModelError(f"{type(pipe).__name__} loads no LoRA; leave out --lora")
    digest = hashlib.sha256()
    place, names = _lora_files(pipe, source)
    try:
        for number, name in enumerate(names):
            second = {"load_into_transformer_2": True} if number else {}
            state = pipe.lora_state_dict(place, weight_name=name)
            pipe.load_lora_weights(place, weight_name=name, **second)
            tensors = state[0] if isinstance(state, tuple) else state
            for key, tensor in sorted(tensors.items()):
                digest.update(f"{key} {tuple(tensor.shape)}".encode())
                digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
        pipe.fuse_lora(**({"components": ["transformer", "transformer_2"]} if len(names) > 1 else {}), lora_scale=scale)
        pipe.unload_lora_weights()
    except ImportError as error:
        raise ModelError("--lora needs the package peft; install it, e.g. pip install peft") from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"cannot load the LoRA {source}: {cause}; use a file, a folder or a hub id") from error
    return digest.hexdigest()


def _lora_files(pipe: Any, source: str) -> tuple[str, tuple[str | None, ...]]:
    """Return a LoRA's file, folder or repository, and the weights in it: two names for two transformers."""
    path = expand(source)
    if path.exists():
        place, name, is_pair = str(path), "", all((path / file).is_file() for file in _NOISE_LEVELS)
    else:
        parts = source.split("/")
        place, name = "/".join(parts[:2]), "/".join(parts[2:])
        is_pair = name != "" and not name.endswith(".safetensors")
    if is_pair and getattr(pipe, "transformer_2", None) is not None:
        return place, tuple(f"{name}/{file}".lstrip("/") for file in _NOISE_LEVELS)
    return place, (name or None,)


def _shift_sigmas(pipe: Any, shift: float) -> None:
    """Give a pipeline's scheduler another shift of its sigmas, at any size; ModelError where it has none."""
    config = pipe.scheduler.config
    name = next((name for name in ("flow_shift", "shift") if name in config), None)
    if name is None:
        raise ModelError(
            f"{type(pipe.scheduler).__name__} shifts no sigmas, so that model.flow_shift {shift:g} can't be set; "
            "leave it out"
        )
    # A shift by size, and a stretch of the sigmas to a last one, would take its place.
    others = {key: value for key, value in (("use_dynamic_shifting", False), ("shift_terminal", None)) if key in config}
    pipe.scheduler = type(pipe.scheduler).from_config(config, **{name: shift}, **others)


def _place(pipe: Any, config: ModelConfig, device: torch.device) -> None:
    offload = config.offload
    if offload == "auto":
        tight = device.type == "cuda" and _weights_bytes(pipe) * 1.3 > torch.cuda.mem_get_info(device)[0]
        offload = "model" if tight else "none"
        logger.info("offload auto chose %s", offload)
    if offload != "none" and device.type != "cuda":
        raise ModelError(f"--offload {offload} needs a CUDA GPU, but the device is {device}; use --offload none")
    if offload == "model" and modular.is_modular(pipe):
        modular.enable_offload(pipe, device)
    elif offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
    if config.vae_tiling or family_of(pipe).tiled_vae:
        pipe.vae.enable_tiling()
    if config.vae_slicing:
        pipe.vae.enable_slicing()


def _compile_blocks(pipe: Any, config: ModelConfig) -> None:
    """Have the repeated blocks of every transformer compiled when they are first called.

    By default graphs may break and shapes may become dynamic: some models break their graphs themselves, and the first
    block's input can have other strides than the rest's.
    """
    if config.offload == "sequential":
        raise ModelError(  # its hooks on every module break the graphs
            "--compile doesn't work with --offload sequential; use --offload model, or leave out --compile"
        )
    for transformer in attention_sites(pipe).transformers:
        module: Any = transformer.module
        if module._repeated_blocks:
            try:
                module.compile_repeated_blocks()
            except ValueError as error:
                raise ModelError(f"cannot compile {transformer.name}: {error}; leave out --compile") from error
        else:  # diffusers 0.42 doesn't name those of CogVideoX, Mochi, Allegro, EasyAnimate, Cosmos and SD3
            for block in _blocks(transformer):
                block.compile()


def _blocks(transformer: TransformerSite) -> list[nn.Module]:
    """Return the modules around a transformer's self-attention layers; ModelError where a layer has none."""
    found: dict[nn.Module, None] = {}
    for layer in transformer.layers:
        path = layer.name.removeprefix(f"{transformer.name}.").rpartition(".")[0]
        block = transformer.module.get_submodule(path)
        if not path or isinstance(block, nn.ModuleList):
            raise ModelError(
                f"cannot compile {type(transformer.module).__name__}: it has no repeated blocks; leave out --compile"
            )
        found[block] = None
    return list(found)


def _weights_bytes(pipe: Any) -> int:
    modules = [module for module in pipe.components.values() if isinstance(module, nn.Module)]
    return sum(weight.nbytes for module in modules for weight in module.parameters())
