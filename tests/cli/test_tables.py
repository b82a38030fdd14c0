from sparsetune.cli.tables import metric_text, statistics_table, table_text, value_text
from sparsetune.metrics import summarize


def test_columns_are_as_wide_as_their_widest_cell_and_numbers_end_together() -> None:
    assert table_text((("metric", "mean"), [["psnr (dB)", "37.82"], ["ssim", "0.9"]])).splitlines() == [
        "metric      mean",
        "----------------",
        "psnr (dB)  37.82",
        "ssim         0.9",
    ]


def test_decimals_follow_the_unit() -> None:
    assert value_text("psnr", 37.8249) == "37.82"
    assert value_text("frame_cosine", 0.98543219) == "0.985432"
    assert metric_text("psnr", 37.8249) == "psnr 37.82 dB"


def test_metric_that_is_not_registered_here_has_no_unit() -> None:
    assert metric_text("made_elsewhere", 0.25) == "made_elsewhere 0.250000"


def test_statistics_have_mean_std_min_max_and_interval() -> None:
    head, rows = statistics_table({"psnr": summarize([30.0, 40.0])})
    assert head[:5] == ("metric", "mean", "std", "min", "max")
    assert rows[0][:5] == ["psnr (dB)", "35.00", "7.07", "30.00", "40.00"]
