"""Time that recording a study of 30 trials in MLflow adds, in a SQLite store and on a local tracking server.

    python benchmarks/tracking.py results/demo/eval

The trials are synthetic (nothing is rendered); the events, the policies of 30 layers x 30 heads, the files and the
stores are real. Creating and opening a store takes seconds and is shown separately. The share is relative to a real
tuning run of the demo model, the shortest there is. A thread publishes to the server while the next trial renders; here
it has `PAUSE_SECONDS` for each trial, and its CPU time is included in the CPU column.
"""

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sparsetune.attention.policy import Policy
from sparsetune.checkpoint import Checkpoint, Manifest, save_checkpoint
from sparsetune.config import Config, resolve
from sparsetune.evaluation.events import EvaluationEnded, EvaluationStarted, PromptDone
from sparsetune.evaluation.prompt import PromptResult
from sparsetune.evaluation.result import EvaluationResult, load_result
from sparsetune.tracking import TrackingListener, connect, resolve_store
from sparsetune.tracking.store import KEY
from sparsetune.tuning.events import StudyStarted, TrialResult, TuningResult

DEMO_SECONDS = 140.0
"""Duration of a tuning run of the demo model with default settings, on two cores."""

MAX_SHARE = 0.03
NUM_TRIALS = 30
PAUSE_SECONDS = 0.5
VIDEO_BYTES = 300_000
POLICY = Policy.uniform([(f"transformer.transformer_blocks.{index}.attn1", 30) for index in range(30)])


@dataclass(frozen=True)
class Row:
    """Seconds that the listener took for each event."""

    store: str
    opened: float
    start: float
    trials: list[float]
    evaluation: float
    end: float
    cpu: float

    @property
    def total(self) -> float:
        return self.start + sum(self.trials) + self.evaluation + self.end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="result folder of any `sparsetune eval`")
    options = parser.parse_args()
    result = load_result(options.result)
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure("SQLite", Path(folder) / "local", None, result)]
        with server(Path(folder) / "server") as uri:
            rows.append(measure("server", Path(folder) / "client", uri, result))
    print(table(rows))
    if any(row.total > MAX_SHARE * DEMO_SECONDS for row in rows):
        sys.exit(f"recording takes more than {MAX_SHARE:.0%} of a tuning run")


def measure(name: str, folder: Path, uri: str | None, result: EvaluationResult) -> Row:
    folder.mkdir(parents=True)
    sets = {"tracking.root": str(folder / "mlruns")} | ({"tracking.uri": uri} if uri else {})
    config = resolve(None, (), {}, sets)
    first = TrackingListener(config).recorder
    opened = timed(lambda: first.end(first.begin("warm-up", "trial")))
    cpu = time.process_time()
    listener = TrackingListener(config)
    start = timed(lambda: listener.on_study_start(study(config)))
    outcomes = [trial(number) for number in range(NUM_TRIALS)]
    trials = []
    for outcome in outcomes:
        trials.append(timed(partial(listener.on_trial, outcome)))
        time.sleep(PAUSE_SECONDS)
    send_events = evaluation(folder, result)
    evaluated = timed(lambda: send_events(listener))
    checkpoint = save_checkpoint(Checkpoint(POLICY, Manifest(tuner="optuna")), folder / "checkpoint")
    ended = TuningResult("study", tuple(outcomes), outcomes[0], None, checkpoint, result, Path("none"), DEMO_SECONDS)
    end = timed(lambda: listener.on_study_end(ended))
    cpu = time.process_time() - cpu
    assert listener.recorder.problem is None, listener.recorder.problem
    check_complete(config, listener)
    return Row(name, opened, start, trials, evaluated, end, cpu)


def study(config: Config) -> StudyStarted:
    prompts = tuple(f"prompt {index}" for index in range(4))
    settings = config.model_dump(mode="json")
    return StudyStarted("study", "sqlite:///none", settings, NUM_TRIALS, 0, prompts, 10, Path("results"))


def trial(number: int) -> TrialResult:
    scores = {"frame_cosine": 0.99, "psnr": 36.0 + number / 10, "frame_l1": 0.01, "frame_diff": 0.02, "ssim": 0.9}
    prompts = tuple(PromptResult(f"prompt {index}", 42, scores, sparsity=0.25) for index in range(4))
    params = {f"group_{index}/budget": 0.01 * index for index in range(3)} | {"dense_fraction": 0.2, "order": "tiles"}
    return TrialResult(number, params, "complete", None, POLICY, prompts, 0.25, 36.0, 35.0, 0.99, True, 4.0)


def evaluation(folder: Path, result: EvaluationResult) -> Callable[[TrackingListener], None]:
    videos = []
    for index in range(4):
        videos.append(folder / f"prompt_{index}_compare.mp4")
        videos[-1].write_bytes(os.urandom(VIDEO_BYTES))
    report = folder / "report.md"
    report.write_text("# A report\n\n" + "a line of it\n" * 100)
    prompts = [PromptResult(f"prompt {index}", 42, {"psnr": 36.0}, sparsity=0.25) for index in range(4)]

    def send_events(listener: TrackingListener) -> None:
        config = result.config.model_dump(mode="json") | {"tuned_path": None}
        texts = tuple(prompt.prompt for prompt in prompts)
        listener.on_start(EvaluationStarted(config, texts, 10, ("dense", "sparse"), ("psnr",), folder))
        for index, prompt in enumerate(prompts):
            listener.on_prompt(PromptDone(index, len(prompts), prompt, {"compare": videos[index]}))
        listener.on_end(EvaluationEnded(result, tuple(prompts), None, report, tuple(videos)))

    return send_events


def check_complete(config: Config, listener: TrackingListener) -> None:
    client = connect(resolve_store(config.tracking))
    assert listener.run_id is not None
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    study = listener.run_id
    if listener.recorder.server is not None:
        (copy,) = client.search_runs(experiments, f"tags.`{KEY}` = '{study}'")
        study = copy.info.run_id
    runs = client.search_runs(experiments, f"tags.`mlflow.parentRunId` = '{study}'")
    assert len(runs) == NUM_TRIALS + 1, len(runs)
    assert all(run.info.status == "FINISHED" for run in runs)


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@contextmanager
def server(folder: Path) -> Iterator[str]:
    folder.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"backend-store-uri": f"sqlite:///{folder}/mlflow.db", "artifacts-destination": str(folder / "artifacts")}
    options |= {"host": "127.0.0.1", "port": str(port), "workers": "1"}
    command = [sys.executable, "-m", "mlflow", "server", *(f"--{name}={value}" for name, value in options.items())]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    silent = subprocess.DEVNULL
    process = subprocess.Popen(command, env=os.environ | quiet, stdout=silent, stderr=silent, start_new_session=True)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def table(rows: list[Row]) -> str:
    lines = [
        "| store | open, s | start, s | per trial, ms (median, max) | evaluation, s | end, s | CPU, s "
        "| total without open, s | share |",
        "| --- " * 9 + "|",
    ]
    for row in rows:
        trials = f"{1000 * statistics.median(row.trials):.0f}, {1000 * max(row.trials):.0f}"
        parts = [row.store, f"{row.opened:.1f}", f"{row.start:.2f}", trials, f"{row.evaluation:.2f}", f"{row.end:.2f}"]
        lines.append(f"| {' | '.join(parts)} | {row.cpu:.2f} | {row.total:.2f} | {row.total / DEMO_SECONDS:.1%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
