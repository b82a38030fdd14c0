"""The page of a blind review: dense and sparse as A and B in the report's players."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sparsetune.evaluation.result import EvaluationResult
from sparsetune.report.html import environment, script, script_json, style
from sparsetune.report.words import Words
from sparsetune.video import DIFFERENCE_GAIN, panes

Letter = Literal["a", "b"]


def render_review(
    result: EvaluationResult,
    sparse: Mapping[int, Letter],
    items: Sequence[str],
    words: Words,
    *,
    run_id: str,
    reviewer: str,
    note: str = "",
) -> str:
    """Render HTML that loads each prompt's side-by-side video from INDEX.mp4, and posts the answers to `review`.

    `sparse` has the letter of the sparse video by prompt index, in the order in which prompts are shown; `items` are
    what the two are compared in, whose texts are in the catalogues.
    """
    rows = {row.index: row for row in result.detailed_results}
    data = {
        "words": words.of_scripts(),
        "gain": DIFFERENCE_GAIN,
        "items": list(items),
        "prompts": [
            _prompt(result, index, rows[index].prompt, rows[index].worst_frame, letter)
            for index, letter in sparse.items()
        ],
    }
    page: str = (
        environment()
        .get_template("review.html.j2")
        .render(
            words=words,
            config=result.config,
            items=items,
            run_id=run_id,
            reviewer=reviewer,
            note=note,
            data=script_json(data),
            style=style("style", "review"),
            script=script("base", "theme", "player", "controls", "review"),
        )
    )
    return page


def _prompt(result: EvaluationResult, index: int, prompt: str, worst: int | None, sparse: Letter) -> dict[str, Any]:
    config = result.config
    boxes = [[box.left, box.top, box.width, box.height] for box in panes(config.height, config.width, 2)]
    return {
        "prompt": prompt,
        "sparse": sparse,
        "boxes": boxes if sparse == "b" else boxes[::-1],  # the video has dense on the left
        "frames": [],
        "worst": worst,
        "count": config.num_frames,
        "fps": config.fps,
        "clip": True,
        "href": f"{index}.mp4",
    }
