"""A worker's model, with the policy that is at work on it."""

from pathlib import Path

from sparsetune.attention.policy import Policy
from sparsetune.attention.sparsify import SparseHandle
from sparsetune.models.generation import Renderer
from sparsetune.models.sparse import sparsify


class Workplace:
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

    def sparse(self, policy: Policy, backend: str, break_even: Path | None = None) -> SparseHandle:
        """Put a policy to work; what was learned under the one before, of the same kind or not, is forgotten.

        Raises:
            ModelError, CheckpointError, BackendError: it can't be installed, see `models.sparse.sparsify`.
        """
        if self._handle is None or self._installed != (backend, break_even):
            self.plain()
            self._handle = sparsify(self.renderer.loaded.pipe, policy, backend, break_even)
            self._installed = (backend, break_even)
        else:
            self._handle.policy = policy
        return self._handle

    def plain(self) -> Renderer:
        """Take off whatever is installed, and give the renderer."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._installed = None
        return self.renderer
