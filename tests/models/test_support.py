"""These tests generate and check the support table, docs/models.md.

`WRITE_DOCS=1 pytest tests/models/test_support.py` writes it.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models import support
from tests.models.bare_cases import BARE_CASES
from tests.models.cases import CASES as FULL_CASES
from tests.models.cases import Case
from tests.models.other_pipelines import UNTRIED, others, pipelines, uses_a_supported_transformer
from tests.models.support_table import Table

CASES = FULL_CASES + BARE_CASES
WRITING = bool(os.environ.get("WRITE_DOCS"))
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
QUICK = ("WanPipeline-wan2.1-t2v-1.3b", "FluxPipeline-flux-dev")
ALL = [pytest.param(case, id=case.id, marks=() if case.id in QUICK else pytest.mark.slow) for case in CASES]


@pytest.fixture(scope="session")
def table() -> Iterator[Table]:
    """The committed table; with WRITE_DOCS the page is written at the end."""
    held = Table.read(PAGE, WRITING)
    yield held
    if WRITING:
        PAGE.write_text(held.page([case.id for case in CASES]), encoding="utf-8")


@pytest.mark.parametrize("case", ALL)
@pytest.mark.filterwarnings("ignore:__array(__|_wrap__) ")  # diffusers on its scheduler's tensors
@pytest.mark.filterwarnings("ignore:In CPU autocast")  # of Mochi, which asks for float32
def test_sparsify_does_what_the_table_says(case: Case, table: Table) -> None:
    pipe = support.build(case)
    found = support.examine(pipe, lambda: support.rendered(pipe, case))
    assert found.restored
    assert found.verdict != "not", found
    told = {"verdict": found.verdict, "text": found.text, "tokens": found.layout, "exactness": found.exactness}
    table.check(case.id, **told, reason=found.reason)


FIRST_OF_EACH = {case.blueprint.split("-")[0]: case.id for case in reversed(FULL_CASES)}
"""One case for each family of transformers: the others, which compile the same code, only write the page."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.id) for case in CASES if WRITING or case.id in FIRST_OF_EACH.values()],
)
@pytest.mark.filterwarnings("ignore")  # of torch.compile about the models' own code
def test_compilation_does_what_the_table_says(case: Case, table: Table) -> None:
    pipe = support.build(case)
    dense, sparse, difference = support.graph_breaks(pipe, lambda: support.rendered(pipe, case))
    assert sparse <= dense
    assert difference < 1e-3
    table.check(case.id, compiled="only the model's own breaks" if sparse else "no break")


def test_the_table_has_a_row_for_each_case_and_no_other(table: Table) -> None:
    if not table.writing:
        assert list(table.rows) == [case.id for case in CASES]
        assert {row["compiled"] for row in table.rows.values()} == {"no break", "only the model's own breaks"}


@pytest.mark.slow
def test_every_pipeline_of_a_supported_transformer_is_tried_or_said_not_to_be() -> None:
    tried = {case.pipeline for case in CASES}
    assert not tried & UNTRIED.keys()
    tried -= {name for name in tried if "Modular" in name or name == "ConsisIDPipeline"}  # not in diffusers' own list
    assert tried | UNTRIED.keys() == {name for name in pipelines() if uses_a_supported_transformer(name)}


@pytest.mark.slow
def test_every_other_pipeline_is_told_with_a_reason(table: Table) -> None:
    listed = [name for names in others().values() for name in names]
    assert len(listed) == len(set(listed))
    assert set(listed) == {name for name in pipelines() if not uses_a_supported_transformer(name)}
    if not table.writing:
        assert PAGE.read_text(encoding="utf-8") == table.page([case.id for case in CASES])
