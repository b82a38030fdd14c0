"""Training checkpoints: fp16 safetensors of the weights and their EMA, and a JSON file with the training state."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn


@dataclass(frozen=True)
class State:
    """State for resuming: the scaling factor of the latents, the progress, and the measured losses."""

    scaling_factor: float = 1.0
    vae_steps: int = 0
    vae_psnr_db: float = 0.0
    steps: int = 0
    samples: int = 0
    progress: float = 0.0
    v_losses: dict[str, float] = field(default_factory=dict)


def save_state(folder: Path, state: State) -> None:
    """Write state.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.json").write_text(json.dumps(asdict(state), indent=2) + "\n")


def load_state(folder: Path) -> State:
    """Read state.json; return the initial state if there is none."""
    path = folder / "state.json"
    return State(**json.loads(path.read_text())) if path.exists() else State()


def save_weights(folder: Path, name: str, modules: Mapping[str, nn.Module]) -> None:
    """Write the modules' parameters to one fp16 file.

    fp16 keeps the file under 16 MiB; its rounding error is far smaller than one optimizer step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{key}.{parameter}": value.detach().to("cpu", torch.float16).contiguous()
        for key, module in modules.items()
        for parameter, value in module.named_parameters()
    }
    save_file(tensors, folder / f"{name}.safetensors")


def load_weights(folder: Path, name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Load the modules' parameters from a file of `save_weights`; return False if there is none."""
    path = folder / f"{name}.safetensors"
    if not path.exists():
        return False
    tensors = load_file(path)
    with torch.no_grad():
        for key, module in modules.items():
            for parameter, value in module.named_parameters():
                value.copy_(tensors[f"{key}.{parameter}"])
    return True
