"""`sparsetune report`."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from sparsetune.cli.main import main
from sparsetune.evaluation.result import save_result
from sparsetune.tuning.record import save_record
from tests.report.synthetic import result_of, source_of
from tests.tracking.recorded import Place, World


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["report", *arguments])


@pytest.fixture
def folder(working_folder: Path) -> Path:
    """The results of a tuning in results/demo of the current folder."""
    folder = Path("results") / "demo"
    record = source_of(folder).tuning
    assert record is not None
    save_record(record, folder / "tuning.json")
    return folder


def test_a_folder_gets_its_report(folder: Path) -> None:
    done = call("results/demo")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.startswith("results/demo/report.html (")
    assert "clip-after-0" in (folder / "report.html").read_text()


def test_language_place_videos_and_figures_can_be_chosen(folder: Path) -> None:
    done = call(
        "results/demo/tuning.json", "--lang", "zh", "-o", "out/a.html", "--videos", "beside", "--figures", "png"
    )
    assert done.exit_code == 0, done.output
    assert "部署门槛" in Path("out/a.html").read_text()
    assert len(list(Path("out/a_videos").iterdir())) == 6
    assert "png" in done.stderr and len(list(Path("png").glob("*.png"))) == 10
    assert call("results/demo", "--lang", "zh").stdout.startswith("results/demo/report.zh.html (")


def test_another_evaluation_can_stand_beside_it_as_before(folder: Path) -> None:
    for name, result in (("before", result_of(variant=2, use_tuned=False)), ("after", result_of())):
        save_result(result, Path(name) / "demo_accuracy_tuned.json")
    assert "Before and after" not in (call("after").stdout and Path("after/report.html").read_text())
    done = call("after", "--before", "before")
    assert done.exit_code == 0, done.output
    assert "Before and after" in Path("after/report.html").read_text()


def test_a_run_gets_its_report_here(shared_place: Place, world: World) -> None:
    done = call(world.champion.evaluation[:12], "--tracking-uri", shared_place.store.uri)
    assert done.exit_code == 0, done.output
    assert Path(f"report-{world.champion.evaluation[:8]}.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nowhere"], 1, "no run or folder nowhere; list runs with `sparsetune runs`"),
        (["empty"], 1, "empty holds neither a tuning.json of `sparsetune tune` nor a *_accuracy_*.json"),
        (["cut.json"], 1, "cannot read cut.json: "),
        (["empty", "--lang", "fr"], 2, "'fr' is not one of 'en', 'zh'"),
        ([], 2, "Missing argument 'RUN|FOLDER'"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do(
    working_folder: Path, arguments: list[str], status: int, message: str
) -> None:
    Path("empty").mkdir()
    Path("cut.json").write_text("{")
    done = call(*arguments)
    assert done.exit_code == status
    assert message in done.stderr
    assert "Traceback" not in done.output


def test_a_file_that_cannot_be_written_is_said(folder: Path) -> None:
    Path("file").write_text("")
    done = call("results/demo", "-o", "file/report.html")
    assert done.exit_code == 1
    assert "cannot write" in done.stderr
