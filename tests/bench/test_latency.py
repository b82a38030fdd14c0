import time

import torch

from sparsetune.attention.backends import FlexBackend, ReferenceBackend, SpargeBackend
from sparsetune.attention.backends.backend import Backend
from sparsetune.attention.thresholds import HeadThresholds
from sparsetune.bench.latency import time_calls, time_shape
from tests.attention.conftest import structured

FORCED = (HeadThresholds(-1.0, topk=1.0), HeadThresholds(-1.0, topk=0.25))


def test_calls_are_timed_after_warming_up() -> None:
    called = []

    def run() -> None:
        called.append(time.sleep(0.05 if len(called) < 2 else 0.01))

    times = time_calls(run, torch.device("cpu"), repeats=3, warm_up=2)
    assert len(called) == 5
    assert len(times) == 3
    assert all(10 <= milliseconds < 50 for milliseconds in times)


def test_a_shape_has_a_row_for_each_kernel_and_sparsity() -> None:
    q, k, v = structured(heads=2, tokens=500)
    reported = []
    times = time_shape(
        q, k, v, (ReferenceBackend(),), repeats=1, forced=FORCED, on_time=lambda name, ms: reported.append((name, ms))
    )
    assert (times.batch, times.heads, times.tokens, times.head_dim, times.dtype) == (2, 2, 500, 64, "float32")
    assert list(times.dense_ms) == ["sdpa"]
    assert [(one.kernel, one.rule) for one in times.sparse] == [("reference", "topk")] * 2
    # 4 x 8 blocks: two a row are taken, and the first column, the last row and the last column anyway.
    assert times.sparse[0].sparsity == 0.0
    assert 1 - (3 * 4 + 8) / 32 <= times.sparse[1].sparsity <= 1 - (3 * 3 + 8) / 32
    assert [name.rpartition(" ")[0] for name, _ in reported] == ["dense", "reference topk at", "reference topk at"]
    assert [ms for _, ms in reported] == [times.dense_ms["sdpa"], *(one.latency_ms for one in times.sparse)]


def test_a_backend_that_refuses_the_shape_has_no_row() -> None:
    q, k, v = structured(heads=1, tokens=100)
    backends: tuple[Backend, ...] = (ReferenceBackend(), FlexBackend())
    assert time_shape(q, k, v, backends, repeats=1, forced=FORCED).sparse == ()
    assert SpargeBackend.missing(q.device) == "the model is on cpu"
