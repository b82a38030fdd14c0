"""The first task that an engine is given: what its workers have, and the policy to begin with."""

from dataclasses import dataclass
from pathlib import Path

from sparsetune.attention.policy import Policy
from sparsetune.checkpoint import Checkpoint
from sparsetune.engine.events import Emit
from sparsetune.engine.workplace import Workplace
from sparsetune.models.rig import Rig, describe
from sparsetune.models.sparse import default_policy, policy_for


@dataclass(frozen=True)
class Described:
    """What a worker has.

    Args:
        rig: its model, device and kernel.
        policy: the checkpoint's, with the layers named as this model's; without one SpargeAttn's default thresholds.
    """

    rig: Rig
    policy: Policy


@dataclass(frozen=True)
class Describe:
    """Describes a worker, and finds out whether a checkpoint, kernel and break-even table suit it.

    Args:
        backend: as the configuration names it.
        checkpoint: whose policy to give.
        break_even: table that layers are to be judged by.
    """

    backend: str
    checkpoint: Checkpoint | None = None
    break_even: Path | None = None

    def run(self, place: Workplace, emit: Emit) -> Described:
        """Describe the worker.

        Raises:
            ModelError: the pipeline is sparse already, or can't be.
            BackendError: the kernel can't run there, or the table is missing or another machine's.
            CheckpointError: the checkpoint is another model's.
        """
        renderer = place.plain()
        pipe = renderer.loaded.pipe
        rig = describe(renderer, self.backend)
        policy = default_policy(pipe) if self.checkpoint is None else policy_for(pipe, self.checkpoint)
        place.sparse(policy, self.backend, self.break_even)
        place.plain()
        return Described(rig, policy)
