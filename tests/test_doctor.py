import json
import os
import shutil
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner

from sparsetune import doctor, ffmpeg
from sparsetune.attention.backends import BACKENDS
from sparsetune.cli.main import main
from sparsetune.config import resolve
from sparsetune.doctor import Finding, examine
from sparsetune.tracking import connect, resolve_store
from sparsetune.tracking.store import experiment_id


def findings(**settings: str) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(resolve("demo", (), {}, dict(settings)))}


def test_doctor_finds_this_machine_ready(working_folder: Path) -> None:
    done = CliRunner().invoke(main, ["doctor"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[-1] == "ready"
    assert all(line.split()[0] in ("ok", "note") for line in lines[:-1])
    assert "will be created by the first run" in done.stdout
    assert not (working_folder / "mlruns").exists()


def test_json_holds_what_programs_need(working_folder: Path) -> None:
    report = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)
    found = {finding["name"]: finding for finding in report["findings"]}
    assert report["ok"] is True
    assert {f"backend {name}" for name in BACKENDS} | {"python", "torch", "ffmpeg", "tracking", "cache"} <= set(found)
    assert found["mlflow"]["facts"] == {"version": metadata.version("mlflow")}
    assert found["ffmpeg"]["facts"]["missing_filters"] == []
    assert found["demo model"]["facts"]["size_bytes"] > 1e6


def test_without_a_gpu_the_kernels_are_noted_and_nothing_fails(working_folder: Path) -> None:
    found = findings()
    assert found["gpu"].status == "note"
    assert found["backend sparge"].text == "can't run here: there is no GPU"
    assert found["backend auto"].facts["chosen"] == "reference"
    assert found["spas_sage_attn"].text == "not installed, and there is no GPU to run it on"


def test_a_missing_ffmpeg_fails_with_status_1(working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffmpeg, "executable", lambda: None)
    done = CliRunner().invoke(main, ["doctor"])
    assert done.exit_code == 1
    assert "fail  ffmpeg             no ffmpeg found" in done.stdout
    assert done.stdout.splitlines()[-1] == "not ready: ffmpeg"


def test_an_ffmpeg_without_some_filters_will_do(working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffmpeg, "filters", lambda binary: frozenset({"ssim", "psnr"}))
    found = findings()["ffmpeg"]
    assert (found.status, found.facts["missing_filters"]) == ("note", ["libvmaf", "xpsnr"])


def test_a_missing_library_fails(working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_LIBRARIES", ("a-package-that-nobody-has",))
    assert findings()["a-package-that-nobody-has"].status == "fail"


@pytest.mark.filterwarnings("ignore:The ``noload``")  # from MLflow's use of SQLAlchemy
def test_a_store_that_is_there_is_read_and_written_to(own_store: Path) -> None:
    before = own_store.read_bytes()
    assert findings()["tracking"].text == f"sqlite:///{own_store} is readable and writable"
    assert own_store.read_bytes() == before


@pytest.mark.filterwarnings("ignore:The ``noload``")  # from MLflow's use of SQLAlchemy
def test_a_copied_project_is_noticed_and_repaired(own_store: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = resolve("demo", (), {}, {}).tracking
    client, text = connect(resolve_store(config)), own_store.parent / "note.txt"
    text.write_text("a note")
    run = client.create_run(experiment_id(client, resolve_store(config), "one/two"))
    client.log_artifact(run.info.run_id, str(text))
    copy = own_store.parent.with_name("copied")
    shutil.copytree(own_store.parent, copy)
    settings = {"tracking.root": str(copy)}
    found = findings(**settings)["tracking"]
    assert found.status == "note" and f"artifacts in {own_store.parent / 'artifacts'}," in found.text
    with caplog.at_level("WARNING"):
        connect(resolve_store(resolve("demo", (), {}, settings).tracking))
    assert "sparsetune doctor --repair" in caplog.text

    done = CliRunner().invoke(main, ["doctor", "--repair", "--set", f"tracking.root={copy}"])
    assert done.exit_code == 0 and "was moved or copied" not in done.stdout
    shutil.rmtree(own_store.parent)
    reader = connect(resolve_store(resolve("demo", (), {}, settings).tracking))
    assert Path(reader.download_artifacts(run.info.run_id, "note.txt")).read_text() == "a note"


def test_a_damaged_store_fails_and_a_disabled_one_is_noted(working_folder: Path) -> None:
    (working_folder / "mlruns").mkdir()
    (working_folder / "mlruns" / "mlflow.db").write_text("no database" * 100)
    found = findings()["tracking"]
    assert found.status == "fail"
    assert found.text.startswith("cannot write to ") and found.text.endswith("mlflow.db: file is not a database")
    assert findings(**{"tracking.enabled": "false"})["tracking"].status == "note"


def test_a_server_that_does_not_answer_fails(working_folder: Path) -> None:
    found = findings(**{"tracking.uri": "http://user:secret@127.0.0.1:9"})["tracking"]
    assert found.status == "fail"
    assert "does not answer:" in found.text
    assert "secret" not in found.text + str(found.facts)


def test_folders_that_cant_be_written_to_fail(working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write everywhere
    found = findings(**{"cache.dir": str(working_folder / "cache")})
    assert (found["cache"].status, found["tracking"].status) == ("fail", "fail")
    assert f"{working_folder} isn't writable" in found["cache"].text


def test_what_breaks_is_a_finding_and_hides_nothing(working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Finding:
        raise RuntimeError("a driver\nthat is gone")

    monkeypatch.setattr(doctor, "_torch", broken)
    found = findings()
    assert found["torch"] == Finding("torch", "fail", "RuntimeError: a driver that is gone")
    assert "cache" in found
