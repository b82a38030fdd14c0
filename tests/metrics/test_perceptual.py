import hashlib
import sys
import types

import numpy as np
import pytest
import torch

from sparsetune.errors import MetricError
from sparsetune.metrics import MetricUnavailable, compute_available, load_metrics, lpips, perceptual

SLICES = {"slice1.0": "features.0", "slice2.3": "features.3"}


class SmallNet(torch.nn.Module):
    """Module names as in the package's split AlexNet: slices that keep the layers' indices."""

    def __init__(self):
        super().__init__()
        self.slice1 = torch.nn.Sequential()
        self.slice1.add_module("0", torch.nn.Conv2d(3, 2, 3))
        self.slice2 = torch.nn.Sequential()
        self.slice2.add_module("3", torch.nn.Conv2d(2, 2, 3))


class StandIn(torch.nn.Module):
    """Replaces the package where it isn't installed; its distance is a plain sum that a test can compute."""

    def __init__(self, net, version, pnet_rand, verbose):
        super().__init__()
        assert (net, version, pnet_rand, verbose) == ("alex", "0.1", True, False)  # nothing to download
        self.net = SmallNet()

    def forward(self, dense, sparse):
        assert dense.shape[1] == 3 and dense.min() >= -1 and dense.max() <= 1
        return (dense - sparse).square().mean(dim=(1, 2, 3), keepdim=True)


@pytest.fixture
def package(monkeypatch):
    module = types.ModuleType("lpips")
    module.LPIPS = StandIn
    module.__spec__ = types.SimpleNamespace(name="lpips")
    monkeypatch.setitem(sys.modules, "lpips", module)
    perceptual._model.cache_clear()
    yield module
    perceptual._model.cache_clear()


@pytest.fixture
def weights(tmp_path, monkeypatch):
    state = SmallNet().state_dict()
    named = {SLICES[key.rpartition(".")[0]] + "." + key.rpartition(".")[2]: value for key, value in state.items()}
    path = tmp_path / "alexnet.pth"
    torch.save({**named, "classifier.1.weight": torch.zeros(1)}, path)
    monkeypatch.setattr(perceptual, "WEIGHTS_HASH", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_a_missing_package_is_said(noise, monkeypatch):
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MetricUnavailable, match=r"lpips is not installed; pip install sparsetune\[lpips\]"):
        lpips(*noise(1, 40, 40))


def test_missing_weights_are_said_and_not_downloaded(noise, package, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", pytest.fail)
    _, unavailable = compute_available(*noise(1, 40, 40), ["lpips"])
    assert f"no AlexNet weights at {tmp_path}/hub/checkpoints/alexnet-owt-7be5be79.pth" in unavailable["lpips"]
    assert "--lpips-weights" in unavailable["lpips"] and "\n" not in unavailable["lpips"]


def test_frames_are_scaled_to_minus_one_and_one_and_averaged(noise, package, weights):
    dense, sparse = noise(6, 40, 44)
    expected = np.mean(((dense.astype(float) - sparse) / 127.5) ** 2)
    assert lpips(dense, sparse, weights=weights) == pytest.approx(expected, rel=1e-5)
    assert lpips(dense, dense.copy(), weights=weights) == 0.0


def test_the_backbone_is_filled_from_the_file(noise, package, weights):
    lpips(*noise(1, 40, 40), weights=weights)
    loaded = torch.load(weights)
    state = perceptual._model(weights).net.state_dict()
    for inner, outer in SLICES.items():
        assert torch.equal(state[f"{inner}.weight"], loaded[f"{outer}.weight"])


def test_the_process_s_weights_are_used(noise, package, weights):
    load_metrics(lpips_weights=weights)
    try:
        assert lpips(*noise(1, 40, 40)) > 0
    finally:
        load_metrics()


def test_a_file_that_was_changed_is_refused_by_its_hash(noise, package, weights):
    weights.write_bytes(weights.read_bytes() + b"x")
    with pytest.raises(
        MetricError, match=r"alexnet.pth is not a whole copy of alexnet-owt-.*: its SHA-256 begins with"
    ):
        lpips(*noise(1, 40, 40), weights=weights)


@pytest.mark.parametrize("content", [b"", b"no weights", None])
def test_a_file_that_is_not_alexnet_is_refused(noise, package, tmp_path, content):
    path = tmp_path / "wrong.pth"
    if content is None:
        torch.save({"other": torch.zeros(1)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(MetricError, match=r"wrong.pth is not a whole copy of alexnet-owt"):
        lpips(*noise(1, 40, 40), weights=path)


def test_frames_too_small_for_alexnet_are_unavailable(noise):
    with pytest.raises(MetricUnavailable, match="lpips needs frames of at least 32x32 pixels, got 31x60"):
        lpips(*noise(1, 31, 60))
