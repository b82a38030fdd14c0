"""Saving, loading and converting checkpoints."""

import hashlib
from datetime import UTC, datetime
from pathlib import Path

from sparsetune.attention.policy import Policy
from sparsetune.checkpoint.difference import difference
from sparsetune.checkpoint.manifest import Checkpoint, Manifest, read_manifest
from sparsetune.checkpoint.policy_file import METADATA_KEY, read_policy, write_policy
from sparsetune.checkpoint.sparge_pt import check_expressible, read_sparge_pt, write_sparge_pt
from sparsetune.errors import CheckpointError
from sparsetune.files import atomic_folder, atomic_path, expand, is_replaceable, similar_path, write_text

POLICY_FILE = "policy.safetensors"
MANIFEST_FILE = "manifest.json"
DIAL_FILE = "dial.npz"

_MARKS = {".safetensors": METADATA_KEY, ".json": '"tuner"', ".pt": "inner_attention"}
"""What the head of a file of a checkpoint has, by suffix; a file without it is somebody's own."""


def save_checkpoint(checkpoint: Checkpoint, folder: Path | str) -> Path:
    """Save a checkpoint as FOLDER/policy.safetensors, manifest.json and, if it has one, dial.npz; return the folder.

    An existing checkpoint there is replaced atomically, after the new one was read back and compared. Thresholds are
    rounded to float32, as kernels take them.

    Raises:
        CheckpointError: see `check_folder`.
        SparsetuneError: the folder can't be written.
    """
    folder = expand(folder)
    check_folder(folder)
    with atomic_folder(folder) as temporary:
        write_policy(checkpoint.policy, temporary / POLICY_FILE)
        manifest = checkpoint.manifest.model_copy(update={"policy_sha256": _sha256(temporary / POLICY_FILE)})
        write_text(temporary / MANIFEST_FILE, manifest.model_dump_json(indent=2) + "\n")
        if checkpoint.dial is not None:
            (temporary / DIAL_FILE).write_bytes(checkpoint.dial)
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
            f"there is no checkpoint {path}{similar_path(path) or '; check the path, or run `sparsetune tune`'}",
            is_usage=True,
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
    if not is_replaceable(target, _MARKS[target.suffix]):
        raise CheckpointError(f"{target} exists and is no checkpoint, so it is not replaced; choose another path")
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
    import torch

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
    manifest = read_manifest(folder / MANIFEST_FILE)
    policy = read_policy(folder / POLICY_FILE)
    if manifest.policy_sha256 not in (None, _sha256(folder / POLICY_FILE)):
        raise CheckpointError(
            f"{folder / POLICY_FILE} is not the file that was saved: its SHA-256 is not the manifest's; restore it, or "
            "remove policy_sha256 from the manifest if you changed it on purpose"
        )
    dial = folder / DIAL_FILE
    content = dial.read_bytes() if dial.is_file() else None
    return Checkpoint(policy, manifest.model_copy(update={"policy_sha256": None}), content)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_folder(folder: Path) -> None:
    """Raise CheckpointError where a checkpoint can't be saved: FOLDER is a file, or holds anything but a checkpoint."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"cannot save a checkpoint folder at {folder}: it is a file; choose another path")
    names = {entry.name for entry in folder.iterdir()}
    others = names - {POLICY_FILE, MANIFEST_FILE, DIAL_FILE}
    marked = names & {POLICY_FILE, MANIFEST_FILE}
    if not others and not any(is_replaceable(folder / name, _MARKS[Path(name).suffix]) for name in marked):
        others = names
    if others:
        raise CheckpointError(
            f"{folder} holds other files than a checkpoint's: {', '.join(sorted(others)[:3])}"
            f"{' and more' if len(others) > 3 else ''}; choose another folder"
        )


def _manifest_of_file(path: Path, tuner: str) -> Manifest:
    return Manifest(tuner=tuner, created=datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat())
