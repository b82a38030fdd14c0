"""MLflow's flavour for a checkpoint: saved, logged and loaded as an MLflow 3 model.

The model is the policy and its manifest, some kilobytes; the base model is named with its revision, and its weights
are loaded from their source when videos are rendered. `mlflow.pyfunc.load_model` returns a model whose
`predict(prompts)` returns paths of videos.
"""

import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sparsetune.checkpoint import Checkpoint, Manifest, load_checkpoint, save_checkpoint, versions
from sparsetune.documents import read_text, read_yaml
from sparsetune.errors import CheckpointError
from sparsetune.files import write_text
from sparsetune.tracking.pyfunc import ENGINE_DEFAULTS, SparseVideoModel, call_parameters

if TYPE_CHECKING:
    from mlflow.models import Model, ModelSignature
    from mlflow.models.model import ModelInfo

FLAVOR_NAME = "sparsetune"
MODEL_TYPE = "sparse-attention-policy"
FOLDER = "checkpoint"
"""The checkpoint's folder within the model's, and among the artifacts of a run."""

MODEL_NAME = "policy"
"""A logged model's name. Not `FOLDER`: MLflow mixes a run's artifacts with those of its models of the same name."""

_REQUIREMENTS = "requirements.txt"
_PYTHON_ENV = "python_env.yaml"
_CONDA_ENV = "conda.yaml"
_REQUIRED = ("sparsetune", "mlflow", "torch", "diffusers", "transformers")


def save_model(
    checkpoint: Checkpoint | Path | str,
    path: Path | str,
    *,
    mlflow_model: "Model | None" = None,
    signature: "ModelSignature | None" = None,
    pip_requirements: Sequence[str] | None = None,
    model_config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Save a checkpoint as an MLflow model in a new folder.

    Args:
        checkpoint: the checkpoint, or its folder or file.
        path: the new folder.
        mlflow_model: what this flavour is added to; None is a new one.
        signature: None is prompts in, paths out, with seed, output folder and generation settings as parameters.
        pip_requirements: None is this sparsetune with the packages it renders with, at their installed versions.
        model_config: defaults for `mlflow.pyfunc.load_model(model_config=...)`, see `SparseVideoModel`.
        metadata: further entries of the MLmodel file.

    Raises:
        CheckpointError: it can't be read, or the folder isn't empty.
    """
    from mlflow.models import Model

    checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else load_checkpoint(checkpoint)
    path = Path(path)
    if path.exists() and any(path.iterdir()):
        raise CheckpointError(f"{path} is not empty; give a new folder")
    save_checkpoint(checkpoint, path / FOLDER)
    model = mlflow_model or Model()
    model.signature = signature or default_signature(checkpoint.manifest)
    model.metadata = {**(model.metadata or {}), **(metadata or {})} or None
    base = base_reference(checkpoint.manifest)
    model.add_flavor(FLAVOR_NAME, sparsetune_version=versions()["sparsetune"], checkpoint=FOLDER, **base)
    _pyfunc().add_to_model(
        model,
        loader_module=__name__,
        conda_env=_CONDA_ENV,
        python_env=_PYTHON_ENV,
        model_config={**ENGINE_DEFAULTS, "dtype": checkpoint.manifest.dtype or "auto", **(model_config or {})},
    )
    _write_environment(path, pip_requirements or default_pip_requirements())
    model.model_size_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    model.save(str(path / "MLmodel"))


def log_model(checkpoint: Checkpoint | Path | str, name: str = MODEL_NAME, **options: Any) -> "ModelInfo":
    """Log a checkpoint to MLflow's active run, as MLflow's own flavours do; `options` are `Model.log`'s.

    Runs that sparsetune records itself have their model logged already.
    """
    from mlflow.models import Model

    info: ModelInfo = Model.log(
        artifact_path=None, name=name, flavor=sys.modules[__name__], checkpoint=checkpoint, **options
    )
    return info


def load_model(model_uri: str, dst_path: str | None = None) -> Checkpoint:
    """Load a logged or registered model's checkpoint from MLflow's current tracking and registry stores.

    Args:
        model_uri: e.g. `models:/demo-sparse@champion`, `models:/m-123...`, `runs:/ID/checkpoint`, or a folder.
        dst_path: existing folder to download to; None is a temporary one.

    Raises:
        CheckpointError: it isn't a model of this flavour.
    """
    import mlflow.artifacts

    folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=model_uri, dst_path=dst_path))
    return load_checkpoint(checkpoint_folder(folder))


def checkpoint_folder(model: Path) -> Path:
    """Find the checkpoint in a model's folder; one without an MLmodel file is taken for the checkpoint itself."""
    if not (model / "MLmodel").is_file():
        return model
    file = model / "MLmodel"
    flavors = _flavors(file)
    if FLAVOR_NAME not in flavors:
        raise CheckpointError(
            f"the model was not logged by sparsetune: it has the flavours {', '.join(sorted(map(str, flavors)))}"
        )
    described = flavors[FLAVOR_NAME]
    named = described.get("checkpoint") if isinstance(described, Mapping) else None
    if not isinstance(named, str) or not (model / named).resolve().is_relative_to(model.resolve()):
        raise CheckpointError(f"{file} names the checkpoint {named!r}, which is not in its folder; {_AGAIN}")
    return model / named


_AGAIN = "download or save the model again"


def _flavors(path: Path) -> Mapping[Any, Any]:
    """Read an MLmodel file's flavours; of a damaged one MLflow's own reader raises anything."""
    try:
        content = read_yaml(read_text(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {getattr(error, 'strerror', None) or error}; {_AGAIN}") from error
    flavors = content.get("flavors") if isinstance(content, Mapping) else None
    if not isinstance(flavors, Mapping):
        raise CheckpointError(f"{path} has no flavours; {_AGAIN}")
    return flavors


def default_signature(manifest: Manifest) -> "ModelSignature":
    """The prompts' column has no name, so that a plain list of texts is taken too."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    kinds = {int: DataType.long, float: DataType.double, str: DataType.string}
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string)]),
        outputs=Schema([ColSpec(DataType.string)]),
        params=ParamSchema(
            [ParamSpec(name, kinds[type(value)], value) for name, value in call_parameters(manifest).items()]
        ),
    )


def default_pip_requirements() -> list[str]:
    installed = versions()
    return [f"{package}=={installed[package].partition('+')[0]}" for package in _REQUIRED if package in installed]


def base_reference(manifest: Manifest) -> dict[str, str]:
    known = {
        "base_model": manifest.base_model,
        "base_source": manifest.base_source,
        "base_revision": manifest.base_revision,
        "base_fingerprint": manifest.base_fingerprint,
        "pipeline_class": manifest.pipeline_class,
        "transformer_class": manifest.transformer_class,
    }
    return {name: value for name, value in known.items() if value is not None}


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> SparseVideoModel:
    """MLflow's entry: `mlflow.pyfunc.load_model` calls it with the model's folder."""
    return SparseVideoModel(load_checkpoint(checkpoint_folder(Path(path))), model_config or {})


def _pyfunc() -> ModuleType:
    """Import MLflow's pyfunc without the warnings that MLflow's own code causes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_module("mlflow.pyfunc")


def _write_environment(path: Path, requirements: Sequence[str]) -> None:
    import yaml

    python = versions()["python"]
    conda = {
        "name": "mlflow-env",
        "channels": ["conda-forge"],
        "dependencies": [f"python={python}", "pip", {"pip": list(requirements)}],
    }
    environment = {"python": python, "build_dependencies": ["pip"], "dependencies": [f"-r {_REQUIREMENTS}"]}
    write_text(path / _REQUIREMENTS, "\n".join(requirements) + "\n")
    write_text(path / _CONDA_ENV, yaml.safe_dump(conda, sort_keys=False))
    write_text(path / _PYTHON_ENV, yaml.safe_dump(environment, sort_keys=False))
