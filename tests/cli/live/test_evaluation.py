from sparsetune.cli.live.evaluation import EvaluationState
from sparsetune.evaluation.events import PromptStarted
from sparsetune.executor import StepDone
from tests.cli.live.events import done, evaluation


def begun(**options: object) -> EvaluationState:
    return EvaluationState.begun(evaluation(**options), 0.0)  # type: ignore[arg-type]


def test_work_is_the_steps_of_all_renderings_and_cached_ones_are_taken_out() -> None:
    state = begun()
    assert state.phase.total == 80
    state = state.prompt_started(PromptStarted(0, 4, "a", 1)).stepped(
        StepDone("evaluation", "dense", 10, 10, 0, 4, cached=True)
    )
    assert (state.phase.total, state.phase.done) == (70, 0)
    state = state.stepped(StepDone("evaluation", "sparse", 1, 10, 0, 4))
    assert (state.phase.done, state.side, state.step) == (1, "sparse", 1)


def test_a_side_that_was_thought_cached_and_is_not_comes_on_top() -> None:
    state = EvaluationState.begun(evaluation(), 0.0, ("dense",))
    assert state.phase.total == 40
    assert state.stepped(StepDone("evaluation", "dense", 10, 10, 0, 4, cached=True)).phase.total == 40
    rendered = state.stepped(StepDone("evaluation", "dense", 1, 10, 0, 4)).stepped(
        StepDone("evaluation", "dense", 2, 10, 0, 4)
    )
    assert (rendered.phase.total, rendered.phase.done) == (50, 2)


def test_the_ladder_has_four_renderings() -> None:
    assert begun(ladder=True).phase.total == 160


def test_figures_so_far_are_means_and_the_worst_over_prompts_that_have_some() -> None:
    state = begun()
    assert (state.mean("psnr"), state.sparsity, state.worst) == (None, None, None)
    for one in (done(0, 38.0), done(1, 34.0), done(2, error="all frames are black")):
        state = state.prompt_done(one)
    assert (state.mean("psnr"), state.sparsity) == (36.0, 0.25)
    assert state.worst is not None and state.worst.index == 1


def test_a_prompt_that_failed_counts_as_done() -> None:
    state = begun().prompt_done(done(0, error="all frames are black"))
    assert state.phase.fraction == 0.25
