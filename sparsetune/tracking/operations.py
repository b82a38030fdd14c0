"""One write to a tracking server, as a value that can lie on disk until it is sent, and be sent twice."""

import re
import uuid
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

STAND_IN = re.compile(r"\brun-[0-9a-f]{32}\b")
"""What stands for the id of a run that the server hasn't given yet: `run-` and the run's key."""


def new_stand_in() -> str:
    """Make a stand-in that nobody else has."""
    return f"run-{uuid.uuid4().hex}"


class _Operation(BaseModel):
    # A metric may be NaN or infinite.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    run: str = Field(description="The run's id, or its stand-in.")


class Begin(_Operation):
    """Make a run, unless one with its key is there."""

    kind: Literal["begin"] = "begin"
    experiment_id: str
    name: str | None
    start_ms: int
    tags: dict[str, str]


class Write(_Operation):
    """Write metrics as (name, value, milliseconds since 1970, step), parameters and tags, at most a batch of each."""

    kind: Literal["write"] = "write"
    metrics: tuple[tuple[str, float, int, int], ...] = ()
    params: dict[str, str] = Field(default_factory=dict)
    tags: dict[str, str] = Field(default_factory=dict)


class Text(_Operation):
    """Write a text as the artifact `path`."""

    kind: Literal["text"] = "text"
    path: str
    text: str


class Files(_Operation):
    """Write files, kept beside the operation, to the artifact folder `folder`."""

    kind: Literal["files"] = "files"
    folder: str | None


class Dataset(BaseModel):
    """A data set as MLflow describes one, with the context that it is used in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    digest: str
    source_type: str
    source: str
    profile: str | None = None
    context: str


class Inputs(_Operation):
    """Name the data sets that a run used."""

    kind: Literal["inputs"] = "inputs"
    datasets: tuple[Dataset, ...]


class Model(_Operation):
    """Log a checkpoint, kept beside the operation, as a model of sparsetune's flavour."""

    kind: Literal["model"] = "model"


class Status(_Operation):
    """Set a run's status; with a time, in milliseconds since 1970, it ends then."""

    kind: Literal["status"] = "status"
    status: str
    end_ms: int | None = None


Operation = Begin | Write | Text | Files | Inputs | Model | Status

_ADAPTER: TypeAdapter[Operation] = TypeAdapter(Annotated[Operation, Field(discriminator="kind")])


def read_operation(text: str, ids: Mapping[str, str]) -> Operation:
    """Read an operation from its JSON, with the ids of runs in the place of their stand-ins.

    Args:
        text: as `model_dump_json` wrote it.
        ids: run id by stand-in; a stand-in that isn't there is left.
    """
    return _ADAPTER.validate_json(STAND_IN.sub(lambda found: ids.get(found[0], found[0]), text))
