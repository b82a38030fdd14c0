"""Events of a search and an evaluation as the library emits them."""

from pathlib import Path
from typing import Any

from sparsetune.attention.policy import Policy
from sparsetune.evaluation.events import EvaluationStarted, PromptDone
from sparsetune.evaluation.prompt import PromptResult
from sparsetune.executor import StepDone
from sparsetune.tuning.events import StudyStarted, TrialPrompt, TrialResult, TrialStarted, TrialState

POLICY = Policy.uniform([("transformer.blocks.0.attn1", 2)])
NUM_STEPS = 10


class FakeClock:
    """Clock that a test advances."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def study(
    n_trials: int = 12, num_done: int = 0, prompts: int = 2, num_validation_prompts: int = 0, **tune: Any
) -> StudyStarted:
    config = {"model": {"name": "demo"}, "tune": {"tuner": "optuna", "objective": "sparsity", **tune}}
    texts = tuple(f"prompt {index}" for index in range(prompts))
    return StudyStarted(
        "demo-1", "sqlite:///x.db", config, n_trials, num_done, texts, NUM_STEPS, Path("out"), 4, num_validation_prompts
    )


def judged(psnr: float = 38.0, error: str | None = None, prompt: str = "a red circle") -> PromptResult:
    if error is not None:
        return PromptResult(prompt=prompt, seed=1, error=error)
    return PromptResult(
        prompt=prompt, seed=1, metrics={"frame_cosine": 0.99, "psnr": psnr}, sparsity=0.25, seconds_dense=4.0,
        seconds_sparse=3.0, dense_cached=True,
    )  # fmt: skip


def start(number: int, worker: str | None = None) -> TrialStarted:
    return TrialStarted(number, {"l1_all": 0.1}, POLICY, worker)


def step(number: int, index: int, at: int) -> StepDone:
    return StepDone("trials", "sparse", at, NUM_STEPS, index, 2, trial=number)


def prompt(number: int, index: int, psnr: float) -> TrialPrompt:
    return TrialPrompt(number, index, 2, judged(psnr))


def result(
    number: int,
    sparsity: float | None = 0.3,
    psnr: float | None = 36.0,
    state: TrialState = "complete",
    reason: str | None = None,
    num_prompts: int = 2,
    seconds: float = 65.0,
) -> TrialResult:
    return TrialResult(
        number=number, params={"l1_all": 0.125, "order": "raster"}, state=state, reason=reason, policy=POLICY,
        prompts=tuple(judged() for _ in range(num_prompts)), sparsity=sparsity, psnr=psnr,
        psnr_worst=None if psnr is None else psnr - 1, frame_cosine=0.99,
        feasible=state == "complete" and (psnr or 0.0) > 35, seconds=seconds,
    )  # fmt: skip


def evaluation(prompts: int = 4, use_tuned: bool = True, ladder: bool = False) -> EvaluationStarted:
    sides = ("dense", "sparse", "dense_again", "kernel") if ladder else ("dense", "sparse")
    texts = tuple(f"prompt {index}" for index in range(prompts))
    return EvaluationStarted({"use_tuned": use_tuned}, texts, NUM_STEPS, sides, ("psnr",))


def done(index: int, psnr: float = 38.0, error: str | None = None) -> PromptDone:
    return PromptDone(index, 4, judged(psnr, error))
