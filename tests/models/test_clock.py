"""The clock of the denoising, on a transformer whose calls take known times."""

import pytest
import torch
from torch import Tensor, nn

from sparsetune.models import clock
from sparsetune.models.clock import DenoisingClock

CPU = torch.device("cpu")


class Passing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def timed(monkeypatch: pytest.MonkeyPatch, marks: list[float]) -> tuple[DenoisingClock, Passing]:
    """Run as many calls as there are pairs of marks: each one's begin and end in seconds."""
    transformer, times = Passing(), iter(marks)
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(times))
    with DenoisingClock([transformer], CPU) as found:
        for _ in range(len(marks) // 2):
            transformer(torch.zeros(1))
    return found, transformer


def test_seconds_are_from_the_first_call_to_the_end_of_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = timed(monkeypatch, [10.0, 13.0, 14.0, 15.0, 16.0, 17.5])
    assert found.seconds == 7.5


def test_a_step_is_timed_after_the_first_which_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = timed(monkeypatch, [10.0, 13.0, 14.0, 15.0, 16.0, 17.0])
    assert found.step_seconds(3) == 2.0


def test_both_calls_of_guidance_are_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = timed(monkeypatch, [0.0, 5.0, 5.0, 6.0, 7.0, 8.0, 8.0, 9.0])
    assert found.step_seconds(2) == 3.0


def test_without_calls_or_further_steps_there_is_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = timed(monkeypatch, [])
    assert found.seconds is None and found.step_seconds(4) is None
    found, _ = timed(monkeypatch, [0.0, 1.0])
    assert found.step_seconds(1) is None


def test_the_hooks_are_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    _, transformer = timed(monkeypatch, [0.0, 1.0])
    assert not transformer._forward_hooks and not transformer._forward_pre_hooks


def test_a_call_begins_at_its_first_submodule_when_offloaded_weights_have_arrived(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = iter([0.0, 4.0, 6.0])
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(times))
    transformer = nn.Sequential(Passing(), Passing())
    with DenoisingClock([transformer], CPU) as found:
        transformer(torch.zeros(1))
    assert found.seconds == 2.0
