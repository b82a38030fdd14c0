from dataclasses import replace

from sparsetune.cli.live.phase import Phase


def test_the_rest_takes_as_long_a_unit_as_what_was_done() -> None:
    phase = replace(Phase("probe").begin(100.0, 40.0), done=10.0)
    assert phase.fraction == 0.25
    assert phase.pace(120.0) == 2.0
    assert phase.seconds_left(120.0) == 60.0


def test_what_an_earlier_run_did_is_done_but_has_no_part_in_the_pace() -> None:
    phase = replace(Phase("probe").begin(100.0, 40.0, kept=20.0), done=30.0)
    assert phase.fraction == 0.75
    assert phase.pace(120.0) == 2.0
    assert phase.seconds_left(120.0) == 20.0


def test_nothing_is_foretold_before_anything_was_done_or_of_a_whole_that_is_not_known() -> None:
    assert Phase("judge").begin(0.0, 10.0).seconds_left(5.0) is None
    assert replace(Phase("judge").begin(0.0), done=3.0).seconds_left(5.0) is None


def test_it_begins_and_ends_once() -> None:
    phase = Phase("judge").end(1.0).begin(2.0, 10.0).begin(3.0, 20.0)
    assert (phase.started, phase.total, phase.running) == (2.0, 10.0, True)
    ended = phase.end(7.0).end(9.0)
    assert (ended.ended, ended.running, ended.seconds(100.0)) == (7.0, False, 5.0)
