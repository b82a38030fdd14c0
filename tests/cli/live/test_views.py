import io
import itertools

import pytest
from rich.console import Console, RenderableType

from sparsetune.cli.live.evaluation import EvaluationState
from sparsetune.cli.live.evaluation_view import evaluation_rows
from sparsetune.cli.live.frame import Frame
from sparsetune.cli.live.memory import Memory
from sparsetune.cli.live.search import SearchState
from sparsetune.cli.live.search_view import search_rows
from sparsetune.evaluation.events import PromptStarted
from sparsetune.executor import StepDone
from tests.cli.live.events import done, evaluation, prompt, result, start, step, study

MEMORY = Memory(process=3.2, gpu=21.4, gpu_peak=25.0, gpu_total=79.6)


def drawn(rows: list[RenderableType], width: int = 80, height: int = 24) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(Frame(rows), end="")
    return capture.get().splitlines()


def searching(running: int = 1) -> SearchState:
    state = SearchState.begun(study(num_done=1), 0.0).calibrated(StepDone("calibration", "dense", 1, 10, 0, 2), 2.0)
    state = state.probed(StepDone("sensitivity", "sparse", 1, 10, 0, 4), 22.0).trial_started(start(1), 40.0)
    outcomes = [result(1, 0.218, 40.85), result(2, 0.466, 30.47, "pruned", "psnr 30.5 dB after 1 of 2 prompts")]
    for outcome in [*outcomes, result(3, None, None, "failed", "all frames are black")]:
        state = state.trial_ended(outcome, 60.0)
    for number in range(4, 4 + running):
        worker = f"gpu-{number}:cuda:0" if running > 1 else None
        state = state.trial_started(start(number, worker), 60.0).trial_stepped(step(number, 1, 6), 65.0)
    return state.trial_judged(prompt(4, 0, 38.0), 65.0) if running else state


def judging() -> SearchState:
    state = searching(0).won(result(1, 0.218, 40.85), 70.0).evaluation_begun(evaluation(use_tuned=False), 70.0)
    first = state.evaluations[0].prompt_started(PromptStarted(0, 4, "a red\ncircle", 1)).prompt_done(done(0, 37.0))
    first = first.prompt_started(PromptStarted(1, 4, "a blue square", 1)).stepped(
        StepDone("evaluation", "sparse", 6, 10, 1, 4)
    )
    return state.evaluation_went_on(first, 75.0)


def test_a_search_shows_phases_best_trials_time_and_memory() -> None:
    lines = drawn(search_rows(searching(), 70.0, MEMORY, 79, 24))
    head, phases, bar, best, now, *last, left, memory = lines
    assert head == "tune demo  demo-1  1:10"
    assert phases == "phase   calibrate 0:02 > probe 0:20 > [trials] > judge"
    assert bar.startswith("done    ━") and bar.endswith(" 32 %, 4 of 12 trials, 1 given up, 1 failed")
    assert best == "best    trial 1  sparsity 0.218, psnr 40.85 dB (worst 39.85)"
    assert now.startswith("now     trial 4   ━") and now.endswith("prompt 2/2  step  0/10  0:10  psnr 38.0 dB")
    assert last == [
        "last    trial 3    1:05  failed    all frames are black",
        "        trial 2    1:05  given up  psnr 30.5 dB after 1 of 2 prompts",
        "        trial 1    1:05  met       sparsity 0.218, psnr 40.85 dB (worst 39.85)",
    ]
    assert left == "left    1:04 for trials, 7:34 in all (8.57 s a trial over 3.5 trials)"
    assert memory == "memory  GPU 21.4 of 79.6 GiB, peak 25.0, process 3.2 GiB"


def test_trials_at_once_have_a_line_each_with_their_worker() -> None:
    lines = drawn(search_rows(searching(running=3), 70.0, MEMORY, 139, 30), 140)
    in_hand = [line for line in lines if "cuda" in line]
    assert [line.split("━")[0].strip() for line in in_hand] == ["now     trial 4", "trial 5", "trial 6"]
    assert in_hand[1].endswith("prompt 2/2  step  6/10  0:10  gpu-5:cuda:0")


def test_trials_that_do_not_fit_are_counted() -> None:
    lines = drawn(search_rows(searching(running=40), 70.0, MEMORY, 79, 24), height=24)
    assert len(lines) < 24
    assert "        and 25 more in hand" in lines
    assert lines[-1].startswith("memory")


def test_judging_shows_whose_videos_they_are_and_the_figures_so_far() -> None:
    lines = drawn(search_rows(judging(), 80.0, MEMORY, 79, 24))
    assert "phase   calibrate 0:02 > probe 0:20 > trials 0:30 > [judge]" in lines
    assert "judged  SpargeAttn's default thresholds" in lines
    assert "prompt  2/4  a blue square" in lines
    assert any(line.startswith("now     ━") and line.endswith("sparse, step 6/10") for line in lines)
    assert "so far  sparsity 0.250, psnr 37.00 dB (worst 37.00), the worst is prompt 1" in lines
    assert "last    prompt 1  sparsity 0.250, psnr 37.00 dB, frame_cosine 0.9900, 3.0 s" in lines


def test_refining_has_its_bar_and_its_time_left() -> None:
    state = SearchState.begun(study(1, tuner="calibrate"), 0.0).calibrated(
        StepDone("calibration", "dense", 10, 10, 1, 2), 8.0
    )
    lines = drawn(search_rows(state.refined(StepDone("refinement", "dense", 1, 10, 0, 2), 10.0), 10.0, MEMORY, 79, 24))
    assert "phase   calibrate 0:08 > [refine] > trials > judge" in lines
    assert any(line.startswith("done    ━") and line.endswith(" 5 %, step 1/20") for line in lines)
    assert any(line.startswith("left    0:38 for refining") for line in lines)


def test_phases_that_an_earlier_run_has_measured_are_kept() -> None:
    state = SearchState.begun(study(num_done=3), 0.0).trial_started(start(3), 1.0)
    assert "phase   calibrate kept > probe kept > [trials] > judge" in drawn(search_rows(state, 2.0, MEMORY, 79, 24))


def test_an_evaluation_shows_its_prompts() -> None:
    state = EvaluationState.begun(evaluation(), 0.0)
    state = state.prompt_done(done(0, 37.0)).prompt_done(done(1, error="all frames are black"))
    head, *_, last, first, left, memory = drawn(evaluation_rows(state, "eval demo", 41.0, MEMORY, 79, 24))
    assert head == "eval demo  the tuned checkpoint  0:41"
    assert last == "last    prompt 2  failed: all frames are black"
    assert first.startswith("        prompt 1  sparsity 0.250, psnr 37.00 dB")
    assert (left[:8], memory[:6]) == ("left    ", "memory")


STATES = [
    SearchState.begun(study(), 0.0),
    SearchState.begun(study(), 0.0).calibrated(StepDone("calibration", "dense", 3, 10, 0, 2), 9.0),
    searching(0),
    searching(1),
    searching(9),
    judging(),
    searching(0).won(result(1, 0.218, 40.85), 70.0),
]


@pytest.mark.parametrize(("width", "height"), [*itertools.product((1, 20, 40, 60, 80, 140), (4, 12, 50))])
def test_every_view_fits_every_terminal(width: int, height: int) -> None:
    views = [search_rows(state, 90.0, MEMORY, width - 1, height) for state in STATES]
    views.append(evaluation_rows(judging().evaluations[0], "eval demo", 90.0, Memory(), width - 1, height))
    for rows in views:
        lines = drawn(rows, width, height)
        assert 0 < len(lines) < height
        assert max(len(line) for line in lines) <= max(1, width - 1)
        assert all(line == line.rstrip() for line in lines)


def test_a_terminal_without_unicode_gets_plain_bars() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(file=file, width=80, height=24, force_terminal=True, color_system=None)
    console.print(Frame(search_rows(searching(), 70.0, MEMORY, 79, 24)))
    file.flush()
    assert b"----" in file.buffer.getvalue()  # type: ignore[attr-defined]
