"""Writing one MLflow run, in batches."""

import getpass
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparsetune.checkpoint.manifest import git_commit, hash_prompts, versions
from sparsetune.tracking.store import KEY, KIND, PARENT, paged, store_errors

if TYPE_CHECKING:
    import mlflow
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Metric

Status = Literal["FINISHED", "FAILED", "KILLED"]

METRICS_PER_BATCH = 1000
ENTRIES_PER_BATCH = 100
MAX_PARAM = 6000
MAX_TAG = 8000
MAX_NAME = 250
"""MLflow's limits: entries per batch, characters of a parameter, tag and name."""

NOTE = "mlflow.note.content"
TABLES = "mlflow.loggedArtifacts"


@dataclass(frozen=True)
class RunLogger:
    """Writes one run. Every method raises TrackingError when the store fails."""

    client: "MlflowClient"
    run_id: str
    start_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000, compare=False)  # since 1970
    tables: list[str] | None = field(default=None, compare=False)  # None: to be read first

    def log(
        self,
        metrics: "Mapping[str, float | None] | Sequence[Metric] | None" = None,
        *,
        step: int = 0,
        params: Mapping[str, object] | None = None,
        tags: Mapping[str, object] | None = None,
        tables: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    ) -> None:
        """Write metrics, parameters, tags and tables in as few calls as MLflow's limits allow.

        None is left out, and sequences are joined by commas. A parameter or tag that is too long for MLflow is cut,
        with a note, and is written whole as an artifact under `long/`. `tables` has rows by artifact name, which
        MLflow's UI shows; the columns are those of all rows, in order.
        """
        from mlflow.entities import Param, RunTag

        listed = self._write_tables(tables) if tables else {}
        whole_params = {fit_name(key): text(value) for key, value in (params or {}).items() if value is not None}
        whole_tags = {fit_name(key): text(value) for key, value in (tags or {}).items() if value is not None}
        self.batch(
            metric_entries(metrics, step) if isinstance(metrics, Mapping) else metrics or (),
            [Param(key, self._fitted(key, value, MAX_PARAM)) for key, value in whole_params.items()],
            [RunTag(key, self._fitted(key, value, MAX_TAG)) for key, value in (whole_tags | listed).items()],
        )

    def batch(self, metrics: "Sequence[Metric]", params: Sequence[Any] = (), tags: Sequence[Any] = ()) -> None:
        with self._errors():
            while metrics or params or tags:
                self.client.log_batch(
                    self.run_id,
                    metrics=metrics[: METRICS_PER_BATCH - 2 * ENTRIES_PER_BATCH],
                    params=params[:ENTRIES_PER_BATCH],
                    tags=tags[:ENTRIES_PER_BATCH],
                    synchronous=True,
                )
                metrics = metrics[METRICS_PER_BATCH - 2 * ENTRIES_PER_BATCH :]
                params, tags = params[ENTRIES_PER_BATCH:], tags[ENTRIES_PER_BATCH:]

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """Copy a file, or all files of a folder, to the run's artifacts, under `folder` there."""
        with self._errors():
            if path.is_dir():
                self.client.log_artifacts(self.run_id, str(path), folder)
            else:
                self.client.log_artifact(self.run_id, str(path), folder)

    def log_json(self, value: Mapping[str, Any], name: str) -> None:
        with self._errors():
            self.client.log_dict(self.run_id, dict(value), name)

    def describe(self, markdown: str, whole: str) -> None:
        """Set the run's description; what is too long is cut at a line and points to the artifact `whole`."""
        if len(markdown) > MAX_TAG:
            more = f"\n\n… the rest is in the artifact {whole}"
            markdown = markdown[: MAX_TAG - len(more)].rpartition("\n")[0] + more
        self.log(tags={NOTE: markdown})

    def log_inputs(self, datasets: "Sequence[DatasetInput]") -> None:
        with self._errors():
            self.client.log_inputs(self.run_id, list(datasets))

    def reopen(self) -> None:
        with self._errors():
            self.client.update_run(self.run_id, status="RUNNING")

    def params(self) -> dict[str, str]:
        with self._errors():
            return dict(self.client.get_run(self.run_id).data.params)

    def children(self) -> "list[mlflow.entities.Run]":
        with self._errors():
            experiment = self.client.get_run(self.run_id).info.experiment_id
            query = f"tags.`{PARENT}` = '{self.run_id}'"
            return list(paged(self.client.search_runs, experiment_ids=[experiment], filter_string=query))

    def finish(self, status: Status = "FINISHED") -> None:
        with self._errors():
            self.client.set_terminated(self.run_id, status)

    def amend(self, tags: Mapping[str, object]) -> None:
        """Tag a run that has ended; its end moves by a millisecond, so that it is published again."""
        with self._errors():
            info = self.client.get_run(self.run_id).info
            self.log(tags=tags)
            self.client.set_terminated(self.run_id, info.status, (info.end_time or 0) + 1)

    def fail(self, error: BaseException) -> None:
        """End the run with its cause: KILLED by Ctrl-C or an exit, else FAILED."""
        cause = next(iter(str(error).splitlines()), "")
        self.log(tags={"error": f"{type(error).__name__}: {cause}" if cause else type(error).__name__})
        self.finish("FAILED" if isinstance(error, Exception) else "KILLED")

    def _write_tables(self, tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
        """Return the tag that lists all tables of the run. `log_table` would import pandas for a few rows."""
        with self._errors():
            for name, rows in tables.items():
                columns = list(dict.fromkeys(column for row in rows for column in row))
                data = [[row.get(column) for column in columns] for row in rows]
                self.client.log_text(self.run_id, json.dumps({"columns": columns, "data": data}), name)
            known = self._read_tables() if self.tables is None else self.tables
        known += [name for name in tables if name not in known]
        return {TABLES: json.dumps([{"path": name, "type": "table"} for name in known])}

    def _read_tables(self) -> list[str]:
        return table_names(self.client.get_run(self.run_id).data.tags)

    def _fitted(self, key: str, value: str, limit: int) -> str:
        if len(value) <= limit:
            return value
        name = f"long/{re.sub(r'[^-.0-9A-Za-z_]', '_', key)}.txt"
        with self._errors():
            self.client.log_text(self.run_id, value, name)
        more = f"… (cut; whole in the artifact {name})"
        return value[: limit - len(more)] + more

    def _errors(self) -> Any:
        return store_errors(f"write to run {self.run_id}")


def start_run(
    client: "MlflowClient",
    experiment_id: str,
    name: str,
    *,
    kind: str,
    parent: RunLogger | None = None,
    tags: Mapping[str, object] | None = None,
    start_ms: int | None = None,
) -> RunLogger:
    written: dict[str, object] = {KIND: kind, **(tags or {})}
    if parent is None:
        written |= environment_tags()
    else:
        written[PARENT] = parent.run_id
    fitting = {fit_name(key): text(value)[:MAX_TAG] for key, value in written.items() if value is not None}
    with store_errors("begin a run"):
        start_ms = start_ms or time.time_ns() // 1_000_000
        created = client.create_run(experiment_id, start_time=start_ms, tags=fitting, run_name=name)
    return RunLogger(client, str(created.info.run_id), start_ms, [])


def find_study(client: "MlflowClient", experiment_id: str, study: str, key: str | None = None) -> RunLogger | None:
    """Find a study's run: the newest one, or the one with a key or id."""
    filters = [""] if key is None else [f" and attributes.run_id = '{key}'", f" and tags.`{KEY}` = '{key}'"]
    for condition in filters:
        with store_errors("read runs"):
            found = client.search_runs(
                [experiment_id],
                f"tags.`{KIND}` = 'tuning' and tags.study = \"{study_tag(study)}\"{condition}",
                max_results=1,
                order_by=["attributes.start_time DESC"],
            )
        if found:
            (run,) = found
            return RunLogger(client, str(run.info.run_id), run.info.start_time, table_names(run.data.tags))
    return None


def table_names(tags: Mapping[str, str]) -> list[str]:
    return [entry["path"] for entry in json.loads(tags.get(TABLES, "[]"))]


def study_tag(study: str) -> str:
    """Replace double quotes, which MLflow's search can't escape."""
    return study.replace('"', "'")


def environment_tags() -> dict[str, object]:
    tags: dict[str, object] = {
        "mlflow.user": user_name(),
        "mlflow.source.name": "sparsetune",
        "mlflow.source.type": "LOCAL",
    }
    commit = git_commit()
    if commit is not None:
        tags["mlflow.source.git.commit"] = commit
    return tags | {f"version.{package}": version for package, version in versions().items()}


def metric_entries(metrics: Mapping[str, float | None], step: int = 0) -> "list[Metric]":
    """Convert to MLflow's metrics, to six digits and all with the current time; None is left out."""
    from mlflow.entities import Metric

    now = time.time_ns() // 1_000_000
    return [
        Metric(fit_name(key), float(f"{value:.6g}"), now, step) for key, value in metrics.items() if value is not None
    ]


def text(value: object) -> str:
    """Format a value for MLflow: booleans in lower case, sequences joined by commas."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, Iterable) and not isinstance(value, str | Mapping):
        return ", ".join(text(item) for item in value)
    return str(value)


def fit_name(name: str) -> str:
    """Return a name that MLflow accepts: other characters become `_`, and a long one is cut."""
    return re.sub(r"[^-/.0-9A-Za-z_ ]", "_", name)[:MAX_NAME]


def user_name() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no such user in a container
        return "unknown"


MAX_DIGEST = 36
"""MLflow's limit."""


def prompt_set(prompts: Sequence[str], file: str | None, context: Literal["tuning", "evaluation"]) -> "DatasetInput":
    """Describe prompts as a data set; its digest begins as `hash_prompts` of them does."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    whole = hash_prompts(prompts)
    dataset = Dataset(
        f"{context} prompts",
        whole[:MAX_DIGEST],
        source_type="local",
        source=json.dumps({"uri": file or "unknown"}),
        profile=json.dumps({"num_rows": len(prompts), "prompts_hash": whole}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])
