import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sparsetune import files as folders
from sparsetune.attention.policy import Policy
from sparsetune.attention.schedule import DenseSchedule
from sparsetune.attention.thresholds import HeadThresholds, LayerThresholds
from sparsetune.checkpoint import (
    Checkpoint,
    LayerShape,
    Manifest,
    convert,
    difference,
    load_checkpoint,
    save_checkpoint,
)
from sparsetune.checkpoint.policy_file import METADATA_KEY, read_policy, write_policy
from sparsetune.errors import CheckpointError, SparsetuneError

NAME = "transformer.transformer_blocks.{}.attn1"


def make_policy(num_layers: int = 3, num_heads: int = 3, seed: int = 0) -> Policy:
    """Layers alternating between cdf and topk, with thresholds that float32 can't represent and some dense heads."""
    random = torch.Generator().manual_seed(seed)

    def head(topk: bool) -> HeadThresholds:
        similarity, chosen, pv, dense = torch.rand(4, generator=random, dtype=torch.float64).tolist()
        select = {"topk" if topk else "cdfthreshd": chosen}
        return HeadThresholds(simthreshd1=2 * similarity - 1, pvthreshd=50 * pv, is_sparse=dense > 0.3, **select)

    layers = tuple(
        LayerThresholds(NAME.format(index), tuple(head(bool(index % 2)) for _ in range(num_heads)))
        for index in range(num_layers)
    )
    return Policy(layers, DenseSchedule(0.1 + 0.2), order="hilbert", keep_text=False)


def make_checkpoint(seed: int = 0) -> Checkpoint:
    manifest = Manifest(
        tuner="optuna",
        base_model="demo",
        layers=(LayerShape(name=NAME.format(0), num_heads=3, head_dim=64),),
        tuner_settings={"n_trials": 8, "rule": ["cdf", "topk"]},
        seeds=(42, 43),
        metrics={"psnr": 37.5, "sparsity": 0.25},
    )
    return Checkpoint(make_policy(seed=seed), manifest)


def test_kernels_get_the_same_thresholds_after_a_round_trip(tmp_path: Path) -> None:
    checkpoint = make_checkpoint()
    loaded = load_checkpoint(save_checkpoint(checkpoint, tmp_path / "tuned"))
    for before, after in zip(checkpoint.policy.layers, loaded.policy.layers, strict=True):
        want, got = before.tensors(torch.device("cpu")), after.tensors(torch.device("cpu"))
        assert (before.name, want.rule) == (after.name, got.rule)
        for column in ("simthreshd1", "select", "pvthreshd"):
            assert torch.equal(getattr(want, column), getattr(got, column))
    assert [h.is_sparse for la in loaded.policy.layers for h in la.heads] == [
        h.is_sparse for la in checkpoint.policy.layers for h in la.heads
    ]
    assert (loaded.policy.schedule, loaded.policy.order, loaded.policy.keep_text) == (
        checkpoint.policy.schedule,
        "hilbert",
        False,
    )
    assert loaded.manifest == checkpoint.manifest


@pytest.mark.parametrize("form", ["tuned", "tuned.safetensors"])
def test_steps_orders_and_partial_blocks_come_back(tmp_path: Path, form: str) -> None:
    first, second, *others = make_policy().layers
    by_head = ("whf", *("raster",) * (len(second.heads) - 1))
    policy = Policy(
        (replace(first, order="cubes"), replace(second, order=by_head), *others),
        DenseSchedule(0.25, (0.5, 1.0, 1.75)),
        order="tiles",
        keep_text=True,
        select_partial=True,
    )
    source = save_checkpoint(Checkpoint(policy, Manifest(tuner="manual")), tmp_path / "source")
    loaded = load_checkpoint(convert(source, tmp_path / form)).policy
    assert loaded.schedule == policy.schedule
    assert loaded.orders == ("cubes", by_head, "tiles")
    assert [layer.order for layer in loaded.layers] == ["cubes", by_head, None]
    assert (loaded.order, loaded.keep_text, loaded.select_partial) == ("tiles", True, True)
    assert difference(policy, loaded).rules == {}


def test_a_policy_from_before_these_fields_still_loads(tmp_path: Path) -> None:
    policy = Policy.uniform([(NAME.format(0), 2)])
    write_policy(policy, tmp_path / "now.safetensors")
    with safe_open(tmp_path / "now.safetensors", framework="pt") as opened:
        described = json.loads(opened.metadata()[METADATA_KEY])
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a mapping)
    for added in ("drop_scale", "select_partial"):
        del described[added]
    del described["layers"][0]["order"]
    save_file(tensors, tmp_path / "before.safetensors", metadata={METADATA_KEY: json.dumps(described)})
    assert read_policy(tmp_path / "before.safetensors") == policy


def test_a_second_round_trip_changes_nothing(tmp_path: Path) -> None:
    once = load_checkpoint(save_checkpoint(make_checkpoint(), tmp_path / "one"))
    assert load_checkpoint(save_checkpoint(once, tmp_path / "two")) == once


def test_decimal_thresholds_come_back_as_they_were_written(tmp_path: Path) -> None:
    policy = Policy.uniform([(NAME.format(0), 2)])
    write_policy(policy, tmp_path / "a.safetensors")
    assert read_policy(tmp_path / "a.safetensors") == policy


def test_a_lone_safetensors_rebuilds_the_policy(tmp_path: Path) -> None:
    saved = save_checkpoint(make_checkpoint(), tmp_path / "tuned")
    lone = tmp_path / "lone.safetensors"
    (saved / "policy.safetensors").rename(lone)
    loaded = load_checkpoint(lone)
    assert loaded.policy.schedule.dense_fraction == 0.1 + 0.2
    assert loaded.manifest.tuner == "unknown"
    assert loaded.manifest.created.endswith("+00:00")


def test_the_policy_file_of_a_folder_loads_with_its_manifest(tmp_path: Path) -> None:
    saved = save_checkpoint(make_checkpoint(), tmp_path / "tuned")
    assert load_checkpoint(str(saved / "policy.safetensors")).manifest.tuner == "optuna"


def test_saving_replaces_the_whole_checkpoint_and_leaves_nothing_else(tmp_path: Path) -> None:
    save_checkpoint(make_checkpoint(seed=0), tmp_path / "tuned")
    save_checkpoint(make_checkpoint(seed=1), tmp_path / "tuned")
    expected = save_checkpoint(make_checkpoint(seed=1), tmp_path / "other")
    assert load_checkpoint(tmp_path / "tuned").policy == load_checkpoint(expected).policy
    assert sorted(os.listdir(tmp_path)) == ["other", "tuned"]


@pytest.mark.parametrize("name", ["policy.safetensors", "manifest.json"])
def test_a_users_own_file_of_the_same_name_is_not_replaced(tmp_path: Path, name: str) -> None:
    own = tmp_path / "robot" / name
    own.parent.mkdir()
    if name == "manifest.json":
        own.write_text('{"name": "my web app", "schema_version": 2}')
    else:
        save_file({"actor.weight": torch.zeros(4)}, own)
    before = own.read_bytes()
    with pytest.raises(CheckpointError, match=f"holds other files than a checkpoint's: {name}"):
        save_checkpoint(make_checkpoint(), own.parent)
    assert [path.read_bytes() for path in own.parent.iterdir()] == [before]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_are_not_replaced_by_a_converted_policy(tmp_path: Path, suffix: str) -> None:
    source = save_checkpoint(
        Checkpoint(Policy.uniform([(NAME.format(0), 2)], select_partial=False), Manifest(tuner="manual")),
        tmp_path / "tuned",
    )
    target = tmp_path / f"weights{suffix}"
    weights = {"blocks.0.weight": torch.zeros(4)}
    save_file(weights, target) if suffix == ".safetensors" else torch.save(weights, target)
    before = target.read_bytes()
    with pytest.raises(CheckpointError, match="exists and is no checkpoint, so it is not replaced"):
        convert(source, target, allow_loss=True)
    assert target.read_bytes() == before
    target.unlink()
    for _ in range(2):  # one of its own is replaced
        convert(source, target, allow_loss=True)


def test_a_flipped_bit_within_a_thresholds_range_is_found(tmp_path: Path) -> None:
    saved = save_checkpoint(make_checkpoint(), tmp_path / "tuned")
    content = bytearray((saved / "policy.safetensors").read_bytes())
    content[-2] ^= 1  # in the last threshold's mantissa
    (saved / "policy.safetensors").write_bytes(content)
    assert read_policy(saved / "policy.safetensors") != make_checkpoint().policy
    with pytest.raises(CheckpointError, match="is not the file that was saved"):
        load_checkpoint(saved)


def test_a_damaged_checkpoint_is_replaced(tmp_path: Path) -> None:
    saved = save_checkpoint(make_checkpoint(), tmp_path / "tuned")
    for name in ("policy.safetensors", "manifest.json"):
        (saved / name).write_bytes((saved / name).read_bytes()[:-100])
    assert load_checkpoint(save_checkpoint(make_checkpoint(seed=1), saved)).policy.order == "hilbert"


def test_a_reader_never_finds_the_folder_missing_while_it_is_replaced(tmp_path: Path) -> None:
    folder = save_checkpoint(make_checkpoint(), tmp_path / "tuned")
    if not folders.exchange(folder, folder):
        pytest.skip("this file system has no exchange of two paths")
    missing, done = [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            if not folder.exists():
                missing.append(1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for seed in range(20):
        save_checkpoint(make_checkpoint(seed), folder)
    done.set()
    watcher.join()
    assert not missing


def test_folders_are_replaced_where_the_system_cannot_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "exchange", lambda one, other: False)
    save_checkpoint(make_checkpoint(seed=0), tmp_path / "tuned")
    save_checkpoint(make_checkpoint(seed=1), tmp_path / "tuned")
    assert load_checkpoint(tmp_path / "tuned").policy.layers[0].heads[0] != make_policy(seed=0).layers[0].heads[0]
    assert os.listdir(tmp_path) == ["tuned"]


def test_an_interrupted_save_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_checkpoint(make_checkpoint(seed=0), tmp_path / "tuned")
    before = load_checkpoint(folder)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsetune.checkpoint.storage.write_text", interrupt)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        save_checkpoint(make_checkpoint(seed=1), folder)
    assert load_checkpoint(folder) == before
    assert os.listdir(tmp_path) == ["tuned"]


def test_a_folder_with_other_files_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "cat.mp4").touch()
    with pytest.raises(CheckpointError, match=r"holds other files than a checkpoint's: cat\.mp4"):
        save_checkpoint(make_checkpoint(), tmp_path / "videos")
    with pytest.raises(CheckpointError, match="is a file"):
        save_checkpoint(make_checkpoint(), tmp_path / "videos" / "cat.mp4")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SparsetuneError, match=r"cannot write .*file/tuned"):
        save_checkpoint(make_checkpoint(), tmp_path / "file" / "tuned")


@pytest.mark.parametrize("name", ["nothing", "nothing.pt", "nothing.safetensors"])
def test_a_missing_path_says_what_a_checkpoint_is(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"there is no .*{name}"):
        load_checkpoint(tmp_path / name)


def test_other_files_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"a\.json is no checkpoint: use"):
        load_checkpoint(tmp_path / "a.json")
    with pytest.raises(CheckpointError, match=r"lacks policy\.safetensors and manifest\.json"):
        load_checkpoint(tmp_path)


def test_damaged_and_foreign_safetensors_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="cannot read the policy"):
        load_checkpoint(tmp_path / "a.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="is it a model's weights"):
        load_checkpoint(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 3}, "from a newer sparsetune"),
        ({"schema_version": None}, "needs schema_version"),
        ({"order": "zigzag"}, "order must be one of"),
        ({"dense_fraction": 2}, "dense_fraction must be in"),
        ({"keep_text": "yes"}, "keep_text and select_partial must be true or false, got 'yes', False"),
        ({"select_partial": 1}, "keep_text and select_partial must be true or false, got True, 1"),
        ({"drop_scale": [-1]}, "drop_scale must be factors of at least 0"),
        ({"layers": [{"name": "a", "rule": "cdf", "order": "zigzag"}]}, "order must be one of"),
        ({"layers": [{"name": "a", "rule": "cdf", "order": ["raster", "zigzag"]}]}, "order must be one of"),
        ({"layers": [{"name": "a", "rule": "cdf", "order": ["raster"]}]}, "one for each of its 2 heads, got 1"),
        ({"layers": []}, "unexpected tensors"),
        ({"cache": "mag"}, "is no complete policy"),
        ({"drop_scale": [10**400]}, "is no complete policy: OverflowError"),
        ({"cache": {"kind": "mag", "threshold": 0.1, "max_skips": 1, "ratios": []}}, "mag has calibrated ratios"),
        ({"cache": {"kind": "pab", "ratios": []}}, "a cache must be one of first_block"),
        ({"layers": [{"name": "a", "rule": "magic"}]}, "a rule must be cdf or topk"),
        ({"layers": [{"name": "b", "rule": "cdf"}]}, "b lacks is_sparse"),
    ],
)
def test_metadata_that_does_not_hold_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    described = {
        "schema_version": 1,
        "layers": [{"name": "a", "rule": "cdf"}],
        "dense_fraction": 0,
        "order": "raster",
        "keep_text": True,
    }
    columns = {"is_sparse": torch.ones(2, dtype=torch.bool)}
    columns |= {name: torch.ones(2) for name in ("simthreshd1", "cdfthreshd", "pvthreshd")}
    path = tmp_path / "a.safetensors"
    save_file(
        {f"a.{name}": tensor for name, tensor in columns.items()},
        path,
        metadata={"sparsetune.policy": json.dumps(described | change)},
    )
    with pytest.raises(CheckpointError, match=message):
        read_policy(path)


def test_convert_goes_through_every_form(tmp_path: Path) -> None:
    policy = Policy.uniform([(NAME.format(index), 2) for index in range(11)])
    source = save_checkpoint(Checkpoint(policy, Manifest(tuner="manual")), tmp_path / "tuned")
    upstream = convert(source, tmp_path / "tuned.pt")
    lone = convert(upstream, tmp_path / "lone.safetensors")
    back = convert(lone, tmp_path / "back")
    assert load_checkpoint(back).policy == load_checkpoint(source).policy
    with pytest.raises(CheckpointError, match="its suffix names a file"):
        convert(source, back.rename(tmp_path / "back.pt"))


@pytest.mark.parametrize("form", ["written.safetensors", "written"])
def test_what_a_file_lost_of_a_policy_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    source = save_checkpoint(make_checkpoint(), tmp_path / "source")

    def forgetful(path: Path) -> Policy:
        return replace(read_policy(path), schedule=DenseSchedule())

    held = load_checkpoint(source)
    monkeypatch.setattr("sparsetune.checkpoint.storage.load_checkpoint", lambda path: held)
    monkeypatch.setattr("sparsetune.checkpoint.storage.read_policy", forgetful)
    with pytest.raises(CheckpointError, match="was read back with other rules"):
        convert(source, tmp_path / form)
    assert sorted(os.listdir(tmp_path)) == ["source"]


def test_converting_onto_a_checkpoints_policy_file_replaces_its_manifest_too(tmp_path: Path) -> None:
    old = Checkpoint(Policy.uniform([("transformer.a", 2)]), Manifest(tuner="optuna", base_model="old"))
    folder = save_checkpoint(old, tmp_path / "old")
    new = Checkpoint(Policy.uniform([("transformer.b", 3)]), Manifest(tuner="manual", base_model="new"))
    convert(save_checkpoint(new, tmp_path / "new"), folder / "policy.safetensors")
    found = load_checkpoint(folder)
    assert (found.manifest.base_model, found.policy) == ("new", new.policy)
