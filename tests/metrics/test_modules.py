import sys
from pathlib import Path

import pytest

from sparsetune import metrics
from sparsetune.errors import MetricError

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
        ("gone.py", None, r"there is no file gone\.py; mend the path"),
        ("no_such_module", None, r"there is no module no_such_module; mend the name"),
        ("broken.py", "1 / 0", r"importing broken\.py raised ZeroDivisionError: division by zero; mend it"),
        ("odd.py", "def", r"importing odd\.py raised SyntaxError"),
        ("needs.py", "import no_such_package", r"importing needs\.py raised ModuleNotFoundError: No module named"),
    ],
)
def test_what_cannot_be_imported_is_said(working_folder: Path, place: str, source: str | None, message: str) -> None:
    if source is not None:
        (working_folder / place).write_text(source)
    with pytest.raises(MetricError, match=message):
        metrics.import_metrics([place])
