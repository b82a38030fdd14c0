import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sparsetune import metrics
from sparsetune.errors import MetricError


def test_every_metric_says_what_it_is():
    assert metrics.names()[:4] == ("frame_cosine", "psnr", "frame_l1", "frame_diff") or set(
        metrics.BASE_METRICS
    ) <= set(metrics.names())
    for name in metrics.names():
        found = metrics.get(name)
        assert found.name == name and found.definition and found.source
        assert found.range[0] < found.range[1]


def test_all_of_issue_3s_metrics_are_registered():
    wanted = "frame_cosine psnr frame_l1 frame_diff psnr_frame_mean psnr_frame_min ssim ms_ssim vmaf xpsnr lpips"
    assert set(wanted.split()) == set(metrics.names())


def test_a_decorated_function_is_a_metric(noise):
    @metrics.metric(higher_is_better=False, unit="levels")
    def brightness_shift(dense, sparse):
        """Absolute difference of the mean values.

        More words.
        """
        return abs(float(dense.mean()) - float(sparse.mean()))

    dense, sparse = noise(2, 8, 8)
    values = metrics.compute(dense, sparse, ["psnr", "brightness_shift"])
    assert values["brightness_shift"] == brightness_shift(dense, sparse)
    found = metrics.get("brightness_shift")
    assert found.definition == "Absolute difference of the mean values."
    assert found.unit == "levels" and not found.higher_is_better


def test_a_taken_name_is_refused():
    with pytest.raises(MetricError, match="metric name 'psnr' is already taken"):
        metrics.metric(name="psnr", higher_is_better=True)(lambda dense, sparse: 0.0)


def test_a_name_that_is_no_identifier_is_refused():
    with pytest.raises(MetricError, match="metric name 'my metric' must be an identifier"):
        metrics.metric(name="my metric", higher_is_better=True)(lambda dense, sparse: 0.0)


def test_registering_a_function_again_replaces_it():
    for _ in range(2):

        @metrics.metric(higher_is_better=True)
        def again(dense, sparse):
            return 1.0

    assert metrics.get("again").function is again


def test_an_unknown_name_gives_the_nearest(noise):
    with pytest.raises(MetricError, match=r"unknown metric 'frame_cosin'; choose from frame_cosine"):
        metrics.compute(*noise(1, 8, 8), ["frame_cosin"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_metric_without_a_finite_value_is_refused(noise, value):
    metrics.metric(name="wrong", higher_is_better=True)(lambda dense, sparse: value)
    with pytest.raises(MetricError, match=f"metric wrong returned {value} instead of a finite number"):
        metrics.compute(*noise(1, 8, 8), ["wrong"])


def test_what_a_function_raises_is_the_metrics_failure(noise):
    @metrics.metric(higher_is_better=True)
    def broken(dense, sparse):
        return 1 / 0

    with pytest.raises(MetricError, match="metric broken raised ZeroDivisionError: division by zero"):
        metrics.compute(*noise(1, 8, 8), ["broken"])


def test_own_names_are_those_of_the_user_only():
    assert metrics.own_names() == ()
    metrics.metric(name="mine", higher_is_better=True)(lambda dense, sparse: 0.0)
    assert metrics.own_names() == ("mine",)


def test_metrics_that_cannot_be_taken_are_reported(noise):
    values, unavailable = metrics.compute_available(*noise(2, 20, 24), ["psnr", "ms_ssim", "ssim"])
    assert set(values) == {"psnr", "ssim"}
    assert "176x176" in unavailable["ms_ssim"] and "\n" not in unavailable["ms_ssim"]
    with pytest.raises(metrics.MetricUnavailable, match="ms_ssim needs"):
        metrics.compute(*noise(2, 20, 24), ["ms_ssim"])


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), "dense frames must be a uint8 array of values 0..255, got float32"),
        ([np.zeros((4, 4, 3), np.uint8)], "dense frames must be a uint8 array of values 0..255, got list"),
        (np.zeros((4, 4, 3), np.uint8), r"must have shape \(frames, height, width, 3\), got \(4, 4, 3\)"),
        (np.zeros((2, 3, 4, 4), np.uint8), r"got \(2, 3, 4, 4\)"),
        (np.zeros((0, 4, 4, 3), np.uint8), r"got \(0, 4, 4, 3\)"),
    ],
)
def test_frames_of_another_form_are_refused(frames, message):
    with pytest.raises(MetricError, match=message):
        metrics.compute(frames, frames, ["psnr"])


def test_importing_metrics_is_light():
    code = (
        "import sys, sparsetune.metrics; "
        "heavy = {'torch', 'imageio_ffmpeg', 'PIL', 'lpips', 'scipy', 'sparsetune.video'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


SOURCE = """
from sparsetune import metrics

@metrics.metric(higher_is_better=False)
def {name}(dense, sparse):
    return 0.0
"""


def write(path: Path, name: str) -> Path:
    path.write_text(SOURCE.format(name=name))
    return path


def test_a_file_registers_its_metrics(tmp_path: Path) -> None:
    metrics.import_metrics([str(write(tmp_path / "my_metrics.py", "from_a_file"))])
    assert metrics.own_names() == ("from_a_file",)


def test_a_file_is_imported_once(tmp_path: Path) -> None:
    path = write(tmp_path / "my_metrics.py", "imported_once")
    metrics.import_metrics([str(path)])
    function = metrics.get("imported_once").function
    metrics.import_metrics([str(path)])
    assert metrics.get("imported_once").function is function


def test_two_files_of_one_name_do_not_meet(tmp_path: Path) -> None:
    places = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        places.append(str(write(tmp_path / name / "my_metrics.py", f"from_{name}")))
    metrics.import_metrics(places)
    assert metrics.own_names() == ("from_one", "from_other")


def test_a_module_of_the_current_folder_is_found(working_folder: Path) -> None:
    write(working_folder / "metrics_of_this_test.py", "from_a_module")
    before = list(sys.path)
    metrics.import_metrics(["metrics_of_this_test"])
    assert metrics.own_names() == ("from_a_module",)
    assert sys.path == before


@pytest.mark.parametrize(
    ("place", "source", "message"),
    [
        ("gone.py", None, r"no metric module at gone\.py"),
        ("no_such_module", None, r"no metric module named no_such_module"),
        ("broken.py", "1 / 0", r"cannot import metric module broken\.py: ZeroDivisionError: division by zero"),
        ("odd.py", "def", r"cannot import metric module odd\.py: SyntaxError"),
        (
            "needs.py",
            "import no_such_package",
            r"cannot import metric module needs\.py: ModuleNotFoundError: No module named",
        ),
    ],
)
def test_what_cannot_be_imported_is_said(working_folder: Path, place: str, source: str | None, message: str) -> None:
    if source is not None:
        (working_folder / place).write_text(source)
    with pytest.raises(MetricError, match=message):
        metrics.import_metrics([place])
