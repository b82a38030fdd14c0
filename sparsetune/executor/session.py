"""The model of a worker, with the policy that is installed on it."""

from concurrent.futures import ThreadPoolExecutor
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
    """A loaded model that tasks use one after the other.

    A policy stays installed from one task to the next, so that a kernel's fallback is logged once, not at every prompt.
    """

    def __init__(self, renderer: Renderer, *, shares_files: bool = True) -> None:
        self.renderer = renderer
        self.shares_files = shares_files  # whether the submitter of tasks sees files that they write
        self.background = ThreadPoolExecutor(1, "background")  # for work beside the next rendering
        self._handle: SparseHandle | None = None
        self._installed: tuple[str, Path | None] | None = None

    def install(self, policy: Policy, backend: str, break_even: Path | None = None) -> SparseHandle:
        """Install a policy, in place of the last one; statistics and state start anew. Raises as `sparsify`."""
        if self._handle is None or self._installed != (backend, break_even):
            self.restore()
            self._handle = sparsify(self.renderer.loaded.pipe, policy, backend, break_even)
            self._installed = (backend, break_even)
        else:
            self._handle.policy = policy
        return self._handle

    def restore(self) -> Renderer:
        """Remove the installed policy and return the renderer."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._installed = None
        return self.renderer


@dataclass(frozen=True)
class SessionInfo:
    runtime: RuntimeDescription
    policy: Policy  # with the layer names of its model


@dataclass(frozen=True)
class DescribeSession:
    """Task that describes a worker and checks that backend, checkpoint and break-even table can be used there.

    Without a checkpoint the policy is SpargeAttn's default.
    """

    backend: str
    checkpoint: Checkpoint | None = None
    break_even: Path | None = None

    def run(self, session: ModelSession, emit: Emit) -> SessionInfo:
        renderer = session.restore()
        pipe = renderer.loaded.pipe
        runtime = describe(renderer, self.backend)
        policy = default_policy(pipe) if self.checkpoint is None else policy_for(pipe, self.checkpoint)
        session.install(policy, self.backend, self.break_even)
        session.restore()
        return SessionInfo(runtime, policy)
