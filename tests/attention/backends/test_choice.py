import logging
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sparsetune.attention import backends
from sparsetune.attention.backends import BACKENDS, backend_choice, choose_backend, missing_backends
from sparsetune.errors import BackendError

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulated Hopper GPU with Triton, before any warning about it."""
    backends._log_once.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100")
    for name in ("triton", "spas_sage_attn"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)


def test_auto_takes_spargeattn_where_it_runs(gpu: None) -> None:
    choice = backend_choice("auto", GPU)
    assert (choice.backend.name, choice.reason) == ("sparge", "auto: the fastest of those that run here")


def test_auto_takes_flex_on_a_gpu_without_spargeattn_and_says_why(
    gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "spas_sage_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.delitem(sys.modules, "spas_sage_attn")
    monkeypatch.syspath_prepend(tmp_path)
    with caplog.at_level(logging.INFO):
        choice = backend_choice("auto", GPU)
    why = "auto; not sparge: spas_sage_attn can't be imported (undefined symbol: _ZN3c10)"
    assert (choice.backend.name, choice.reason) == ("flex", why)
    assert caplog.messages == [f"sparse attention runs on backend flex ({why})"]


def test_an_old_gpu_runs_the_reference_with_one_warning(
    gpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert [choose_backend("auto", GPU).name for _ in range(3)] == ["reference"] * 3
    assert len(caplog.messages) == 1
    assert "which is slow (auto; not sparge: NVIDIA H100 is older than Ampere" in caplog.text
    with pytest.raises(BackendError, match="backend flex needs a CUDA GPU, Ampere or newer, but NVIDIA H100 is"):
        choose_backend("flex", GPU)


def test_on_a_cpu_auto_is_the_reference() -> None:
    choice = backend_choice("auto", CPU)
    assert choice.backend.name == "reference"
    assert choice.reason == "auto; not sparge: the model is on cpu; not flex: the model is on cpu"


@pytest.mark.parametrize("name", ["reference", "dense"])
def test_what_is_asked_for_is_given(name: str) -> None:
    choice = backend_choice(name, CPU)
    assert (choice.backend.name, choice.reason) == (name, "asked for")


def test_a_missing_package_or_gpu_is_said() -> None:
    with pytest.raises(BackendError, match="backend sparge needs spas_sage_attn and a CUDA GPU, but the model is on"):
        choose_backend("sparge", CPU)
    with pytest.raises(BackendError, match="backend must be one of auto, reference, sparge, flex, dense, got 'magic'"):
        choose_backend("magic", CPU)


def test_every_backend_has_a_finding() -> None:
    assert set(missing_backends(CPU)) == set(BACKENDS) - {"auto"}
