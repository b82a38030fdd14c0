"""LPIPS of two videos, an optional extra: `pip install sparsetune[lpips]`.

Nothing is downloaded: the AlexNet weights come from torch's cache or a given file.
"""

import functools
import importlib.util
import math
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from sparsetune.errors import MetricError
from sparsetune.metrics.registry import Frames, MetricUnavailable, check_min_side, checked, metric

WEIGHTS_FILE = "alexnet-owt-7be5be79.pth"  # torchvision's name for AlexNet's ImageNet weights in torch's cache
WEIGHTS_VARIABLE = "SPARSETUNE_LPIPS_WEIGHTS"  # path of those weights, where they are elsewhere
MIN_SIDE = 32  # AlexNet's pooling reduces smaller frames to nothing
_BATCH = 4  # frames at a time: about 150 MB at 480x720


@checked
@metric(
    range=(0.0, math.inf),
    higher_is_better=False,
    source="Zhang et al. 2018, doi:10.1109/CVPR.2018.00068; the authors' package lpips",
)
def lpips(dense: Frames, sparse: Frames, *, weights: Path | None = None) -> float:
    """LPIPS 0.1 with AlexNet, frames scaled to [-1, 1] as the authors ask; mean over frames.

    `weights` are torchvision's of AlexNet; by default the file that SPARSETUNE_LPIPS_WEIGHTS names, or else
    `checkpoints/alexnet-owt-7be5be79.pth` in torch's cache (`torch.hub.get_dir()`).

    Raises:
        MetricUnavailable: the package or the weights are missing, or a side is under 32 pixels.
        MetricError: the weights' file isn't AlexNet's.
    """
    check_min_side("lpips", dense.shape[1:3], MIN_SIDE)
    if importlib.util.find_spec("lpips") is None:
        raise MetricUnavailable("lpips is not installed; pip install sparsetune[lpips]")
    import torch

    named = weights or os.environ.get(WEIGHTS_VARIABLE)
    path = Path(named) if named else Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_FILE
    if not path.is_file():
        raise MetricUnavailable(
            f'lpips found no AlexNet weights at {path}; run `python -c "import torchvision; '
            f"torchvision.models.alexnet(weights='DEFAULT')\"` once online, or set {WEIGHTS_VARIABLE} "
            f"to a copy of {WEIGHTS_FILE}"
        )
    model = _model(path)
    total = 0.0
    with torch.inference_mode():
        for start in range(0, len(dense), _BATCH):
            batches = (frames[start : start + _BATCH].astype(np.float32) for frames in (dense, sparse))
            d, s = (torch.from_numpy(batch / 127.5 - 1).permute(0, 3, 1, 2) for batch in batches)
            total += float(model(d, s).sum(dtype=torch.float64))
    return total / len(dense)


@functools.lru_cache(maxsize=1)
def _model(weights: Path) -> Any:
    import lpips as package
    import torch

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
