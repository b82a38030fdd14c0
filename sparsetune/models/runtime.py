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
    """A loaded model with its settings, device and kernel.

    Args:
        identity: the model.
        family: its family's name.
        settings: generation settings.
        scheduler: the scheduler's class and a hash of its configuration.
        dtype: of the transformer, e.g. `bfloat16`.
        device: the kind of device, as `device_kind` names it.
        device_name: its product name.
        vae_tiling: whether frames are decoded in tiles.
        kernel: the backend of sparse calls, by name.
        chosen_because: why it was chosen, in a few words.
        blocks: its block shape.
        num_threads: PyTorch's on the CPU.
    """

    identity: ModelIdentity
    family: str
    settings: GenerationConfig
    scheduler: str
    dtype: str
    device: str
    device_name: str
    vae_tiling: bool
    kernel: str
    chosen_because: str
    blocks: BlockShape
    num_threads: int

    @property
    def layers(self) -> tuple[tuple[str, int], ...]:
        """Name and number of heads of every self-attention layer."""
        return tuple((name, heads) for name, heads, _ in self.identity.layers)


def describe(renderer: "Renderer", backend: str) -> RuntimeDescription:
    """Describe a loaded model with the kernel of backend setting `backend`; BackendError where that can't run here."""
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
    """Whether the VAE decodes in tiles."""
    return bool(getattr(getattr(pipe, "vae", None), "use_tiling", False))


def device_kind(device: torch.device) -> str:
    """Return `cpu` with its vector instructions, or the accelerator's name."""
    if device.type == "cpu":
        return f"cpu {torch.backends.cpu.get_cpu_capability()}"
    return f"{device.type} {device_name(device)}"
