"""The commands on the real demo model, with as few frames and steps as it can do."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from sparsetune.cli.main import main
from sparsetune.cli.tables import summary_text
from sparsetune.evaluation.result import load_result
from sparsetune.metrics import registry
from sparsetune.report.summary import evaluation_summary
from sparsetune.report.words import words

PROMPTS = ("a red circle moving right over a blue background", "a green star growing over a white background")
OWN_METRIC = """
from sparsetune import metrics

@metrics.metric(higher_is_better=False, unit="levels")
def brightness_shift(dense, sparse):
    return abs(float(dense.mean()) - float(sparse.mean()))
"""
SMALL = ("--num-frames", "9", "--num-inference-steps", "2", "--guidance-scale", "1")


def run(*args: str, status: int = 0) -> Result:
    result = CliRunner().invoke(main, list(args))
    assert result.exit_code == status, result.output
    return result


@dataclass(frozen=True)
class Evaluated:
    """An evaluation that the command ran: its folder and output."""

    folder: Path
    tracking: Path
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def evaluated(migrated_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    """Run the command in this process, which has imported the model's libraries for other tests too."""
    root = tmp_path_factory.mktemp("evaluated")
    prompts = root / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    module = root / "my_metrics.py"
    module.write_text(OWN_METRIC)
    (root / "runs").mkdir()
    shutil.copy(migrated_database, root / "runs" / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
        done = run(
            "eval", *SMALL, "--prompt-file", str(prompts), "--num-prompts", "2",
            "--metric-module", str(module), "--output-dir", str(root / "before"),
            "--cache-dir", str(root / "cache"), "--min-psnr", "100",
            "--set", f"tracking.root={root / 'runs'}", "--set", "tracking.report=no", "--verbose",
        )  # fmt: skip
    return Evaluated(root / "before", root / "runs", done.stdout, done.stderr)


def test_eval_prints_table_score_and_gate_on_stdout_and_progress_on_stderr(evaluated: Evaluated) -> None:
    out, err = evaluated.stdout, evaluated.stderr
    assert re.search(r"^metric +mean +std +min +max", out, re.MULTILINE)
    assert re.search(r"^psnr \(dB\) +\d+\.\d\d", out, re.MULTILINE)
    assert re.search(r"^score \d+/100", out, re.MULTILINE)
    assert re.search(r"^gate to deploy: not met: mean psnr .* <= 100 dB$", out, re.MULTILINE)
    assert re.search(rf"^prompt 1/2: {PROMPTS[0]}$", err, re.MULTILINE)
    assert len(re.findall(r"^  frame_cosine \d\.\d+, psnr \d+\.\d+ dB, frame_l1 ", err, re.MULTILINE)) == 2


@pytest.mark.slow
def test_eval_lets_no_library_talk(tmp_path: Path) -> None:
    """In a process of its own: libraries take their verbosity when they are imported."""
    options = (*SMALL, "--num-prompts", "1", "--no-track", "--output-dir", str(tmp_path))
    done = subprocess.run([sys.executable, "-m", "sparsetune", "eval", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours = re.compile(r"loading demo|prompt 1/1: |  [a-z_]+ \d|evaluation \d+%, ")
    assert [line for line in done.stderr.splitlines() if line and not ours.match(line)] == []


def test_eval_leaves_the_files_that_users_know(evaluated: Evaluated) -> None:
    result = json.loads((evaluated.folder / "cogvideo_accuracy_default.json").read_text())
    assert [row["prompt"] for row in result["detailed_results"]] == list(PROMPTS)
    names = {path.name for path in (evaluated.folder / "videos").iterdir()}
    assert names == {f"prompt_{i}_{side}.mp4" for i in (0, 1) for side in ("dense", "sparse", "compare")}
    assert (evaluated.folder / "report.md").is_file()


@pytest.mark.filterwarnings("ignore:The ``noload``")  # from MLflow's use of SQLAlchemy
def test_a_metric_of_one_s_own_is_in_table_json_comparison_and_tracking(evaluated: Evaluated) -> None:
    from mlflow import MlflowClient

    assert re.search(r"^brightness_shift \(levels\) +\d", evaluated.stdout, re.MULTILINE)
    result = json.loads((evaluated.folder / "cogvideo_accuracy_default.json").read_text())
    mean = result["statistics"]["brightness_shift"]["mean"]
    assert all("brightness_shift" in row for row in result["detailed_results"])
    compared = run("compare", str(evaluated.folder), str(evaluated.folder)).stdout
    assert re.search(r"^brightness_shift \(levels\) .* 0/0/2$", compared, re.MULTILINE)
    client = MlflowClient(f"sqlite:///{evaluated.tracking / 'mlflow.db'}")
    (recorded,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert recorded.data.metrics["brightness_shift/mean"] == pytest.approx(mean)


def test_the_default_metrics_are_in_the_table_and_the_missing_one_is_said(evaluated: Evaluated) -> None:
    for name in ("psnr_frame_mean", "psnr_frame_min", "ssim", "vmaf", "xpsnr"):
        assert re.search(rf"^{name}( \(dB\))? +\d", evaluated.stdout, re.MULTILINE)
    assert "no ms_ssim: ms_ssim needs frames of at least 176x176" in evaluated.stdout


def test_json_is_alone_on_stdout_and_an_unmet_gate_is_status_3_where_it_is_required(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(PROMPTS[0])
    printed = run(
        "eval", *SMALL, "--prompt-file", str(tmp_path / "prompts.txt"), "--num-prompts", "1", "--no-track", "--json",
        "--output-dir", str(tmp_path / "out"), "--min-psnr", "100", "--require-gate", status=3,
    )  # fmt: skip
    assert json.loads(printed.stdout) == json.loads((tmp_path / "out" / "cogvideo_accuracy_default.json").read_text())
    assert "sparsetune: the gate is not met: mean psnr" in printed.stderr


def test_compare_sets_two_folders_side_by_side(evaluated: Evaluated, tmp_path: Path) -> None:
    folder = str(evaluated.folder)
    printed = run("compare", folder, folder, "--output", str(tmp_path / "comparison.md"))
    assert re.search(r"^ +before +after$", printed.stdout, re.MULTILINE)
    assert "2 prompts are paired by prompt and seed" in printed.stdout
    assert (tmp_path / "comparison.md").read_text() == run("compare", folder, folder, "--markdown").stdout
    as_json = json.loads(run("compare", folder, folder, "--json").stdout)
    assert as_json["num_pairs"] == 2


def test_summaries_are_printed_in_chinese(evaluated: Evaluated) -> None:
    folder = str(evaluated.folder)
    printed = run("compare", folder, folder, "--lang", "zh").stdout
    assert "按提示词与随机种子配对" in printed and "frame_cosine" in printed
    result = load_result(evaluated.folder)
    lines = summary_text(evaluation_summary(result, words("zh"))).splitlines()
    assert lines[0] == "统计摘要" and any(line.startswith("帧相似度 (Cosine)") for line in lines)
    assert any(line.startswith("平均稀疏度") for line in lines)


def test_compare_writes_markdown_or_json_only(evaluated: Evaluated, tmp_path: Path) -> None:
    folder = str(evaluated.folder)
    printed = run("compare", folder, folder, "--output", str(tmp_path / "comparison.txt"), status=2)
    assert "--output must end in .md or .json" in printed.stderr
    assert list(tmp_path.iterdir()) == []


def test_metrics_compares_two_files(evaluated: Evaluated) -> None:
    dense, sparse = (str(evaluated.folder / "videos" / f"prompt_0_{side}.mp4") for side in ("dense", "sparse"))
    assert re.search(r"^psnr \(dB\) +\d+\.\d\d", run("metrics", dense, sparse).stdout, re.MULTILINE)
    as_json = json.loads(run("metrics", dense, dense, "--json", "--metrics", "psnr,ssim").stdout)
    assert as_json["statistics"]["psnr"]["mean"] == 100.0
    assert "ssim" in as_json["statistics"]


def test_metrics_checks_only_the_bounds_that_are_given(evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch) -> None:
    videos = str(evaluated.folder / "videos")
    printed = run("metrics", videos, "--metrics", "psnr", "--json")
    found = json.loads(printed.stdout)
    assert [pair["name"] for pair in found["pairs"]] == ["prompt_0.mp4", "prompt_1.mp4"] and found["gate"] is None
    assert "gate" not in run("metrics", videos, "--metrics", "psnr").stdout
    told = ("metrics", videos, "--metrics", "psnr", "--min-psnr-worst", "99", "--require-gate")
    failed = run(*told, status=3)
    assert "gate to deploy: not met: worst prompt's psnr" in failed.stdout and "mean" not in failed.stderr
    told = ("metrics", videos, "--metrics", "psnr", "--gate-min", "ssim=.999", "--gate-max", "frame_l1=.0001")
    assert "not met: mean ssim" in run(*told).stdout and "; mean frame_l1" in run(*told).stdout
    whole = json.loads(run("metrics", videos, "--gate", "quality", "--json").stdout)["gate"]
    assert [one["bound"] for one in whole["conditions"]] == [0.9, 20.0, 20.0, 80.0]
    monkeypatch.setenv("SPARSETUNE_GATE__MIN_PSNR", "1")
    assert "gate to deploy: passed" in run("metrics", videos, "--metrics", "psnr", "--require-gate").stdout


def test_metrics_names_what_is_missing(evaluated: Evaluated) -> None:
    video = str(evaluated.folder / "videos" / "prompt_0_dense.mp4")
    assert "has nothing to be compared with; pass a second file" in run("metrics", video, status=2).stderr
    required = run("metrics", video, video, "--require-gate", status=2)
    assert "--require-gate needs a bound, such as --min-psnr 35" in required.stderr


def test_metrics_of_a_missing_file_is_one_line(tmp_path: Path) -> None:
    printed = run("metrics", str(tmp_path / "no.mp4"), str(tmp_path / "no.mp4"), status=2)
    assert re.fullmatch(r"sparsetune: no video file or folder at .*\n", printed.stderr)


def test_cache_is_listed_and_cleared(evaluated: Evaluated) -> None:
    folder = str(evaluated.folder.parent / "cache")
    assert {entry["prompt"] for entry in json.loads(run("cache", "ls", "--json", "--cache-dir", folder).stdout)} == set(
        PROMPTS
    )
    assert all(prompt in run("cache", "ls", "--cache-dir", folder).stdout for prompt in PROMPTS)
    assert run("cache", "clear", "--cache-dir", folder).stdout.startswith("deleted 2 baselines, ")
    assert run("cache", "ls", "--cache-dir", folder).stdout == ""


def test_generate_writes_a_video_and_prints_where(working_folder: Path) -> None:
    printed = run("generate", PROMPTS[0], *SMALL)
    assert printed.stdout == "results/demo/generated.mp4\n"
    assert (working_folder / "results" / "demo" / "generated.mp4").stat().st_size > 500


def test_generate_needs_a_prompt(working_folder: Path) -> None:
    assert "the prompt is empty" in run("generate", " ", status=2).stderr
    assert list(working_folder.iterdir()) == []


def test_eval_ends_with_a_summary_the_report_s_place_and_the_next_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSETUNE_TRACKING__REPORT", "true")
    (tmp_path / "prompts.txt").write_text(PROMPTS[0])
    out = tmp_path / "out"
    command = (
        "eval", *SMALL, "--prompt-file", str(tmp_path / "prompts.txt"), "--num-prompts", "1", "--no-track",
        "--output-dir", str(out),
    )  # fmt: skip
    lines = run(*command).stdout.splitlines()
    assert len(lines) <= 15
    assert re.match(r"sparsity \d\.\d+ over all attention calls", lines[0])
    assert re.match(r"quality: psnr \d+\.\d+ dB \(worst .*\), frame_cosine \d\.\d+ over 1 prompt", lines[1])
    assert lines[-2:] == [f"report: {out / 'report.html'}", "next: sparsetune tune --model demo"]
    assert (out / "report.html").stat().st_size > 100_000
    monkeypatch.setattr("sparsetune.report.build.build_report", broken_report)
    assert "report: not written: no chart today" in run(*command, "--lang", "en").stdout


def broken_report(*_: object, **__: object) -> None:
    raise ValueError("no chart today")
