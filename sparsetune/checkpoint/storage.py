"""Saving, loading and converting checkpoints."""

from datetime import UTC, datetime
from pathlib import Path

import torch

from sparsetune.attention.policy import Policy
from sparsetune.checkpoint.difference import difference
from sparsetune.checkpoint.manifest import Checkpoint, Manifest, read_manifest
from sparsetune.checkpoint.policy_file import read_policy, write_policy
from sparsetune.checkpoint.sparge_pt import check_expressible, read_sparge_pt, write_sparge_pt
from sparsetune.errors import CheckpointError
from sparsetune.files import atomic_folder, atomic_path, expand, write_text

POLICY_FILE = "policy.safetensors"
MANIFEST_FILE = "manifest.json"


def save_checkpoint(checkpoint: Checkpoint, folder: Path | str) -> Path:
    """Save a checkpoint as FOLDER/policy.safetensors and FOLDER/manifest.json; return the folder.

    An existing checkpoint there is replaced atomically, after the new one was read back and compared. Thresholds are
    rounded to float32, as kernels take them.

    Raises:
        CheckpointError: FOLDER is a file, or holds anything but a checkpoint.
        SparsetuneError: the folder can't be written.
    """
    folder = expand(folder)
    _check_replaceable(folder)
    with atomic_folder(folder) as temporary:
        write_policy(checkpoint.policy, temporary / POLICY_FILE)
        write_text(temporary / MANIFEST_FILE, checkpoint.manifest.model_dump_json(indent=2) + "\n")
        _check_same(checkpoint.policy, _load_folder(temporary).policy, folder)
    return folder


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Load a checkpoint from its folder, a lone .safetensors file, or SpargeAttn's `.pt`.

    A policy.safetensors with its manifest.json beside it is the same as their folder. A checkpoint without one gets a
    manifest with tuner `unknown` (`builtin` for a `.pt`) and the file's time.

    Raises:
        CheckpointError: there is no such path, it is no checkpoint, or its values are invalid.
    """
    path = expand(path)
    if path.is_dir():
        return _load_folder(path)
    if not path.is_file():
        raise CheckpointError(
            f"there is no checkpoint {path}; check the path, or make a checkpoint with `sparsetune tune`"
        )
    if path.suffix == ".safetensors":
        if path.name == POLICY_FILE and (path.parent / MANIFEST_FILE).is_file():
            return _load_folder(path.parent)
        return Checkpoint(read_policy(path), _manifest_of_file(path, "unknown"))
    if path.suffix == ".pt":
        return Checkpoint(read_sparge_pt(path), _manifest_of_file(path, "builtin"))
    raise CheckpointError(f"{path} is no checkpoint: use a checkpoint folder, a .safetensors file or SpargeAttn's .pt")


def convert(source: Path | str, target: Path | str, *, allow_loss: bool = False) -> Path:
    """Convert a checkpoint to the form of the target's suffix.

    `.pt` is SpargeAttn's, `.safetensors` a lone policy file, anything else a checkpoint folder. Only a folder keeps
    the manifest; a policy.safetensors with a manifest.json beside it stands for its folder, whose manifest is replaced
    too. The output is read back and compared before it replaces the target, which is returned. `source` is as for
    `load_checkpoint`, `allow_loss` as for `write_sparge_pt`.

    Raises:
        CheckpointError: the source is no checkpoint, or the target's form can't hold it.
    """
    checkpoint, target = load_checkpoint(source), expand(target)
    if target.suffix not in (".pt", ".safetensors"):
        return save_checkpoint(checkpoint, target)
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder, but its suffix names a file; choose another path")
    if target.name == POLICY_FILE and (target.parent / MANIFEST_FILE).is_file():
        save_checkpoint(checkpoint, target.parent)
        return target
    if target.suffix == ".pt":
        check_expressible(checkpoint.policy, target, allow_loss=allow_loss)
    with atomic_path(target) as temporary:
        if target.suffix == ".pt":
            write_sparge_pt(checkpoint.policy, temporary, allow_loss=allow_loss)
            _check_same(checkpoint.policy, read_sparge_pt(temporary), target, rules=False)
        else:
            write_policy(checkpoint.policy, temporary)
            _check_same(checkpoint.policy, read_policy(temporary), target)
    return target


def _check_same(policy: Policy, written: Policy, target: Path, *, rules: bool = True) -> None:
    """Compare rules, and thresholds as a kernel gets them: in float32, those of dense heads ignored."""
    orders = [layer.order for layer in policy.layers] == [layer.order for layer in written.layers]
    if rules and (difference(policy, written).rules or not orders):
        raise CheckpointError(f"{target} was read back with other rules than were written; save it again")
    device = torch.device("cpu")
    held, found = ({layer.name: layer.tensors(device) for layer in one.layers} for one in (policy, written))
    same = list(held) == list(found) and all(
        torch.equal(getattr(held[name], column), getattr(found[name], column))
        for name in held
        for column in ("simthreshd1", "select", "pvthreshd")
    )
    if not same:
        raise CheckpointError(f"{target} was read back with other thresholds than were written; choose another form")


def _load_folder(folder: Path) -> Checkpoint:
    missing = [name for name in (POLICY_FILE, MANIFEST_FILE) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} is no checkpoint folder: it lacks {' and '.join(missing)}; use another folder, or make a "
            "checkpoint with `sparsetune tune`"
        )
    return Checkpoint(read_policy(folder / POLICY_FILE), read_manifest(folder / MANIFEST_FILE))


def _check_replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"cannot save a checkpoint folder at {folder}: it is a file; choose another path")
    others = sorted(entry.name for entry in folder.iterdir() if entry.name not in (POLICY_FILE, MANIFEST_FILE))
    if others:
        raise CheckpointError(
            f"{folder} holds other files than a checkpoint's: {', '.join(others[:3])}"
            f"{' and more' if len(others) > 3 else ''}; choose another folder"
        )


def _manifest_of_file(path: Path, tuner: str) -> Manifest:
    return Manifest(tuner=tuner, created=datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat())
