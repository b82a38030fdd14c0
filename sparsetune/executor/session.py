"""A worker's model, with the policy that is at work on it."""

from dataclasses import dataclass
from pathlib import Path

from sparsetune.attention.handle import SparseHandle
from sparsetune.attention.policy import Policy
from sparsetune.checkpoint import Checkpoint
from sparsetune.executor.events import Emit
from sparsetune.models.generation import Renderer
from sparsetune.models.runtime import RuntimeDescription, describe
from sparsetune.models.sparsify import default_policy, policy_for, sparsify


class ModelSession:
    """What tasks run with, one after the other, in one process.

    A policy stays installed from one task to the next, so that what a kernel refuses is said once and not at every
    prompt; a task that needs the pipeline as it was made takes it off.

    Args:
        renderer: of the loaded model; nothing may be installed on its pipeline.
        shares_files: whether files that a task writes are where the engine's caller looks for them.
    """

    def __init__(self, renderer: Renderer, *, shares_files: bool = True) -> None:
        self.renderer = renderer
        self.shares_files = shares_files
        self._handle: SparseHandle | None = None
        self._installed: tuple[str, Path | None] | None = None

    def install(self, policy: Policy, backend: str, break_even: Path | None = None) -> SparseHandle:
        """Put a policy to work; what was learned under the one before, of the same kind or not, is forgotten.

        Raises:
            ModelError, CheckpointError, BackendError: it can't be installed, see `models.sparse.sparsify`.
        """
        if self._handle is None or self._installed != (backend, break_even):
            self.restore()
            self._handle = sparsify(self.renderer.loaded.pipe, policy, backend, break_even)
            self._installed = (backend, break_even)
        else:
            self._handle.policy = policy
        return self._handle

    def restore(self) -> Renderer:
        """Take off whatever is installed, and give the renderer."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._installed = None
        return self.renderer


@dataclass(frozen=True)
class SessionInfo:
    """What a worker has.

    Args:
        rig: its model, device and kernel.
        policy: the checkpoint's, with the layers named as this model's; without one SpargeAttn's default thresholds.
    """

    rig: RuntimeDescription
    policy: Policy


@dataclass(frozen=True)
class DescribeSession:
    """Describes a worker, and finds out whether a checkpoint, kernel and break-even table suit it.

    Args:
        backend: as the configuration names it.
        checkpoint: whose policy to give.
        break_even: table that layers are to be judged by.
    """

    backend: str
    checkpoint: Checkpoint | None = None
    break_even: Path | None = None

    def run(self, session: ModelSession, emit: Emit) -> SessionInfo:
        """DescribeSession the worker.

        Raises:
            ModelError: the pipeline is sparse already, or can't be.
            BackendError: the kernel can't run there, or the table is missing or another machine's.
            CheckpointError: the checkpoint is another model's.
        """
        renderer = session.restore()
        pipe = renderer.loaded.pipe
        rig = describe(renderer, self.backend)
        policy = default_policy(pipe) if self.checkpoint is None else policy_for(pipe, self.checkpoint)
        session.install(policy, self.backend, self.break_even)
        session.restore()
        return SessionInfo(rig, policy)
