"""Which trial wins by the validation prompts, on renderings with known PSNR."""

from collections.abc import Mapping
from dataclasses import dataclass

import pytest

from sparsetune.attention.policy import Policy
from sparsetune.attention.schedule import DenseSchedule
from sparsetune.errors import GenerationError
from sparsetune.evaluation.prompt import PromptResult
from sparsetune.executor import Emit, StepDone
from sparsetune.metrics import Gate
from sparsetune.tuning.events import TrialResult, TuningListener, Validation
from sparsetune.tuning.search.validation import validated_winner
from tests.executor.engines import FakeExecutor

GATE = Gate(min_frame_cosine=0.98, min_psnr=35.0, min_psnr_worst=28.0)
PROMPTS = ("a cat", "a dog")


def trial(number: int, seconds: float, psnr: float, feasible: bool = True) -> TrialResult:
    """A trial that takes `seconds` of a dense second; its policy has its number of dense steps, for `Score` to know."""
    policy = Policy.uniform([("a", 1)], schedule=DenseSchedule(number / 100))
    psnrs = {"mean psnr": 35.0 - psnr, "pooled psnr": 35.0 - psnr, "worst prompt's psnr": 28.0 - psnr}
    shortfalls = {"mean frame_cosine": -0.015, **psnrs}
    return TrialResult(number, {}, "complete", None, policy, (), 0.5, psnr, psnr, 1.0, feasible, 9.0, shortfalls,
                       seconds_sparse=seconds, seconds_dense=1.0)  # fmt: skip


@dataclass
class Score:
    psnr: float | None

    def run(self, session: object, emit: Emit) -> PromptResult:
        emit(StepDone("trials", "dense", 1, 1, cached=True))
        emit(StepDone("trials", "sparse", 1, 1))
        if self.psnr is None:
            raise GenerationError("out of memory")
        return PromptResult("", 0, metrics={"psnr": self.psnr, "frame_cosine": 0.99})


class Recorder(TuningListener):
    def __init__(self) -> None:
        self.validations: list[Validation] = []
        self.steps: list[tuple[str, int, int]] = []

    def on_validation(self, validation: Validation) -> None:
        self.validations.append(validation)

    def on_step(self, event: StepDone) -> None:
        self.steps.append((event.phase, event.index, event.num_renderings))


class Context:
    """What of a TuningContext validation uses; `psnrs` are of each trial on each validation prompt."""

    goal, search_gate, in_time = "speed", GATE, True

    def __init__(self, psnrs: Mapping[int, tuple[float | None, float]], prompts: tuple[str, ...] = PROMPTS) -> None:
        self.psnrs, self.validation_prompts, self.recorder = psnrs, prompts, Recorder()
        self.listeners, self.executor = (self.recorder,), FakeExecutor()

    def has_time(self) -> bool:
        return self.in_time

    def score(self, prompt: str, policy: Policy, metrics: tuple[str, ...]) -> Score:
        assert {"psnr", "frame_cosine"} <= set(metrics)
        return Score(self.psnrs[round(policy.schedule.dense_fraction * 100)][PROMPTS.index(prompt)])


def test_the_best_trial_wins_if_it_meets_the_gate_on_the_validation_prompts() -> None:
    context = Context({0: (34.0, 38.0)})
    best, validations, _ = validated_winner(context, (trial(0, 0.4, 35.5), trial(1, 0.5, 40.0)))
    assert best.number == 0
    assert [(one.number, one.num_prompts, one.psnr, one.psnr_worst) for one in validations] == [(0, 2, 36.0, 34.0)]
    assert validations[0].feasible
    assert validations[0].shortfalls["mean psnr"] == pytest.approx(-1.0)
    assert context.recorder.validations == list(validations)
    assert context.recorder.steps == [("validation", index, 4) for index in range(4)]


def test_after_a_miss_the_next_is_the_best_that_exceeds_the_gate_by_what_was_lost() -> None:
    trials = (trial(0, 0.4, 36.0), trial(1, 0.42, 36.5), trial(2, 0.45, 41.0), trial(3, 0.6, 50.0))
    context = Context({0: (31.0, 33.0), 2: (36.0, 37.0)})  # trial 0 loses 4 dB, so trial 1 would miss the gate too
    best, validations, _ = validated_winner(context, trials)
    assert best.number == 2
    assert [(one.number, one.feasible) for one in validations] == [(0, False), (2, True)]


def test_where_none_exceeds_it_by_as_much_the_safest_is_tried_and_else_the_closest_wins(
    caplog: pytest.LogCaptureFixture,
) -> None:
    trials = (trial(0, 0.4, 36.0), trial(1, 0.42, 36.5), trial(2, 0.45, 36.2))
    best, validations, _ = validated_winner(Context({0: (31.0, 31.0), 1: (33.0, 34.0)}), trials)
    assert best.number == 1
    assert [one.number for one in validations] == [0, 1]
    assert "the winner, trial 1, misses it there by the least" in caplog.text


def test_a_trial_whose_rendering_fails_or_that_missed_the_gate_before_does_not_win() -> None:
    trials = (trial(0, 0.4, 36.0), trial(1, 0.5, 36.5), trial(2, 0.3, 34.0, feasible=False), trial(3, 1.2, 60.0))
    best, validations, _ = validated_winner(Context({0: (None, 40.0), 1: (36.0, 36.0)}), trials)
    assert best.number == 1
    assert [(one.number, one.psnr, one.feasible) for one in validations] == [(0, None, False), (1, 36.0, True)]


def test_without_validation_prompts_or_a_trial_that_could_win_nothing_is_rendered() -> None:
    trials = (trial(0, 0.4, 36.0), trial(1, 0.5, 40.0))
    assert validated_winner(Context({}, prompts=()), trials) == (trials[0], (), False)
    assert validated_winner(Context({}), (trial(2, 0.3, 34.0, feasible=False),)) == (None, (), False)


def test_four_trials_are_validated_at_most_and_none_after_the_first_when_time_is_up() -> None:
    trials = tuple(trial(number, 0.4 + number / 100, 36.0) for number in range(8))
    failing = dict.fromkeys(range(8), (None, 40.0))  # nothing is known of what they lose
    best, validations, _ = validated_winner(Context(failing), trials)
    assert ([one.number for one in validations], best.number) == ([0, 1, 2, 3], 0)
    context = Context(failing)
    context.in_time = False
    best, validations, _ = validated_winner(context, trials)
    assert ([one.number for one in validations], best.number) == ([0], 0)


def test_ctrl_c_keeps_what_is_known() -> None:
    class Interrupted(Context):
        def score(self, prompt: str, policy: Policy, metrics: tuple[str, ...]) -> Score:
            if round(policy.schedule.dense_fraction * 100) == 2:
                raise KeyboardInterrupt
            return super().score(prompt, policy, metrics)

    trials = (trial(0, 0.4, 36.0), trial(1, 0.42, 36.5), trial(2, 0.45, 41.0))
    best, validations, interrupted = validated_winner(Interrupted({0: (31.0, 33.0)}), trials)
    assert interrupted and best.number == 0
    assert [(one.number, one.feasible) for one in validations] == [(0, False)]
    best, validations, interrupted = validated_winner(Interrupted({}), trials[2:])
    assert interrupted and best.number == 2 and validations == ()
