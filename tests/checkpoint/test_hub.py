"""Checkpoints on a local stand-in of the Hugging Face Hub, through the real client."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from sparsetune import load_checkpoint
from sparsetune.attention.policy import Policy
from sparsetune.attention.schedule import DenseSchedule
from sparsetune.attention.thresholds import HeadThresholds
from sparsetune.checkpoint import Checkpoint, Manifest, save_checkpoint
from sparsetune.checkpoint.hub import HubReference
from sparsetune.cli.main import main
from sparsetune.cli.options import local_checkpoint
from sparsetune.config import resolve
from sparsetune.errors import UsageError
from sparsetune.tuning.record import save_record
from tests.checkpoint.hub_server import OWNER, READER, TOKEN, Hub, running_hub
from tests.report.synthetic import source_of

REPO = f"{OWNER}/demo-sparse"
LAYERS = [(f"transformer.transformer_blocks.{index}.attn1", 2) for index in range(2)]


@pytest.fixture
def hub(working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as hub:
        constants = "huggingface_hub.constants."
        monkeypatch.setattr(f"{constants}HF_HUB_OFFLINE", False)
        monkeypatch.setattr(f"{constants}HF_HUB_DISABLE_XET", True)  # its storage speaks another protocol than HTTP's
        monkeypatch.setattr(f"{constants}HF_HUB_CACHE", str(working_folder / "hub"))
        monkeypatch.setattr(f"{constants}ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(f"{constants}HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_checkpoint(checkpoint(), tmp_path / "saved")


def checkpoint() -> Checkpoint:
    policy = Policy.uniform(LAYERS, HeadThresholds(0.3, cdfthreshd=0.91), schedule=DenseSchedule(0.25))
    manifest = Manifest(
        tuner="optuna", base_model="tiny", base_source="maker/tiny-video", base_revision="abc", device="NVIDIA H100",
        num_frames=81, height=480, width=832, metrics={"psnr": 37.25, "sparsity": 0.4}, versions={"torch": "2.9"},
    )  # fmt: skip
    return Checkpoint(policy, manifest, np.arange(5, dtype=np.uint8).tobytes())


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, ["checkpoint", *map(str, args)])


def test_what_is_pushed_is_pulled_equal(hub: Hub, saved: Path) -> None:
    pushed = run("push", saved, REPO)
    assert pushed.exit_code == 0, pushed.stderr
    assert pushed.stdout == f"{hub.url}/{REPO}/commit/{hub.repos[REPO].newest}\n"
    assert set(hub.repos[REPO].files) == {"README.md", "dial.npz", "manifest.json", "policy.safetensors"}
    assert run("pull", REPO).stdout == "demo-sparse\n"
    for path in (Path("demo-sparse"), f"hf://{REPO}", Path(f"hf://{REPO}"), f"hf://{REPO}@main"):
        found = load_checkpoint(path)
        assert (found.policy, found.dial) == (checkpoint().policy, checkpoint().dial)
        assert found.manifest == load_checkpoint(saved).manifest


def test_the_results_of_its_tuning_and_videos_are_pushed_along(hub: Hub, working_folder: Path) -> None:
    source = source_of(working_folder / "results")
    assert source.tuning is not None
    settings = {"study_name": source.tuning.study_name, "trial": source.tuning.best}
    made = checkpoint()
    made = replace(made, manifest=made.manifest.model_copy(update={"tuner_settings": settings}))
    save_checkpoint(made, "results/checkpoint")
    save_record(source.tuning, Path("results/tuning.json"))
    pushed = run("push", "results/checkpoint", REPO)
    assert (pushed.exit_code, pushed.stderr) == (0, "")
    videos = {path for path in hub.repos[REPO].files if path.startswith("videos/")}
    card = hub.repos[REPO].files["README.md"].decode()
    assert len(videos) == 2 and all(f"({path})" in card for path in videos)
    assert "95% interval of the mean" in card and "base_model: maker/tiny-video" in card
    # A later push without results has none of them.
    Path("results/tuning.json").unlink()
    later = run("push", "results/checkpoint", REPO)
    assert "no evaluation of the checkpoint was found" in later.stderr
    assert not any(path.startswith("videos/") for path in hub.repos[REPO].files)


def test_every_command_takes_a_reference(hub: Hub, saved: Path) -> None:
    run("push", saved, REPO)
    assert "base_source: maker/tiny-video" in run("show", f"hf://{REPO}").stdout
    assert run("diff", f"hf://{REPO}", saved, "--json").stdout == run("diff", saved, saved, "--json").stdout
    assert run("convert", f"hf://{REPO}", "policy.safetensors").exit_code == 0
    of_eval = local_checkpoint(f"hf://{REPO}", resolve(environ={}), False)  # and of generate
    assert load_checkpoint(str(of_eval)).policy == checkpoint().policy
    again = run("push", f"hf://{REPO}", f"{OWNER}/copy")
    assert again.exit_code == 0 and f"{OWNER}/copy" in hub.repos


def test_only_a_checkpoints_files_are_downloaded(hub: Hub, saved: Path) -> None:
    run("push", saved, REPO)
    hub.repos[REPO].files["pytorch_model.bin"] = b"weights"
    hub.repos[REPO].files["modeling.py"] = b"raise SystemExit"
    assert run("pull", REPO, "pulled").exit_code == 0
    assert {path.name for path in Path("pulled").iterdir()} == {"dial.npz", "manifest.json", "policy.safetensors"}
    assert set(hub.downloaded) == {"dial.npz", "manifest.json", "policy.safetensors"}


def test_a_second_push_replaces_a_checkpoints_files_and_keeps_others(hub: Hub, saved: Path, tmp_path: Path) -> None:
    run("push", saved, REPO)
    first = hub.repos[REPO].newest
    hub.repos[REPO].files["LICENSE"] = b"ours"
    hub.repos[REPO].files["videos/old.mp4"] = b"old"
    other = replace(checkpoint(), policy=Policy.uniform(LAYERS), dial=None)
    again = run("push", save_checkpoint(other, tmp_path / "other"), REPO)
    assert again.exit_code == 0, again.stderr
    assert set(hub.repos[REPO].files) == {"LICENSE", "README.md", "manifest.json", "policy.safetensors"}
    assert load_checkpoint(f"hf://{REPO}").policy == other.policy
    assert load_checkpoint(f"hf://{REPO}@{first}").policy == checkpoint().policy


@pytest.mark.parametrize(("options", "visibility"), [((), None), (("--private",), "private")])
def test_visibility_is_the_hubs_unless_private_is_asked_for(
    hub: Hub, saved: Path, options: tuple[str, ...], visibility: str | None
) -> None:
    assert run("push", saved, REPO, *options).exit_code == 0
    assert hub.repos[REPO].visibility == visibility


def refused(result: Result, *texts: str) -> None:
    assert (result.exit_code, result.stdout) == (1, "")
    *notes, line = result.stderr.splitlines()
    assert line.startswith("sparsetune: cannot ") and len(notes) <= 1  # that no evaluation was found
    for text in texts:
        assert text in line
    assert TOKEN not in result.output and READER not in result.output


def test_a_push_without_rights_is_one_line(hub: Hub, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(run("push", saved, "others/demo"), "others/demo: the token has no right to (403)", "may write to others")
    monkeypatch.setenv("HF_TOKEN", READER)
    refused(run("push", saved, REPO), "the token has no right to (403)")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "none")
    refused(run("push", saved, REPO), "(401); log in with `hf auth login`, or set HF_TOKEN")


def test_a_repository_that_is_private_or_absent_is_one_line(
    hub: Hub, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("push", saved, REPO, "--private")
    refused(run("pull", f"{OWNER}/absent"), "hf://owner/absent: there is no such repository, or it is private (404)")
    refused(run("pull", f"{REPO}@v9"), f"hf://{REPO}@v9: there is no revision v9; give another branch, tag or commit")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "none")
    refused(run("show", f"hf://{REPO}"), "or it is private (401); check the name, or log in with `hf auth login`")


def test_a_repository_without_a_checkpoint_says_what_it_lacks(hub: Hub, saved: Path) -> None:
    run("push", saved, REPO)
    del hub.repos[REPO].files["policy.safetensors"]
    result = run("show", f"hf://{REPO}")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"sparsetune: hf://{REPO} is no checkpoint: it lacks policy.safetensors; use a")


def test_a_hub_that_fails_or_is_not_there_is_one_line(hub: Hub, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.failure = 500
    refused(run("push", saved, REPO), "the hub refused with status 500; try again later")
    refused(run("pull", REPO), "the hub refused with status 500; try again later")
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", nowhere)
    for result in (run("push", saved, REPO), run("pull", REPO)):
        refused(result, f"the hub at {nowhere} can't be reached; check the network, or HF_ENDPOINT")


def test_offline_the_clients_cache_is_used_or_its_absence_said(
    hub: Hub, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("push", saved, REPO)
    load_checkpoint(f"hf://{REPO}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load_checkpoint(f"hf://{REPO}").policy == checkpoint().policy
    refused(run("pull", f"{OWNER}/absent"), "HF_HUB_OFFLINE is set", "unset it")
    refused(run("push", saved, REPO), "HF_HUB_OFFLINE is set", "unset it")


def test_the_clients_environment_variables_count(hub: Hub, saved: Path) -> None:
    run("push", saved, REPO)
    command = [sys.executable, "-m", "sparsetune", "checkpoint", "show", f"hf://{REPO}"]
    environment = dict(os.environ) | {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": "other", "HF_HUB_OFFLINE": "0"}
    shown = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert shown.returncode == 0 and "base_source: maker/tiny-video" in shown.stdout, shown.stderr
    environment |= {"HF_HUB_CACHE": "empty", "HF_HUB_OFFLINE": "1"}
    failed = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert failed.returncode == 1
    assert failed.stderr == (
        f"sparsetune: cannot read hf://{REPO}: HF_HUB_OFFLINE is set, and the hub's cache doesn't have it; unset it\n"
    )


def test_no_token_is_written(hub: Hub, saved: Path, working_folder: Path) -> None:
    run("push", saved, REPO)
    run("pull", REPO)
    held = [content for commit in hub.repos[REPO].commits.values() for content in commit.values()]
    held += [path.read_bytes() for path in working_folder.rglob("*") if path.is_file()]
    assert len(held) > 8 and not any(TOKEN.encode() in content for content in held)


def test_a_folder_with_other_files_is_not_pulled_into(hub: Hub, saved: Path) -> None:
    run("push", saved, REPO)
    Path("notes").mkdir()
    Path("notes/mine.txt").write_text("mine")
    result = run("pull", REPO, "notes")
    assert result.exit_code == 1 and "holds other files than a checkpoint's: mine.txt" in result.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name", HubReference("owner/name")),
        ("hf://owner/name", HubReference("owner/name")),
        ("hf:/owner/name@v1.0", HubReference("owner/name", "v1.0")),
        ("hf://owner/name@refs/pr/1", HubReference("owner/name", "refs/pr/1")),
    ],
)
def test_references(text: str, expected: HubReference) -> None:
    assert HubReference.parse(text) == expected
    assert HubReference.parse(str(expected)) == expected


@pytest.mark.parametrize("text", ["name", "hf://name", "a/b/c", "../b", "a/..", "a/b@", "hf://a/b@../x", "a/b--c"])
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"{text} is not OWNER/NAME")):
        HubReference.parse(text)
