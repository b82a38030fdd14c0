import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from sparsetune.config import Config, TrackingConfig, resolve
from sparsetune.evaluation.events import EvaluationEnded, EvaluationStarted, PromptDone
from sparsetune.evaluation.prompt import PromptResult
from sparsetune.evaluation.result import EvaluationResult
from sparsetune.tracking import Store, connect, resolve_store

LAYERS = tuple(f"transformer.transformer_blocks.{index}.attn1" for index in range(3))


@pytest.fixture(scope="session")
def root(migrated_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the session's shared store."""
    root = tmp_path_factory.mktemp("mlruns")
    shutil.copy(migrated_database, root / "mlflow.db")
    return root


@pytest.fixture(scope="session")
def store(root: Path) -> Store:
    return resolve_store(tracking(root=root), {})


@pytest.fixture(scope="session")
def client(store: Store) -> MlflowClient:
    return connect(store)


@pytest.fixture
def experiment(request: pytest.FixtureRequest) -> str:
    """A separate experiment for the test."""
    return f"tests/{request.node.name}"


@pytest.fixture
def config(root: Path, experiment: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Config]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    yield resolve(
        None, (), {}, {"tracking.root": str(root), "tracking.experiment": experiment, "tracking.report": "no"}
    )


def tracking(**values: object) -> TrackingConfig:
    return TrackingConfig.model_validate(values)


def runs_of(client: MlflowClient, experiment: str) -> list[Run]:
    """All runs of an experiment, in order of their start."""
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return list(client.search_runs([found.experiment_id], order_by=["attributes.start_time ASC"]))


def artifacts_of(client: MlflowClient, run_id: str, folder: str | None = None) -> list[str]:
    return [artifact.path for artifact in client.list_artifacts(run_id, folder)]


def make_prompt(index: int, psnr: float) -> PromptResult:
    metrics = {"frame_cosine": 0.99, "frame_l1": 0.01, "psnr": psnr, "frame_diff": 0.02}
    return PromptResult(
        prompt=f"a red circle, number {index}",
        seed=42,
        metrics=metrics,
        sparsity=0.25,
        sparsity_active=0.5,
        seconds_dense=3.0,
        seconds_sparse=2.0,
    )


def make_result(psnrs: tuple[float, ...] = (36.0, 40.0), **changes: Any) -> EvaluationResult:
    """A complete result, as from an evaluation of the demo model."""
    prompts = [make_prompt(index, psnr) for index, psnr in enumerate(psnrs)]
    spread = {"mean": 0.98, "min": 0.98, "max": 0.98}
    value: dict[str, Any] = {
        "config": {
            "model_name": "demo",
            "short_name": "demo",
            "use_tuned": True,
            "num_prompts": len(psnrs),
            "seed": 42,
            "tuned_path": None,
            "tuner": "optuna",
            "model": {
                "source": "demo",
                "revision": None,
                "fingerprint": "f" * 64,
                "pipeline_class": "CogVideoXPipeline",
                "transformer_class": "CogVideoXTransformer3DModel",
                "num_layers": 3,
                "num_heads": 9,
            },
            "height": 128,
            "width": 128,
            "num_frames": 17,
            "fps": 8,
            "num_inference_steps": 10,
            "guidance_scale": 2.5,
            "negative_prompt": "",
            "max_sequence_length": None,
            "scheduler": "CogVideoXDDIMScheduler",
            "dtype": "float32",
            "device": "cpu",
            "vae_tiling": False,
            "backend": "reference",
            "policy": {
                "digest": "d" * 64,
                "rule": "cdf",
                "num_layers": 3,
                "num_heads": 9,
                "num_sparse_heads": 9,
                "simthreshd1": spread,
                "cdfthreshd": spread,
                "topk": None,
                "pvthreshd": spread,
                "dense_fraction": 0.2,
                "order": "raster",
                "keep_text": True,
            },
            "metrics": ("frame_cosine", "frame_l1", "psnr", "frame_diff"),
            "prompt_file": "eval.txt",
            "prompts_hash": "a" * 64,
            "prompts_in_tune_set": (),
        },
        "statistics": {
            "psnr": {"mean": 38.0, "std": 2.0, "min": 36.0, "max": 40.0, "ci95_low": 36.0, "ci95_high": 40.0}
        },
        "detailed_results": [
            {"index": index, "prompt": prompt.prompt, "seed": 42, **prompt.metrics, "sparsity": 0.25}
            for index, prompt in enumerate(prompts)
        ],
        "overall_score": 85,
        "verdict": "good",
        "gate": {"passed": False, "failures": ("psnr is too low",), "conditions": ()},
        "sparsity": {
            "overall": 0.25,
            "active": 0.5,
            "theoretical_speedup": 1.33,
            "measured_speedup": 1.5,
            "seconds_dense": 3.0,
            "seconds_sparse": 2.0,
            "by_layer": {name: 0.1 * index for index, name in enumerate(LAYERS)},
            "by_step": (0.0, 0.5),
            "by_layer_and_step": {},
            "by_head": {},
            "kernels": dict.fromkeys(LAYERS, "reference"),
            "num_calls": {"sparse": 6, "dense": 3, "fallback": 0},
            "fallbacks": {},
        },
        "environment": {
            "created": "2026-11-22T10:00:00+00:00",
            "platform": "Linux",
            "device_name": "CPU",
            "num_threads": 2,
            "versions": {},
            "git_commit": None,
            "seconds_total": 12.0,
            "seconds_generation": 10.0,
        },
    }
    return EvaluationResult.model_validate(value | changes)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The events and files of one evaluation."""

    start: EvaluationStarted
    prompts: tuple[PromptDone, ...]
    end: EvaluationEnded


@pytest.fixture
def evaluation(tmp_path: Path) -> Evaluation:
    return make_evaluation(tmp_path / "results")


def make_evaluation(folder: Path, **config: Any) -> Evaluation:
    result = make_result()
    (folder / "videos").mkdir(parents=True)
    (folder / "stills").mkdir()
    videos = [folder / "videos" / f"prompt_{index}_compare.mp4" for index in range(2)]
    still = folder / "stills" / "prompt_0_frame_3.png"
    for path in (*videos, still):
        path.write_bytes(path.name.encode())
    result_path, report_path = folder / "demo_accuracy_tuned.json", folder / "report.md"
    result_path.write_text(result.model_dump_json())
    report_path.write_text("# demo, tuned\n\n| psnr | 38.0 |\n")
    prompts = tuple(make_prompt(index, psnr) for index, psnr in enumerate((36.0, 40.0)))
    return Evaluation(
        EvaluationStarted(
            config=result.config.model_dump(mode="json") | config,
            prompts=tuple(prompt.prompt for prompt in prompts),
            num_steps=10,
            renderings=("dense", "sparse"),
            metrics=("psnr",),
            output_dir=folder,
        ),
        tuple(
            PromptDone(index, 2, prompt, {"compare": videos[index], "dense": videos[index]})
            for index, prompt in enumerate(prompts)
        ),
        EvaluationEnded(result, prompts, result_path, report_path, (*videos, still)),
    )
