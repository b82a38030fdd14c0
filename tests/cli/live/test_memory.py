import sys
from types import SimpleNamespace

import pytest

from sparsetune.cli.live.memory import Memory, read_memory


def test_a_gpu_that_nobody_uses_is_not_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    # Any further question would fail on this stand-in, as it would initialise CUDA in earnest.
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: False)))
    assert read_memory().gpu is None


def test_without_pytorch_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    memory = read_memory()
    assert memory.gpu is None and "torch" not in sys.modules


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_process_s_memory_grows_with_what_it_holds() -> None:
    before = read_memory().process
    held = b"x" * (1 << 28)
    after = read_memory().process
    assert before is not None and after is not None
    assert after - before == pytest.approx(0.25, abs=0.05)
    assert len(held) == 1 << 28


def test_what_is_not_known_is_not_said() -> None:
    assert Memory().text == ""
    assert Memory(process=1.25).text == "process 1.2 GiB"


@pytest.mark.gpu
def test_a_gpu_in_use_tells_what_is_held_of_it() -> None:
    import torch

    held = torch.zeros(1 << 28, device="cuda")  # 1 GiB
    memory = read_memory()
    assert memory.gpu is not None and memory.gpu_peak is not None and memory.gpu_total is not None
    assert 1.0 <= memory.gpu <= memory.gpu_peak < memory.gpu_total
    assert memory.gpu < 2.0 and held.numel() == 1 << 28
