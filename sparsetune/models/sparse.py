"""Making a pipeline sparse."""

from pathlib import Path
from typing import Any

from sparsetune.attention.backends import choose_backend
from sparsetune.attention.fit import check_fits
from sparsetune.attention.policy import Policy
from sparsetune.attention.sites import AttentionSites
from sparsetune.attention.sparsify import SparseHandle
from sparsetune.checkpoint import Checkpoint, Manifest, load_checkpoint
from sparsetune.errors import CheckpointError
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
    return SparseHandle(attention_sites(pipe), policy_for(pipe, policy), choose_backend(backend, _device(pipe)))


def policy_for(pipe: Any, policy: Policy | Checkpoint | str | Path) -> Policy:
    """Give the policy of a checkpoint, or of a checkpoint's folder or file, that was tuned for a pipeline's model.

    Raises:
        CheckpointError: the checkpoint can't be read, or is another model's; the message lists the differences.
    """
    if isinstance(policy, str | Path):
        policy = load_checkpoint(policy)
    sites = attention_sites(pipe)
    if isinstance(policy, Checkpoint):
        _check_manifest(pipe, sites, policy.manifest)
        policy = policy.policy
    check_fits(policy, [(layer.name, layer.num_heads) for layer in sites.layers])
    return policy


def _check_manifest(pipe: Any, sites: AttentionSites, manifest: Manifest) -> None:
    differing = []
    found = type(pipe.transformer).__name__
    if manifest.transformer_class not in (None, found):
        differing.append(f"transformer {manifest.transformer_class}, the model has {found}")
    tuned = {layer.name: layer.head_dim for layer in manifest.layers}
    other = [layer for layer in sites.layers if tuned.get(layer.name) not in (None, layer.head_dim)]
    if other:
        differing.append(f"head_dim {tuned[other[0].name]} in {other[0].name}, the model has {other[0].head_dim}")
    if differing:
        raise CheckpointError(
            f"a checkpoint must have been tuned for this model, but it is for {'; '.join(differing)}; give another one"
        )


def default_policy(pipe: Any) -> Policy:
    """SpargeAttn's default thresholds for every head of a pipeline: the 'before' of any tuning.

    simthreshd1 0.6, cdfthreshd 0.98, no dense steps, raster order; the first key block is kept, as SpargeAttn does
    when it renders (`attention_sink`).
    """
    return Policy.uniform([(layer.name, layer.num_heads) for layer in attention_sites(pipe).layers])


def _device(pipe: Any) -> Any:
    # With offloading the weights lie on the CPU until they are needed; _execution_device is where they will run.
    return pipe._execution_device
