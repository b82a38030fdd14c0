"""A step cache: transformer blocks are skipped in denoising steps where they would change little."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from sparsetune.attention.schedule import DenseSchedule
from sparsetune.errors import ThresholdError

CacheKind = Literal["first_block", "mag", "taylorseer", "sea"]
CACHE_KINDS: tuple[CacheKind, ...] = get_args(CacheKind)
WITH_THRESHOLD: tuple[CacheKind, ...] = ("first_block", "mag", "sea")
WITH_MAX_SKIPS: tuple[CacheKind, ...] = ("mag", "taylorseer", "sea")


@dataclass(frozen=True)
class StepCache:
    """Which cache of diffusers skips blocks, and when.

    `first_block` is First Block Cache, where the first block always runs and the others are skipped if its change of
    the hidden states differs from the last one's by less than `threshold`, relative. `mag` is MagCache, which skips all
    blocks while the error accumulated from calibrated ratios stays within `threshold`. `taylorseer` predicts every
    block's output from the last ones by their differences, in all but one of `max_skips` + 1 steps. `sea` is SeaCache,
    which skips all blocks while the change of the latents, filtered to what is signal at a step's noise, adds up to
    less than `threshold`, and extrapolates their residual from the last two that were computed.

    Args:
        kind: the cache.
        threshold: above 0; of all kinds but `taylorseer`.
        max_skips: most steps skipped in a row, at least 1; of all kinds but `first_block`.
        first, last: fractions in [0, 1] of the steps, rounded up, that are never skipped, at the start and at the end.
        ratios: of `mag`: for each transformer the ratio of one step's residual to the last one's, in the order of its
            steps.

    Raises:
        ThresholdError: a value is out of range, missing or of another kind of cache.
    """

    kind: CacheKind
    threshold: float | None = None
    max_skips: int | None = None
    first: float = 0.0
    last: float = 0.0
    ratios: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in CACHE_KINDS:
            raise ThresholdError(f"a cache must be one of {', '.join(CACHE_KINDS)}, got {self.kind!r}")
        if (self.threshold is not None) != (has_threshold := self.kind in WITH_THRESHOLD):
            raise ThresholdError(f"{self.kind} has {'a' if has_threshold else 'no'} threshold")
        if self.threshold is not None and not 0.0 < self.threshold < math.inf:
            raise ThresholdError(f"the threshold of {self.kind} must be above 0, got {self.threshold}")
        if (self.max_skips is not None) != (has_max_skips := self.kind in WITH_MAX_SKIPS):
            raise ThresholdError(f"{self.kind} has {'a' if has_max_skips else 'no'} max_skips")
        if self.max_skips is not None and self.max_skips < 1:
            raise ThresholdError(f"max_skips of {self.kind} must be at least 1, got {self.max_skips}")
        for name in ("first", "last"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ThresholdError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if bool(self.ratios) != (self.kind == "mag"):
            raise ThresholdError(f"{self.kind} has {'calibrated' if self.kind == 'mag' else 'no'} ratios")

    def may_skip(self, step: int | None, num_steps: int) -> bool:
        """Whether blocks may be skipped in step `step` of `num_steps`; True for a step outside of the schedule."""
        if step is None:
            return True
        first, last = (DenseSchedule(share).num_dense_steps(num_steps) for share in (self.first, self.last))
        return first <= step < num_steps - last

    def __str__(self) -> str:
        """In a few words, e.g. `first_block 0.2, first 0.1`."""
        figures = {"max_skips": self.max_skips, "first": self.first or None, "last": self.last or None}
        more = [f"{name} {value:g}" for name, value in figures.items() if value is not None]
        return ", ".join([self.kind if self.threshold is None else f"{self.kind} {self.threshold:.3g}", *more])


class InstalledCache(Protocol):
    """A step cache on all transformers of a pipeline."""

    def before_call(self, transformer: int, step: int | None, num_steps: int, arguments: Mapping[str, Any]) -> None:
        """Prepare for a call of the transformer of this index with these arguments."""

    def reset(self) -> None:
        """Forget what earlier steps computed; a rendering that failed may have left it."""

    def remove(self) -> None:
        """Restore the modules; does nothing the second time."""


class StepCaching(Protocol):
    """What a pipeline's transformers can do about step caches."""

    def enabled(self) -> str | None:
        """Return the name of the cache that the user enabled, if any."""

    def install(self, cache: StepCache) -> InstalledCache:
        """Enable a cache; ModelError, with nothing installed, where these transformers or a cache on them refuse."""
