"""HTML reports of runs: logged when a run ends, and built from a recorded run."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sparsetune.config import Config
from sparsetune.errors import ReportError, TrackingError
from sparsetune.evaluation.events import EvaluationEnded
from sparsetune.files import scratch_folder
from sparsetune.report.build import build_report, check_extra
from sparsetune.report.figures import figures
from sparsetune.report.pictures import save_pictures
from sparsetune.report.source import Files, Source, from_folder, of_tuning
from sparsetune.report.words import words
from sparsetune.tracking.lookup import ModelReference, evaluations_of, find_run, find_version, kind_of
from sparsetune.tracking.registry import EVALUATION
from sparsetune.tracking.results import evaluation_of, read_result
from sparsetune.tracking.run_logger import RunLogger
from sparsetune.tracking.store import cause_of, store_errors
from sparsetune.tuning.events import TuningResult
from sparsetune.tuning.record import RECORD_NAME, load_record

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as FoundRun

_LOG = logging.getLogger(__name__)

REPORT = "report.html"
FIGURES = "figures"


class ReportLogger:
    """Logs the report of each run that ends; a report that fails ends neither the search nor its recording."""

    def __init__(self, config: Config) -> None:
        self._wanted = config.tracking.enabled and config.tracking.report

    def evaluation(self, run: RunLogger, event: EvaluationEnded) -> None:
        """Log an evaluation's report; videos that don't fit in are links to the run's."""
        folder = event.result_path.parent if event.result_path is not None else None
        files = Files.of(folder) if folder is not None else Files()
        name = folder.name if folder is not None else run.run_id[:8]
        self._log(run, lambda: Source(name, event.result, files=files), linked=True)

    def tuning(self, run: RunLogger, result: TuningResult) -> None:
        path = result.record_path
        if path is not None:
            self._log(run, lambda: from_folder(path))

    def _log(self, run: RunLogger, make: Callable[[], Source], *, linked: bool = False) -> None:
        if not self._wanted:
            return
        try:
            check_extra()
        except ReportError as missing:
            self._wanted = False
            _LOG.warning("runs are recorded without a report: %s", missing)
            return
        try:
            log_report(run, make(), linked=linked)
        except Exception as error:  # a broken chart must not end a search of hours
            run_id, cause = run.run_id[:8], cause_of(error)
            _LOG.warning("run %s is recorded without a report: %s", run_id, cause, exc_info=_debugging())


def log_report(run: RunLogger, source: Source, *, linked: bool = False) -> None:
    """Log `report.html` and `figures/`; if `linked`, videos that don't fit in link to the run's `videos/`."""
    links = {path: f"videos/{path.name}" for path in source.files.videos.values()} if linked else None
    with scratch_folder() as folder:
        path = folder / REPORT
        build_report(source, path, links=links)
        save_pictures(figures(source, words("en")), folder / FIGURES)
        run.log_file(path)
        for beside in sorted(one for one in folder.iterdir() if one.is_dir()):
            run.log_file(beside, beside.name)


def source_of(client: "MlflowClient", reference: str, folder: Path, model: str | None = None) -> Source:
    """Read what a report needs from a recorded run or registered version; videos are downloaded to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    run = _find(client, reference, model)
    if kind_of(run) != "tuning":
        return _of_evaluation(client, evaluation_of(client, run), folder)
    run_id = str(run.info.run_id)
    sides = evaluations_of(client, run_id)
    for side in ("tuned", "default"):
        if side in sides:
            _download(client, str(sides[side].info.run_id), folder / side)
    with store_errors(f"read the artifacts of run {run_id}"):
        if RECORD_NAME in [one.path for one in client.list_artifacts(run_id)]:
            record = load_record(Path(client.download_artifacts(run_id, RECORD_NAME, str(folder))))
            return of_tuning(record, run_id[:8], folder / "tuned", folder / "default")
    return _without_record(client, run, folder)


def _find(client: "MlflowClient", reference: str, model: str | None) -> "FoundRun":
    if not reference.startswith("models:/"):
        return find_run(client, reference.removeprefix("runs:").strip("/"), model)
    version = find_version(client, ModelReference.parse(reference))
    if EVALUATION not in version.tags:
        raise TrackingError(f"{reference} was not promoted by sparsetune; give a run")
    return find_run(client, version.tags[EVALUATION])


def _of_evaluation(client: "MlflowClient", run: "FoundRun", folder: Path) -> Source:
    run_id = str(run.info.run_id)
    result = read_result(client, run_id)
    _download(client, run_id, folder)
    return Source(run_id[:8], result, files=Files.of(folder))


def _without_record(client: "MlflowClient", run: "FoundRun", folder: Path) -> Source:
    sides = evaluations_of(client, str(run.info.run_id))
    after = evaluation_of(client, run)
    before = read_result(client, str(sides["default"].info.run_id)) if "default" in sides else None
    return Source(
        str(run.info.run_id)[:8],
        read_result(client, str(after.info.run_id)),
        before,
        files=Files.of(folder / "tuned"),
        files_before=Files.of(folder / "default"),
    )


def _download(client: "MlflowClient", run_id: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with store_errors(f"read the artifacts of run {run_id}"):
        there = {one.path for one in client.list_artifacts(run_id)}
        for name in ("videos", "stills"):
            if name in there:
                client.download_artifacts(run_id, name, str(folder))


def _debugging() -> bool:
    return _LOG.isEnabledFor(logging.DEBUG)
