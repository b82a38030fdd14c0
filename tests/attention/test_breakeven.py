import json
from pathlib import Path

import pytest
import torch

from sparsetune.attention.breakeven import (
    BreakEvenCheck,
    BreakEvenTable,
    ShapeTimes,
    SparseTime,
    crossing,
    load_table,
    save_table,
)
from sparsetune.errors import BackendError


def shape(tokens: int = 17776, batch: int = 2, dense: float = 5.0, kernel: str = "sparge", **other) -> ShapeTimes:
    sparse = tuple(
        SparseTime(kernel=kernel, rule="topk", sparsity=sparsity, latency_ms=latency)
        for sparsity, latency in ((0.0, 6.0), (0.5, 3.0), (0.9, 1.0))
    )
    given = {"batch": batch, "heads": 30, "tokens": tokens, "head_dim": 64, "dtype": "bfloat16"} | other
    return ShapeTimes(**given, dense_ms={"sdpa": dense, "flash": 7.0}, sparse=sparse)


def table(*shapes: ShapeTimes) -> BreakEvenTable:
    return BreakEvenTable(device="NVIDIA H100", versions={"torch": "2.11"}, shapes=shapes)


@pytest.mark.parametrize(
    ("points", "dense", "wanted"),
    [
        ([(0.0, 6.0), (0.5, 3.0)], 5.0, 1 / 6),  # between two points
        ([(0.5, 3.0), (0.0, 6.0)], 5.0, 1 / 6),  # in any order
        ([(0.0, 6.0), (0.5, 3.0)], 3.0, 0.5),  # at a point
        ([(0.1, 4.0), (0.5, 3.0)], 5.0, 0.0),  # always
        ([(0.0, 6.0), (0.5, 5.5)], 5.0, None),  # never
        ([(0.0, 6.0), (0.2, 4.0), (0.3, 5.5), (0.5, 4.5)], 5.0, 0.4),  # noise: the last crossing counts
        ([], 5.0, None),
    ],
)
def test_the_crossing_is_where_sparse_begins_to_pay(points, dense: float, wanted: float | None) -> None:
    assert crossing(points, dense) == (None if wanted is None else pytest.approx(wanted))


def test_break_even_is_against_what_pytorch_runs_by_itself() -> None:
    assert shape(dense=5.0).break_even("sparge") == pytest.approx(1 / 6)
    assert shape(dense=0.5).break_even("sparge") is None
    assert shape().break_even("flex") is None


def test_the_nearest_shape_of_that_kind_decides() -> None:
    held = table(shape(batch=1, dense=6.0), shape(batch=2, dense=3.0))
    assert held.limit("sparge", (1, 30, 17776, 64), "bfloat16") == 0.0
    assert held.limit("sparge", (2, 30, 16000, 64), "bfloat16") == pytest.approx(0.5)
    assert table(shape(dense=0.5)).limit("sparge", (2, 30, 17776, 64), "bfloat16") > 1


@pytest.mark.parametrize(
    ("kernel", "size", "dtype"),
    [
        ("flex", (2, 30, 17776, 64), "bfloat16"),
        ("sparge", (2, 30, 17776, 128), "bfloat16"),
        ("sparge", (2, 30, 17776, 64), "float16"),
        ("sparge", (2, 30, 1312, 64), "bfloat16"),
    ],
)
def test_what_nothing_alike_was_measured_for_is_unknown(kernel: str, size: tuple[int, ...], dtype: str) -> None:
    assert table(shape()).limit(kernel, size, dtype) is None


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    save_table(table(shape()), tmp_path / "here" / "table.json")
    assert load_table(tmp_path / "here" / "table.json", "NVIDIA H100") == table(shape())


def test_a_table_that_cant_be_used_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    with pytest.raises(
        BackendError, match=r"cannot read the break-even table .*table.json: No such file.*; run `sparsetune"
    ):
        load_table(path, "NVIDIA H100")
    for content in ("{", json.dumps({"device": "NVIDIA H100"}), "[1]"):
        path.write_text(content)
        with pytest.raises(BackendError, match="is no break-even table"):
            load_table(path, "NVIDIA H100")
    save_table(table(shape()), path)
    with pytest.raises(BackendError, match=r"was measured on NVIDIA H100.*, not on this machine's NVIDIA A100"):
        load_table(path, "NVIDIA A100")


Q = torch.empty(2, 30, 17776, 64, dtype=torch.bfloat16, device="meta")
REASON = "sparse is slower under a sparsity of 17% here"


def break_even_check(held: BreakEvenTable | None = None) -> BreakEvenCheck:
    return BreakEvenCheck(held or table(shape()), "sparge")


def record(of: BreakEvenCheck, layer: str, sparsity: float) -> None:
    of.record(layer, torch.full((30,), 100.0 * (1 - sparsity), dtype=torch.float64), 3000.0)


def test_a_layer_that_skipped_too_little_runs_dense_from_the_next_step_on() -> None:
    check = break_even_check()
    for layer, sparsity in (("a", 0.1), ("b", 0.5)):
        assert check.reason_to_run_dense(layer, 0, Q) is None
        record(check, layer, sparsity)
    assert check.reason_to_run_dense("a", 0, Q) is None  # another call of the same step
    assert check.reason_to_run_dense("a", 1, Q) == REASON
    assert check.reason_to_run_dense("b", 1, Q) is None


def test_a_dense_layer_is_checked_again() -> None:
    check = break_even_check()
    check.reason_to_run_dense("a", 0, Q)
    record(check, "a", 0.1)
    reasons = [check.reason_to_run_dense("a", step, Q) for step in range(1, 7)]
    assert reasons == [REASON] * 5 + [None]
    record(check, "a", 0.6)
    assert check.reason_to_run_dense("a", 7, Q) is None


def test_both_calls_of_a_step_count_together() -> None:
    check = break_even_check()
    check.reason_to_run_dense("a", 0, Q)
    record(check, "a", 0.0)
    record(check, "a", 0.5)
    assert check.reason_to_run_dense("a", 1, Q) is None  # 0.25 in all


def test_a_new_generation_forgets() -> None:
    check = break_even_check()
    check.reason_to_run_dense("a", 3, Q)
    record(check, "a", 0.1)
    assert check.reason_to_run_dense("a", 4, Q) == REASON
    assert check.reason_to_run_dense("a", 0, Q) is None


def test_a_kernel_that_never_pays_is_refused_and_an_unknown_shape_runs_sparse() -> None:
    never = break_even_check(table(shape(dense=0.5)))
    never.reason_to_run_dense("a", 0, Q)
    record(never, "a", 0.99)
    assert never.reason_to_run_dense("a", 1, Q) == "sparse is never faster here"
    assert never.reason_to_run_dense("a", 1, Q[:, :, :1000]) is None
    assert never.reason_to_run_dense("a", None, Q) is None
