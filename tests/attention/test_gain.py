import torch

from sparsetune.attention.breakeven import BreakEvenCheck, BreakEvenTable
from tests.attention.test_breakeven import shape, table

Q = torch.empty(2, 30, 17776, 64, dtype=torch.bfloat16, device="meta")
REASON = "sparse is slower under a sparsity of 17% here"


def watch(held: BreakEvenTable | None = None) -> BreakEvenCheck:
    return BreakEvenCheck(held or table(shape()), "sparge")


def ran(of: BreakEvenCheck, layer: str, sparsity: float) -> None:
    of.ran(layer, torch.full((30,), 100.0 * (1 - sparsity), dtype=torch.float64), 3000.0)


def test_a_layer_that_skipped_too_little_runs_dense_from_the_next_step_on() -> None:
    gain = watch()
    for layer, sparsity in (("a", 0.1), ("b", 0.5)):
        assert gain.loss(layer, 0, Q) is None
        ran(gain, layer, sparsity)
    assert gain.loss("a", 0, Q) is None  # another call of the same step
    assert gain.loss("a", 1, Q) == REASON
    assert gain.loss("b", 1, Q) is None


def test_a_dense_layer_is_looked_at_again() -> None:
    gain = watch()
    gain.loss("a", 0, Q)
    ran(gain, "a", 0.1)
    said = [gain.loss("a", step, Q) for step in range(1, 7)]
    assert said == [REASON] * 5 + [None]
    ran(gain, "a", 0.6)
    assert gain.loss("a", 7, Q) is None


def test_both_calls_of_a_step_count_together() -> None:
    gain = watch()
    gain.loss("a", 0, Q)
    ran(gain, "a", 0.0)
    ran(gain, "a", 0.5)
    assert gain.loss("a", 1, Q) is None  # 0.25 in all


def test_a_new_generation_forgets() -> None:
    gain = watch()
    gain.loss("a", 3, Q)
    ran(gain, "a", 0.1)
    assert gain.loss("a", 4, Q) == REASON
    assert gain.loss("a", 0, Q) is None


def test_a_kernel_that_never_pays_is_said_so_and_an_unknown_shape_runs_sparse() -> None:
    never = watch(table(shape(dense=0.5)))
    never.loss("a", 0, Q)
    ran(never, "a", 0.99)
    assert never.loss("a", 1, Q) == "sparse is never faster here"
    assert never.loss("a", 1, Q[:, :, :1000]) is None
    assert never.loss("a", None, Q) is None
