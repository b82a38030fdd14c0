"""Rendering of the report's HTML page."""

from collections.abc import Mapping, Sequence
from typing import Any

from sparsetune.errors import ResultError
from sparsetune.evaluation.compare import Comparison, compare
from sparsetune.evaluation.result import EvaluationResult
from sparsetune.metrics import chance_of_none, interval_caveat
from sparsetune.report import tables, verdict
from sparsetune.report.charts import Chart
from sparsetune.report.clips import Clip
from sparsetune.report.command import eval_command, tune_command
from sparsetune.report.figures import figures
from sparsetune.report.html import environment, script, script_json, style
from sparsetune.report.interactive import plotly_figure
from sparsetune.report.source import Source
from sparsetune.report.words import Words
from sparsetune.video import DIFFERENCE_GAIN, panes

_SCRIPTS = ("base", "theme", "charts", "player", "controls", "stage", "tables", "trials", "main")
_GROUPS = {
    "sparsity": ("timeline", "sparsity_by_layer_and_step", "sparsity_by_layer_and_head"),
    "thresholds": ("thresholds_cdfthreshd", "thresholds_topk", "thresholds_simthreshd1", "thresholds_pvthreshd"),
    "search": ("pareto_front", "search_history", "importances", "calibration_against_psnr"),
    "ladder": ("error_attribution",),
    "time": ("time_by_phase",),
}
"""Figures by section; `frame_psnr` is under the players instead."""


def render(source: Source, clips: Sequence[Clip], words: Words, note: str = "") -> str:
    """Render HTML that needs no network, and no files but the clips with a link; the others are embedded."""
    from plotly.offline import get_plotlyjs

    charts = _charts(source, words)
    template = environment().get_template("report.html.j2")
    page: str = template.render(
        words=words,
        source=source,
        result=source.evaluation,
        record=source.tuning,
        verdict=verdict,
        tables=tables,
        interval_caveat=interval_caveat,
        chance_of_none=chance_of_none,
        note=note,
        command=_command(source),
        comparison=comparison(source),
        charts=charts,
        data=_data(source, clips, words, charts),
        clips=[clip for clip in clips if clip.href is None],
        stills=_stills(source, clips),
        style=style("style"),
        script=script(*_SCRIPTS),
        plotly=get_plotlyjs(),
    )
    return page


def _command(source: Source) -> str:
    if source.tuning is not None:
        return tune_command(source.tuning)
    return "" if source.evaluation is None else eval_command(source.evaluation)


def comparison(source: Source) -> Comparison | str | None:
    if source.before is None or source.evaluation is None:
        return None
    try:
        return compare(source.before, source.evaluation)
    except ResultError as error:  # not comparable, with the reason
        return str(error)


def _charts(source: Source, words: Words) -> dict[str, list[Chart]]:
    by_name = {chart.name: chart for chart in figures(source, words)}
    return {group: [by_name[name] for name in names if name in by_name] for group, names in _GROUPS.items()}


def _data(source: Source, clips: Sequence[Clip], words: Words, charts: Mapping[str, Sequence[Chart]]) -> str:
    shown = {chart.name: plotly_figure(chart) for group in charts.values() for chart in group}
    trials, best = (source.tuning.trials, source.tuning.best) if source.tuning is not None else ((), None)
    sides = (("after", source.evaluation), ("before", source.before))
    return script_json(
        {
            "words": words.of_scripts(),
            "gain": DIFFERENCE_GAIN,
            "charts": shown,
            "prompts": [one for side, result in sides if result is not None for one in _prompts(side, result, clips)],
            "trials": {str(trial.number): tables.trial_details(trial, best, words) for trial in trials},
            "best": best,
        }
    )


def _prompts(side: str, result: EvaluationResult, clips: Sequence[Clip]) -> list[dict[str, Any]]:
    hrefs = {clip.index: clip.href for clip in clips if clip.side == side}
    boxes = [[box.left, box.top, box.width, box.height] for box in panes(result.config.height, result.config.width, 2)]
    return [
        {
            "key": f"{side}-{row.index}",
            "side": side,
            "index": row.index,
            "prompt": row.prompt,
            "psnr": row.psnr,
            "worst": row.worst_frame,
            "frames": [round(value, 3) for value in row.psnr_per_frame or ()],
            "count": result.config.num_frames,
            "fps": result.config.fps,
            "boxes": boxes,
            "clip": row.index in hrefs,
            "href": hrefs.get(row.index),
        }
        for row in result.detailed_results
        if row.error is None and (row.psnr_per_frame or row.index in hrefs)
    ]


def _stills(source: Source, clips: Sequence[Clip]) -> list[tuple[int, str]]:
    """Stills as base64, where there are no videos."""
    stills = {} if clips else source.files.stills
    return [(index, Clip("after", index, path).encoded()) for index, path in stills.items()]
