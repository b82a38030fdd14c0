"""Description of a loaded model, its settings, device and kernel: all that results depend on."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sparsetune.attention.backends import backend_choice
from sparsetune.attention.blockmap import BlockShape
from sparsetune.attention.breakeven import dtype_name
from sparsetune.attention.device import device_name
from sparsetune.config import GenerationConfig
from sparsetune.models.loading import ModelIdentity

if TYPE_CHECKING:
    from sparsetune.models.generation import Renderer


@dataclass(frozen=True)
class RuntimeDescription:
    """A loaded model with its settings, device and kernel."""

    identity: ModelIdentity
    family: str
    settings: GenerationConfig
    scheduler: str  # see `scheduler` below
    dtype: str  # of the transformer, e.g. `bfloat16`
    device: str  # see `device_kind`
    device_name: str  # its product name
    vae_tiling: bool
    compiled: bool  # whether the transformer's repeated blocks are
    kernel: str  # the backend of sparse calls
    chosen_because: str  # why that backend, in a few words
    blocks: BlockShape
    num_threads: int  # PyTorch's on the CPU

    @property
    def layers(self) -> tuple[tuple[str, int], ...]:
        """Name and number of heads of every self-attention layer."""
        return tuple((name, heads) for name, heads, _ in self.identity.layers)


def describe(renderer: "Renderer", backend: str) -> RuntimeDescription:
    loaded, choice = renderer.loaded, backend_choice(backend, renderer.loaded.device)
    return RuntimeDescription(
        identity=loaded.identity,
        family=loaded.family.name,
        settings=renderer.settings,
        scheduler=scheduler(loaded.pipe),
        dtype=dtype_name(loaded.dtype),
        device=device_kind(loaded.device),
        device_name=device_name(loaded.device),
        vae_tiling=vae_tiling(loaded.pipe),
        compiled=loaded.compiled,
        kernel=choice.backend.name,
        chosen_because=choice.reason,
        blocks=choice.backend.blocks,
        num_threads=torch.get_num_threads(),
    )


def scheduler(pipe: Any) -> str:
    """Return a scheduler's class and a hash of its configuration, e.g. `DDIMScheduler-1f0c...`."""
    config: Mapping[str, Any] = pipe.scheduler.config
    # Keys with an underscore say where the configuration came from.
    relevant = {name: value for name, value in config.items() if not name.startswith("_")}
    text = json.dumps(relevant, sort_keys=True, default=str)
    return f"{type(pipe.scheduler).__name__}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def vae_tiling(pipe: Any) -> bool:
    return bool(getattr(getattr(pipe, "vae", None), "use_tiling", False))


def device_kind(device: torch.device) -> str:
    """Return `cpu` with its vector instructions, or the accelerator's name."""
    if device.type == "cpu":
        return f"cpu {torch.backends.cpu.get_cpu_capability()}"
    return f"{device.type} {device_name(device)}"
