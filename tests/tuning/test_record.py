"""tuning.json."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from sparsetune.config import resolve
from sparsetune.errors import ResultError
from sparsetune.tuning.events import SearchStatistics, TrialResult, TuningResult
from sparsetune.tuning.record import SCHEMA_PATH, TuningRecord, load_record, record_schema, save_record
from tests.report.synthetic import record_of, result_of
from tests.tracking.recorded import policy_of

TRIAL = TrialResult(
    0, {"l1": 0.02, "order": "hilbert", "keep_text": True}, "complete", None, policy_of(0.9), (), 0.3, 38.0, 35.0, 0.99,
    True, 12.0, seconds_sparse=2.0, predicted_error=0.1,
)  # fmt: skip
RESULT = TuningResult(
    "demo-1", (TRIAL,), TRIAL, None, Path("checkpoint"), result_of(), None, 30.0, before=result_of(use_tuned=False),
    insight=SearchStatistics(-0.5, {"l1": 1.0}), seconds_by_phase={"trials": 12.0, "evaluation": 18.0},
)  # fmt: skip


def test_the_shipped_schema_is_up_to_date() -> None:
    assert json.loads(SCHEMA_PATH.read_text()) == record_schema(), "run sparsetune.tuning.record.write_schema()"


def test_a_tuning_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = TuningRecord.of(RESULT, resolve("demo", (), {}))
    save_record(record, tmp_path / "tuning.json")
    assert load_record(tmp_path / "tuning.json") == record
    jsonschema.validate(json.loads((tmp_path / "tuning.json").read_text()), record_schema())
    assert record.trials[0].params == {"l1": 0.02, "order": "hilbert", "keep_text": True}
    assert record.trials[0].params["keep_text"] is True
    assert (record.best, record.model_name, record.evaluation) == (0, "demo", RESULT.evaluation)


def test_where_things_are_kept_is_not_recorded() -> None:
    config = resolve("demo", (), {}, {"tune.storage": "postgresql://me:secret@host/db", "tracking.uri": "http://x"})
    assert "secret" not in TuningRecord.of(RESULT, config).model_dump_json()


def test_what_is_no_number_becomes_null() -> None:
    odd = replace(TRIAL, predicted_error=float("inf"), psnr=float("nan"))
    result = replace(RESULT, trials=(odd,), insight=SearchStatistics(float("nan"), {"l1": float("nan")}))
    record = TuningRecord.of(result, resolve("demo", (), {}))
    assert (record.trials[0].predicted_error, record.trials[0].psnr) == (None, None)
    assert record.insight is not None
    assert (record.insight.rank_correlation, record.insight.importances) == (None, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value | {"schema_version": 2}, r"with schema_version 1, got 2; update sparsetune"),
        (lambda value: value | {"trials": 3}, r"is not a valid tuning result: trials: .*; run `sparsetune tune` again"),
        (lambda value: [], r"with schema_version 1, got None; run `sparsetune tune`"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    value = change(record_of().model_dump(mode="json"))
    (tmp_path / "tuning.json").write_text(json.dumps(value))
    with pytest.raises(ResultError, match=message):
        load_record(tmp_path / "tuning.json")


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tuning.json").write_text('{"schema_version": 1, "trials"')
    with pytest.raises(ResultError, match=r"cannot read .*: .*; run `sparsetune tune` again"):
        load_record(tmp_path / "tuning.json")
