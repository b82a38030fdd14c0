import math

import pytest

from sparsetune.tracking.operations import (
    STAND_IN,
    Begin,
    Dataset,
    Files,
    Inputs,
    Model,
    Operation,
    Status,
    Text,
    Write,
    new_stand_in,
    read_operation,
)

ONE, TWO = new_stand_in(), new_stand_in()


@pytest.mark.parametrize(
    "operation",
    [
        Begin(run=ONE, experiment_id="1", name=None, start_ms=5, tags={"a": "b"}),
        Write(run=ONE, metrics=(("psnr", math.inf, 5, 1), ("l1", 0.1, 5, 2)), params={"a": "1"}, tags={"b": "2"}),
        Text(run=ONE, path="a/b.json", text='{"é": "\\n"}'),
        Files(run=ONE, folder=None),
        Inputs(run=ONE, datasets=(Dataset(name="a", digest="b", source_type="c", source="d", context="e"),)),
        Model(run=ONE),
        Status(run=ONE, status="FINISHED", end_ms=6),
    ],
)
def test_an_operation_is_read_back_as_it_was_written(operation: Operation) -> None:
    assert read_operation(operation.model_dump_json(), {}) == operation


def test_nan_is_kept() -> None:
    read = read_operation(Write(run=ONE, metrics=(("psnr", math.nan, 5, 1),)).model_dump_json(), {})
    assert isinstance(read, Write) and math.isnan(read.metrics[0][1])


def test_stand_ins_give_way_to_ids_wherever_they_are() -> None:
    text = Text(run=ONE, path="trials.json", text=f'[["{TWO}"], ["{ONE}"], "x{ONE}"]')
    read = read_operation(text.model_dump_json(), {ONE: "1", TWO: "2"})
    assert read == Text(run="1", path="trials.json", text=f'[["2"], ["1"], "x{ONE}"]')
    assert read_operation(text.model_dump_json(), {TWO: "2"}).run == ONE


def test_stand_ins_differ_and_are_known_as_such() -> None:
    assert ONE != TWO
    assert STAND_IN.fullmatch(ONE)
    assert not STAND_IN.fullmatch("fd83f182bd344f42a150ee22e9837477")
