"""The task that calibration hands out: one prompt rendered dense and measured on the way."""

from collections.abc import Callable
from dataclasses import dataclass

from sparsetune.attention.backends import choose_backend
from sparsetune.attention.thresholds import HeadThresholds
from sparsetune.evaluation.baseline import BaselineCache
from sparsetune.evaluation.conditions import baseline_key
from sparsetune.executor import Emit, ModelSession, Stepped
from sparsetune.models.prompts import AnyPrompt
from sparsetune.tuning.calibrate import calibrate
from sparsetune.tuning.curves import Arrangement, Curves


@dataclass(frozen=True)
class CalibratePrompt:
    """Calibrates on a prompt; what is not said here is as in `calibrate`.

    Args:
        backend: the kernel to calibrate for, as the configuration names it.
        cache: gets the dense video that this renders.
    """

    prompt: AnyPrompt
    seed: int
    steps: tuple[int, ...]
    arrangements: tuple[Arrangement, ...]
    points: tuple[HeadThresholds, ...]
    backend: str
    select_partial: bool
    cache: BaselineCache

    def run(self, place: ModelSession, emit: Emit) -> Curves:
        """Calibrate; every step is told as `Stepped`.

        Raises:
            TuningError: a layer made no call that could be measured.
            GenerationError: the rendering failed.
        """
        renderer = place.plain()
        curves, rendering = calibrate(
            renderer,
            self.prompt,
            self.seed,
            steps=self.steps,
            arrangements=self.arrangements,
            points=self.points,
            backend=choose_backend(self.backend, renderer.loaded.device),
            select_partial=self.select_partial,
            on_step=_telling(emit),
        )
        key = baseline_key(renderer, self.prompt, self.seed)
        self.cache.get_or_render(key, lambda: (rendering.frames, rendering.seconds))
        return curves


def _telling(emit: Emit) -> Callable[[int, int], None]:
    return lambda step, num_steps: emit(Stepped("dense", step, num_steps))
