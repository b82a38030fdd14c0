"""Making a pipeline sparse."""

from pathlib import Path
from typing import Any

from sparsetune.attention.backends import choose_backend
from sparsetune.attention.policy import Policy
from sparsetune.attention.sparsify import SparseHandle
from sparsetune.checkpoint import Checkpoint, check_fits, load_checkpoint
from sparsetune.models.families import attention_sites


def sparsify(pipe: Any, policy: Policy | Checkpoint | str | Path, backend: str = "auto") -> SparseHandle:
    """Install a policy on a pipeline; use it as a context manager, or call `remove()` on what it returns.

    Args:
        pipe: a diffusers pipeline of a supported family, loaded and placed as you like.
        policy: the policy, a checkpoint, or a checkpoint's folder or file.
        backend: `auto`, `sparge`, `reference` or `dense`.

    Returns:
        The handle, which counts what runs (`handle.stats()`) and restores the pipeline exactly (`handle.remove()`).

    Raises:
        ModelError: the family is unknown or the pipeline is sparse already.
        CheckpointError: the checkpoint can't be read, or is another model's; the message lists the differences.
        BackendError: the backend can't run here.
    """
    if isinstance(policy, str | Path):
        policy = load_checkpoint(policy)
    if isinstance(policy, Checkpoint):
        policy = policy.policy
    sites = attention_sites(pipe)
    check_fits(policy, [(layer.name, layer.num_heads) for layer in sites.layers])
    return SparseHandle(sites, policy, choose_backend(backend, _device(pipe)))


def default_policy(pipe: Any) -> Policy:
    """SpargeAttn's default thresholds for every head of a pipeline: the 'before' of any tuning.

    simthreshd1 0.6, cdfthreshd 0.98, no dense steps; the text's key blocks are kept, as SpargeAttn's
    `attention_sink` does when it renders.
    """
    return Policy.uniform([(layer.name, layer.num_heads) for layer in attention_sites(pipe).layers])


def _device(pipe: Any) -> Any:
    # With offloading the weights lie on the CPU until they are needed; _execution_device is where they will run.
    return pipe._execution_device
