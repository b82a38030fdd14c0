import json
from importlib import metadata
from pathlib import Path

import pytest

import sparsetune
from sparsetune.checkpoint import Manifest, git_commit, hash_prompts, versions
from sparsetune.checkpoint.manifest import read_manifest
from sparsetune.errors import CheckpointError


def test_created_is_now_in_utc_and_other_zones_are_converted() -> None:
    assert Manifest(tuner="optuna").created.endswith("+00:00")
    assert Manifest(tuner="x", created="2026-01-01T12:00:00+02:00").created == "2026-01-01T10:00:00+00:00"


@pytest.mark.parametrize("created", ["yesterday", "2026-01-01T12:00:00"])
def test_a_time_without_zone_is_refused(created: str) -> None:
    with pytest.raises(ValueError, match=r"must be an ISO 8601 time|must have a time zone"):
        Manifest(tuner="x", created=created)


def test_json_keeps_every_field(tmp_path: Path) -> None:
    manifest = Manifest(
        tuner="optuna", num_frames=17, guidance_scale=2.5, seeds=(1, 2), versions=versions(), metrics={"psnr": 1e-17}
    )
    (tmp_path / "m.json").write_text(manifest.model_dump_json())
    assert read_manifest(tmp_path / "m.json") == manifest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "from a newer sparsetune"),
        ({"metrics": {"psnr": "high"}}, r"metrics\.psnr: Input should be a valid number"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"layers": [{"name": "a", "num_heads": 0}]}, r"layers\.0\.num_heads: Input should be greater than 0"),
    ],
)
def test_a_manifest_that_does_not_hold_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    (tmp_path / "m.json").write_text(json.dumps({"schema_version": 1, "tuner": "x"} | change))
    with pytest.raises(CheckpointError, match=message):
        read_manifest(tmp_path / "m.json")


@pytest.mark.parametrize("text", ["", "[]", "null", "{"])
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"cannot read the manifest|needs schema_version"):
        read_manifest(tmp_path / "m.json")


def test_the_prompts_hash_tells_order_and_borders() -> None:
    hashes = {hash_prompts(prompts) for prompts in (["a", "b"], ["b", "a"], ["ab"], ["a", "b", "b"], [])}
    assert len(hashes) == 5


def test_versions_come_from_package_metadata() -> None:
    import torch

    assert versions()["torch"] == torch.__version__
    assert all(versions().values())


@pytest.mark.usefixtures("not_installed")
def test_the_own_version_needs_no_metadata() -> None:
    with pytest.raises(metadata.PackageNotFoundError, match="sparsetune"):
        metadata.version("sparsetune")
    assert versions()["sparsetune"] == sparsetune.__version__


def test_the_commit_is_a_hash_or_unknown() -> None:
    commit = git_commit()
    assert commit is None or len(commit.removesuffix("-dirty")) in (40, 64)
