"""The task that searches hand out: a policy's video of one prompt, measured against the dense one."""

from dataclasses import dataclass

from sparsetune.attention.policy import Policy
from sparsetune.engine import Emit, Side, Stepped, Workplace
from sparsetune.errors import GenerationError
from sparsetune.evaluation.baseline import BaselineCache
from sparsetune.evaluation.pair import PromptResult, Watch, evaluate_prompt
from sparsetune.models.prompts import AnyPrompt


@dataclass(frozen=True)
class ScorePrompt:
    """Renders a prompt under a policy and measures it.

    Args:
        prompt: what is rendered.
        policy: what is at work.
        backend: the kernel of sparse calls, as the configuration names it.
        seed: of both renderings, where the prompt has none of its own.
        cache: of dense videos.
        metrics: names of registered metrics.
    """

    prompt: AnyPrompt
    policy: Policy
    backend: str
    seed: int
    cache: BaselineCache
    metrics: tuple[str, ...]

    def run(self, place: Workplace, emit: Emit) -> PromptResult:
        """Render and measure; every step is told as `Stepped`.

        Raises:
            GenerationError: out of memory, or the frames are NaN or black.
            MetricError: a metric is unknown or gave no finite number.
        """
        handle = place.sparse(self.policy, self.backend)
        result = evaluate_prompt(
            place.renderer, handle, self.prompt, self.seed, self.cache, self.metrics, watching(emit)
        )
        if result.error is not None:
            raise GenerationError(result.error)
        return result


def watching(emit: Emit) -> Watch:
    """Tell every denoising step as `Stepped`."""

    def watch(side: Side, step: int, num_steps: int, cached: bool) -> None:
        emit(Stepped(side, step, num_steps, cached))

    return watch
