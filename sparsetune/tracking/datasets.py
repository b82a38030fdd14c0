"""A prompt set as a data set that a run used."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from sparsetune.checkpoint.manifest import hash_prompts
from sparsetune.tracking.operations import Dataset
from sparsetune.tracking.sending import dataset_input

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

MAX_DIGEST = 36
"""MLflow's limit."""


def prompt_set(prompts: Sequence[str], file: str | None, context: Literal["tuning", "evaluation"]) -> "DatasetInput":
    """DescribeSession prompts as a data set; its digest begins as `hash_prompts` of them does.

    Args:
        prompts: in order.
        file: where they come from; None where that isn't known.
        context: what they are used for, shown in MLflow's UI.
    """
    whole = hash_prompts(prompts)
    return dataset_input(
        Dataset(
            name=f"{context} prompts",
            digest=whole[:MAX_DIGEST],
            source_type="local",
            source=json.dumps({"uri": file or "unknown"}),
            profile=json.dumps({"num_rows": len(prompts), "prompts_hash": whole}),
            context=context,
        )
    )
