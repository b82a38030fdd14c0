"""The public functions, which take checkpoints by path, `models:/` or `runs:/` URI, or run id."""

import logging
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsetune.checkpoint import Checkpoint
from sparsetune.checkpoint import load_checkpoint as load_from_path
from sparsetune.errors import CheckpointError
from sparsetune.tracking.lookup import resolve_checkpoint

if TYPE_CHECKING:
    from sparsetune.attention.breakeven import BreakEvenTable
    from sparsetune.attention.handle import SparseHandle
    from sparsetune.attention.ordering import TokenLayout
    from sparsetune.attention.policy import Policy
    from sparsetune.config import Config
    from sparsetune.models.pipelines import VideoPipeline
    from sparsetune.tuning.dial import Dial, Prediction

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class TunedCheckpoint(Checkpoint):
    """A checkpoint whose sparsity can be changed without tuning again, if a search with calibration made it.

    `prediction` is of its policy where that wasn't rendered; None for a policy as it was saved.
    """

    prediction: "Prediction | None" = None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "TunedCheckpoint":
        """Return the same checkpoint with these methods."""
        return cls(checkpoint.policy, checkpoint.manifest, checkpoint.dial)

    def with_sparsity(self, sparsity: float) -> "TunedCheckpoint":
        """Return the best policy of a sparsity, a fraction of all block pairs; warns that it wasn't rendered.

        Raises:
            CheckpointError: it isn't in (0, 1) or the calibration doesn't reach it, or there is no calibration.
        """
        if not 0.0 < sparsity < 1.0:
            raise CheckpointError(f"sparsity must be between 0 and 1, got {sparsity:g}")
        dial = self._dial()
        if sparsity > (highest := dial.predict(dial.policy()).sparsity):
            raise CheckpointError(f"sparsity {sparsity:g} is out of reach: the calibration allows up to {highest:.3f}")
        return self._with_policy(dial, dial.policy(sparsity=sparsity))

    def with_budget(self, budget: float) -> "TunedCheckpoint":
        """Return the best policy within an error budget, as parameter `l1` of trials; warns that it wasn't rendered.

        Raises:
            CheckpointError: it isn't positive, or the checkpoint has no calibration.
        """
        if not 0.0 < budget < math.inf:
            raise CheckpointError(f"an error budget must be a positive number, got {budget:g}")
        dial = self._dial()
        return self._with_policy(dial, dial.policy(budget=budget))

    def _dial(self) -> "Dial":
        if self.dial is None:
            raise CheckpointError(
                "the checkpoint has no calibration, so its sparsity can't be changed; tune with `--tuner optuna`"
            )
        from sparsetune.tuning.dial import Dial

        return Dial.from_bytes(self.dial)

    def _with_policy(self, dial: "Dial", policy: "Policy") -> "TunedCheckpoint":
        prediction = dial.predict(policy)
        if self.policy.cache is not None:
            prediction = replace(prediction, psnr=None, psnr_error=None, seconds=None)
        _LOG.warning(
            "this policy was not rendered; predicted for the tune prompts and settings: %s; `sparsetune eval` it",
            prediction,
        )
        settings = self.manifest.tuner_settings | {"predicted": asdict(prediction)}
        manifest = self.manifest.model_copy(update={"tuner_settings": settings, "metrics": {}})
        return TunedCheckpoint(replace(policy, cache=self.policy.cache), manifest, self.dial, prediction)


def load_checkpoint(path: Path | str, config: "Config | None" = None) -> TunedCheckpoint:
    """Load a checkpoint from a folder or file, from MLflow or from the Hugging Face Hub.

    The calibration of a search travels in it, so that `load_checkpoint(path).with_sparsity(.4)` needs no tuning.

    Args:
        path: a checkpoint folder, a .safetensors file or SpargeAttn's .pt; `models:/NAME@ALIAS`,
            `models:/NAME/VERSION`, `runs:/ID`, a run id; or `hf://OWNER/NAME`, also with `@REVISION`.
        config: names the tracking store; None is that of environment and defaults.

    Raises:
        CheckpointError: there is no such path, it is no checkpoint, or its values are invalid.
        UsageError, TrackingError: as `resolve_checkpoint` raises them.
    """
    return TunedCheckpoint.of(load_from_path(resolve_checkpoint(path, config)))


def sparsify(
    pipe: Any,
    policy: "Policy | Checkpoint | str | Path",
    backend: str = "auto",
    break_even: "BreakEvenTable | str | Path | None" = None,
    layout: "TokenLayout | None" = None,
    *,
    sparsity: float | None = None,
    scheduler: Any = None,
) -> "SparseHandle":
    """Install a policy on a pipeline; use it as a context manager, or call `remove()` on what it returns.

        with sparsify(pipe, "models:/cogvideox-2b-sparse@champion"):
            video = pipe("a panda eats bamboo").frames[0]

    A checkpoint that was tuned for another resolution, number of frames or steps warns when the pipeline first runs.

    Args:
        pipe: a diffusers pipeline, modular or not, loaded and placed as you like; or its transformer alone.
        policy: the policy, a checkpoint, or anything that `load_checkpoint` takes.
        backend: `auto`, `sparge`, `flex`, `reference` or `dense`.
        break_even: table that `sparsetune bench` measured on this machine, or its file: layers that would be slower
            sparse run dense. None runs every layer as the policy says.
        layout: where the video's and the text's tokens lie in each self-attention call, for a model whose family isn't
            known; its tokens then count as one row where this is None, and a warning is logged.
        sparsity: another sparsity than the checkpoint's, in (0, 1), as `TunedCheckpoint.with_sparsity`.
        scheduler: the one that sets the timesteps of a transformer alone; needed by a policy that treats steps
            differently.

    Returns:
        The handle, with statistics of what ran (`handle.stats()`); `handle.remove()` restores the pipeline exactly.

    Raises:
        ModelError: the model is known not to work, or the pipeline is sparse already.
        CheckpointError: the checkpoint can't be read, or is another model's; the message lists the differences.
        BackendError: the backend can't run here, or the table is missing or another machine's.
        UsageError, TrackingError: as `resolve_checkpoint` raises them.
    """
    from sparsetune.models.sparsify import sparsify as install

    if isinstance(policy, str | Path):
        policy = load_checkpoint(policy)
    if sparsity is not None:
        if not isinstance(policy, Checkpoint):
            raise CheckpointError("a policy has one sparsity; load a checkpoint to choose another")
        policy = TunedCheckpoint.of(policy).with_sparsity(sparsity)
    return install(pipe, policy, backend, break_even, layout, scheduler)


def create_pipelines(
    config: "Config | str | None" = None, checkpoint: "Policy | Checkpoint | str | Path | None" = None
) -> "tuple[VideoPipeline, VideoPipeline]":
    """Load a model once and return two callables, `pipe_dense(prompt)` and `pipe_sparse(prompt)`.

    As `sparsetune.models.pipelines.create_pipelines`, but `checkpoint` may be anything that `load_checkpoint` takes.
    """
    from sparsetune.config import Config
    from sparsetune.models.pipelines import create_pipelines as create

    if isinstance(checkpoint, str | Path):
        checkpoint = load_checkpoint(checkpoint, config if isinstance(config, Config) else None)
    return create(config, checkpoint)
