"""The figures: their data, as Plotly and matplotlib draw them."""

from pathlib import Path

import plotly.graph_objects as go
import pytest
from PIL import Image

from sparsetune.report.charts import Bars, HeatMap, Plot
from sparsetune.report.figures import figures, front, timeline
from sparsetune.report.interactive import plotly_figure
from sparsetune.report.pictures import save_pictures
from sparsetune.report.source import Source
from sparsetune.report.tables import trial_table
from sparsetune.report.words import words
from sparsetune.tuning.record import TrialSection
from tests.report.synthetic import record_of, result_of, source_of

NAMES = (
    "frame_psnr", "sparsity_by_layer_and_step", "sparsity_by_layer_and_head", "thresholds_cdfthreshd", "pareto_front",
    "search_history", "importances", "calibration_against_psnr", "error_attribution", "time_by_phase",
)  # fmt: skip


def test_a_tuning_has_every_figure() -> None:
    assert tuple(chart.name for chart in figures(source_of(), words("en"))) == NAMES


def test_an_evaluation_has_those_of_its_own() -> None:
    charts = figures(Source("after", result_of()), words("en"))
    assert [chart.name for chart in charts] == [*NAMES[:4], *NAMES[-2:]]


def test_a_search_without_a_winner_has_those_of_the_search() -> None:
    charts = figures(Source("demo", None, tuning=record_of()), words("en"))
    assert [chart.name for chart in charts] == [*NAMES[4:8], "time_by_phase"]


def test_plotly_knows_every_key_of_every_figure() -> None:
    for chart in figures(source_of(), words("en")):
        figure = go.Figure(plotly_figure(chart))
        assert len(figure.data) > 0
        assert len(chart.alt) > 20


def test_the_figures_are_the_same_in_both_languages() -> None:
    def numbers(chart: Plot | HeatMap | Bars) -> object:
        match chart:
            case Plot():
                return [(series.role, series.x, series.y, series.ids) for series in chart.series]
            case HeatMap():
                return chart.values
            case Bars():
                return [(role, values) for _, role, values in chart.parts]

    english, chinese = (figures(source_of(), words(language)) for language in ("en", "zh"))  # type: ignore[arg-type]
    assert [numbers(chart) for chart in english] == [numbers(chart) for chart in chinese]
    assert all(one.title != other.title for one, other in zip(english, chinese, strict=True))


def test_heat_maps_hold_the_results_own_numbers() -> None:
    result = result_of()
    by_step, by_head = (chart for chart in figures(Source("x", result), words("en")) if isinstance(chart, HeatMap))
    assert by_step.values == tuple(result.sparsity.by_layer_and_step.values())
    assert by_head.values == tuple(result.sparsity.by_head.values())


def test_a_kernel_that_does_not_tell_its_heads_apart_has_no_map_by_head() -> None:
    result = result_of()
    sparsity = result.sparsity.model_copy(update={"by_head": {}})
    charts = figures(Source("x", result.model_copy(update={"sparsity": sparsity})), words("en"))
    assert [chart.name for chart in charts if isinstance(chart, HeatMap)] == ["sparsity_by_layer_and_step"]


def test_what_was_measured_in_seconds_is_shown_by_its_speedup() -> None:
    record = record_of()
    timed = [
        trial.model_copy(update={"sparsity": 0.0, "seconds_dense": 2.0, "seconds_sparse": 1.0 + trial.number / 10})
        for trial in record.trials
    ]
    record = record.model_copy(update={"trials": tuple(timed)})
    charts = {chart.name: chart for chart in figures(Source("x", None, tuning=record), words("en"))}
    pareto, history = charts["pareto_front"], charts["search_history"]
    assert isinstance(pareto, Plot) and isinstance(history, Plot)
    assert pareto.title == "Speed-up against PSNR, one point per trial"
    (winner,) = (series for series in pareto.series if series.role == "best")
    assert winner.x == (2.0 / (1.0 + winner.ids[0] / 10),)
    fastest = max(2.0 / (1.0 + trial.number / 10) for trial in timed if trial.feasible)
    assert f"the best that met the gate reached {fastest:.2f}×" in history.alt
    assert (pareto.x.title, history.y.title) == ("times as fast as dense",) * 2
    assert front(timed)[0].number == min(trial.number for trial in timed if trial.state == "complete")
    table = trial_table(record, words("en"))
    assert [head.text for head in table.heads[2:4]] == ["speed-up", "blocks run"]
    assert "speed-up" not in [head.text for head in trial_table(record_of(), words("en")).heads]


def test_no_trial_beats_one_on_the_front() -> None:
    trials = record_of(60).trials
    found = front(trials)

    def beaten(trial: TrialSection) -> bool:
        complete = [other for other in trials if other.state == "complete"]
        return any(
            (other.sparsity or 0) >= (trial.sparsity or 0)
            and (other.psnr or 0) >= (trial.psnr or 0)
            and (other.sparsity, other.psnr) != (trial.sparsity, trial.psnr)
            for other in complete
        )

    assert {trial.number for trial in found} == {
        trial.number for trial in trials if trial.state == "complete" and not beaten(trial)
    }


def test_every_trial_that_rendered_is_a_point_once() -> None:
    record = record_of(40)
    (pareto,) = (
        chart for chart in figures(Source("x", None, tuning=record), words("en")) if chart.name == "pareto_front"
    )
    assert isinstance(pareto, Plot)
    points = [number for series in pareto.series for number in series.ids]
    assert sorted(points) == [trial.number for trial in record.trials if trial.psnr is not None]
    (best,) = (series for series in pareto.series if series.role == "best")
    assert best.ids == (record.best,)


def test_the_gate_of_trials_is_a_line_through_the_trade_off() -> None:
    config = {"gate": {"min_psnr": 35.0}, "tune": {"margin_db": 1.5}}
    record = record_of().model_copy(update={"config": config})
    pareto = next(one for one in figures(Source("x", None, tuning=record), words("en")) if one.name == "pareto_front")
    assert isinstance(pareto, Plot)
    (gate,) = (series for series in pareto.series if series.role == "bad")
    sparsities = [trial.sparsity for trial in record.trials if trial.sparsity is not None and trial.psnr is not None]
    assert (gate.name, gate.y, gate.line) == ("trials must exceed 36.5 dB", (36.5, 36.5), True)
    assert gate.x == (min(sparsities), max(sparsities))


def test_a_single_parameter_has_no_importance() -> None:
    record = record_of()
    assert record.insight is not None
    alone = record.insight.model_copy(update={"importances": {"l1": 1.0}})
    charts = figures(Source("x", None, tuning=record.model_copy(update={"insight": alone})), words("en"))
    assert "importances" not in [chart.name for chart in charts]


def test_phases_of_an_older_record_keep_their_names() -> None:
    record = record_of().model_copy(update={"seconds_by_phase": {"calibration": 18.0, "probes": 47.0, "judging": 69.0}})
    (*_, phases) = figures(Source("x", None, tuning=record), words("en"))
    assert isinstance(phases, Bars)
    assert phases.labels == ("calibration", "probes", "judging")


def test_pictures_of_all_figures_are_drawn(tmp_path: Path) -> None:
    charts = figures(source_of(), words("en"))
    paths = save_pictures(charts, tmp_path / "figures")
    assert [path.stem for path in paths] == list(NAMES)
    for path, chart in zip(paths, charts, strict=True):
        with Image.open(path) as picture:
            assert picture.text["Description"] == chart.alt
            assert len(picture.convert("L").getcolors() or ()) > 20
            assert picture.width == 880


@pytest.mark.parametrize("seconds", [{}, {"trials": 0.0}])
def test_a_search_that_took_no_time_has_no_time_figure(seconds: dict[str, float]) -> None:
    record = record_of().model_copy(update={"seconds_by_phase": seconds})
    assert "time_by_phase" not in [chart.name for chart in figures(Source("x", None, tuning=record), words("en"))]


def test_the_timeline_tells_which_steps_a_cache_skipped() -> None:
    result = result_of()
    part = result.sparsity.model_copy(update={"blocks_run_by_step": (1.0, 0.5, 1.0), "by_step": (0.0, 0.75, 0.25)})
    policy = result.config.policy.model_copy(update={"cache": "mag 0.1, max_skips 1"})
    config = result.config.model_copy(update={"policy": policy})
    cached = result.model_copy(update={"sparsity": part, "config": config})
    chart = timeline(cached, words("en"))
    assert chart is not None
    assert [(one.x, one.y) for one in chart.series] == [((1, 2, 3), (1.0, 0.5, 1.0)), ((1, 2, 3), (1.0, 0.25, 0.75))]
    assert "mag 0.1, max_skips 1 skips blocks in steps 2" in chart.alt
    assert timeline(result, words("en")) is None
