"""One prompt, dense and sparse."""

import numpy as np
import pytest

from sparsetune import metrics
from sparsetune.errors import GenerationError, MetricError, OutOfMemoryError
from sparsetune.evaluation.baseline import BaselineCache
from sparsetune.evaluation.prompt import evaluate_prompt
from tests.evaluation.conftest import POLICY, FakeHandle, FakeRenderer

NAMES = metrics.BASE_METRICS


def test_the_metrics_are_those_of_the_two_videos(
    renderer: FakeRenderer, handle: FakeHandle, cache: BaselineCache
) -> None:
    result, pair = evaluate_prompt(renderer, handle, "a", 42, cache, NAMES)
    assert pair is not None
    renderer.handle = None
    np.testing.assert_array_equal(pair.dense, renderer.render("a", 42).frames)
    assert result.metrics == metrics.compute(pair.dense, pair.sparse, NAMES)
    assert (result.seconds_dense, result.seconds_sparse, result.error) == (2.0, 1.0, None)
    assert result.sparsity == pytest.approx(0.4)


def test_the_dense_video_is_rendered_without_the_policy_and_not_counted(
    renderer: FakeRenderer, handle: FakeHandle, cache: BaselineCache
) -> None:
    result = evaluate_prompt(renderer, handle, "a", 42, cache, NAMES)[0]
    assert renderer.rendered == [("dense", "a"), ("sparse", "a")]
    assert handle.policy == POLICY
    assert handle.num_resets == 1
    assert result.stats is not None
    assert {record.calls for record in result.stats.records} == {1}


def test_the_dense_video_comes_from_the_cache_the_second_time(
    renderer: FakeRenderer, handle: FakeHandle, cache: BaselineCache
) -> None:
    first = evaluate_prompt(renderer, handle, "a", 42, cache, NAMES)[0]
    second = evaluate_prompt(renderer, handle, "a", 42, cache, NAMES)[0]
    assert renderer.rendered == [("dense", "a"), ("sparse", "a"), ("sparse", "a")]
    assert (first.dense_cached, second.dense_cached) == (False, True)
    assert first.metrics == second.metrics


def test_every_step_is_reported(renderer: FakeRenderer, handle: FakeHandle, cache: BaselineCache) -> None:
    reported: list[tuple[str, int, int, bool]] = []
    for _ in range(2):
        evaluate_prompt(renderer, handle, "a", 42, cache, NAMES, lambda *step: reported.append(step))
    sparse = [("sparse", step, 4, False) for step in (1, 2, 3, 4)]
    assert reported == [*(("dense", step, 4, False) for step in (1, 2, 3, 4)), *sparse, ("dense", 4, 4, True), *sparse]


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_black_or_nan_frames_are_a_failed_prompt_without_a_number(
    renderer: FakeRenderer, handle: FakeHandle, cache: BaselineCache, kind: str
) -> None:
    renderer.failing[kind, "a"] = GenerationError("frames must show something, but all are black")
    result, pair = evaluate_prompt(renderer, handle, "a", 42, cache, NAMES)
    assert pair is None
    assert result.error == "frames must show something, but all are black"
    assert (dict(result.metrics), result.sparsity, result.seconds_sparse) == ({}, None, None)
    assert handle.policy == POLICY


def test_out_of_memory_ends_the_evaluation(renderer: FakeRenderer, handle: FakeHandle, cache: BaselineCache) -> None:
    error = OutOfMemoryError("the video must fit into memory, but it ran out; try --vae-tiling")
    renderer.failing["sparse", "a"] = error
    with pytest.raises(OutOfMemoryError, match="try --vae-tiling"):
        evaluate_prompt(renderer, handle, "a", 42, cache, NAMES)


def test_a_metric_that_cannot_be_computed_has_its_reason(
    renderer: FakeRenderer, handle: FakeHandle, cache: BaselineCache
) -> None:
    result = evaluate_prompt(renderer, handle, "a", 42, cache, (*NAMES, "ms_ssim"))[0]
    assert set(result.unavailable) == {"ms_ssim"}
    assert set(result.metrics) == set(NAMES)


def test_an_unknown_metric_is_refused(renderer: FakeRenderer, handle: FakeHandle, cache: BaselineCache) -> None:
    with pytest.raises(MetricError, match="unknown metric 'psnrr'"):
        evaluate_prompt(renderer, handle, "a", 42, cache, ("psnrr",))
