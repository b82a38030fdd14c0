import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from sparsetune.attention.breakeven import BreakEvenTable
from sparsetune.cli.main import main

SMALL = ("--num-frames", "9", "--repeats", "1")


def test_bench_prints_tables_and_leaves_the_break_even_table(working_folder: Path) -> None:
    done = CliRunner().invoke(main, ["bench", "--e2e", *SMALL])
    assert done.exit_code == 0, done.output
    out = done.stdout
    assert re.search(r"^.*: 1 x 3 heads x 800 tokens x 64, float32, 8 calls a step$", out, re.MULTILINE)
    assert re.search(r"^dense sdpa +- +\d+\.\d{3} +1\.00x$", out, re.MULTILINE)
    assert re.search(r"^reference topk +0\.\d{3} +\d+\.\d{3} +\d+\.\d\dx$", out, re.MULTILINE)
    assert re.search(r"^reference: (never faster|faster from sparsity \d\.\d+)$", out, re.MULTILINE)
    assert re.search(r"^self-attention removed +0\.000 ", out, re.MULTILINE)
    assert re.search(
        r"^self-attention is .*% of a dense step: the maximum speed-up of any .* is \d\.\d\dx$", out, re.MULTILINE
    )
    assert "backend reference (auto; not sparge: the model is on cpu; not flex: the model is on cpu)" in out
    assert "warning: times of the plain PyTorch reference on a CPU" in out
    written = json.loads((working_folder / "results" / "demo" / "break-even.json").read_text())
    assert BreakEvenTable.model_validate(written).shapes[0].kernels == ("reference",)
    assert re.search(r"^  reference topk at 0\.\d\d: \d+\.\d\d ms$", done.stderr, re.MULTILINE)


def test_bench_gives_json_alone_on_stdout(working_folder: Path) -> None:
    done = CliRunner().invoke(main, ["bench", "--json", "--output", "table.json", *SMALL])
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    assert set(figures["shapes"][0]["break_even"]) == {"reference"}
    assert figures["backend"]["name"] == "reference"
    assert "step" not in figures
    assert (working_folder / "table.json").is_file()


@pytest.mark.parametrize("backend", ["sparge", "flex"])
def test_bench_refuses_a_kernel_that_cant_run(working_folder: Path, backend: str) -> None:
    done = CliRunner().invoke(main, ["bench", "--backend", backend, *SMALL])
    assert done.exit_code == 1
    assert f"sparsetune: backend {backend} needs" in done.stderr
