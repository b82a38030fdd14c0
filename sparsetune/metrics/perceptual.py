"""LPIPS of two videos, an optional extra: `pip install sparsetune[lpips]`.

Nothing is downloaded: the AlexNet weights come from torch's cache or a given file, which is checked by its hash.
"""

import functools
import hashlib
import importlib.util
import math
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsetune.errors import MetricError
from sparsetune.metrics.registry import Frames, MetricUnavailable, check_min_side, metric, pooled

WEIGHTS_HASH = "7be5be79"  # first digits of its SHA-256
WEIGHTS_FILE = f"alexnet-owt-{WEIGHTS_HASH}.pth"  # torchvision's name for AlexNet's ImageNet weights in torch's cache
MIN_SIDE = 32  # AlexNet's pooling reduces smaller frames to nothing
_BATCH = 4  # frames at a time: about 150 MB at 480x720

_chosen: Path | None = None


def use_weights(path: Path | None) -> None:
    """Set the weights' file of this process; None is the one in torch's cache."""
    global _chosen
    _chosen = path


def distances(dense: Frames, sparse: Frames, *, weights: Path | None = None) -> list[float]:
    """Measure each frame; `weights` are torchvision's of AlexNet, by default those of `use_weights`.

    Raises:
        MetricUnavailable: the package or the weights are missing, or a side is under 32 pixels.
        MetricError: the weights' file isn't AlexNet's.
    """
    check_min_side("lpips", (dense.shape[1], dense.shape[2]), MIN_SIDE)
    if importlib.util.find_spec("lpips") is None:
        raise MetricUnavailable("lpips is not installed; pip install sparsetune[lpips]")
    import torch

    path = weights or _chosen or Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_FILE
    if not path.is_file():
        raise MetricUnavailable(
            f'lpips found no AlexNet weights at {path}; run `python -c "import torchvision; '
            f"torchvision.models.alexnet(weights='DEFAULT')\"` once online, or use --lpips-weights with "
            f"a copy of {WEIGHTS_FILE}"
        )
    model = _model(path)
    values: list[float] = []
    with torch.inference_mode():
        for start in range(0, len(dense), _BATCH):
            batches = (frames[start : start + _BATCH].astype(np.float32) for frames in (dense, sparse))
            half = np.float32(np.iinfo(dense.dtype).max / 2)
            d, s = (torch.from_numpy(batch / half - 1).permute(0, 3, 1, 2) for batch in batches)
            values += model(d, s).flatten().tolist()
    return values


@metric(
    range=(0.0, math.inf),
    higher_is_better=False,
    source="Zhang et al. 2018, doi:10.1109/CVPR.2018.00068; the authors' package lpips",
)
@pooled(distances)
def lpips(slabs: Sequence[list[float]]) -> float:
    """LPIPS 0.1 with AlexNet, frames scaled to [-1, 1] as the authors ask; mean over frames."""
    values = [value for slab in slabs for value in slab]
    return math.fsum(values) / len(values)


@functools.lru_cache(maxsize=1)
def _model(weights: Path) -> Any:
    import lpips as package
    import torch

    _check_hash(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package still passes torchvision's old `pretrained` argument
        # pnet_rand leaves the backbone empty instead of downloading it; it is filled from the file below.
        model = package.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)
    try:
        loaded = torch.load(weights, map_location="cpu", weights_only=True)
        # The package splits AlexNet's `features.N` into slices and keeps N: `slice2.3.weight` is `features.3.weight`.
        model.net.load_state_dict({key: loaded[f"features.{key.split('.', 1)[1]}"] for key in model.net.state_dict()})
    except (OSError, EOFError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
        detail = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MetricError(f"{weights} is not a whole copy of {WEIGHTS_FILE}: {detail}") from error
    return model.eval()


def _check_hash(weights: Path) -> None:
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(WEIGHTS_HASH):
        raise MetricError(
            f"{weights} is not a whole copy of {WEIGHTS_FILE}: its SHA-256 begins with {found[:8]}; copy the file again"
        )
