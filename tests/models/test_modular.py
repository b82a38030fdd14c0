"""Modular pipelines of diffusers: sparse as other pipelines are, rendered and loaded through the same API."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import AnimaAutoBlocks, ErnieImageAutoBlocks, FluxAutoBlocks, WanBlocks, ZImageAutoBlocks

from sparsetune.cli.main import main
from sparsetune.config import GenerationConfig, ModelConfig
from sparsetune.models import loading
from sparsetune.models.families import family_named
from sparsetune.models.generation import Renderer
from sparsetune.models.loading import LoadedModel, load_pipeline
from sparsetune.models.random_weights import blueprint, build_pipeline
from sparsetune.models.sparsify import sparsify
from tests.models.support import DENSE, HALF, policy

SETTINGS = GenerationConfig(num_frames=1, height=256, width=256, num_inference_steps=2, guidance_scale=3.0)


@pytest.fixture(scope="module")
def plain() -> Any:
    return build_pipeline(blueprint("flux-dev"), "tiny")


@pytest.fixture(scope="module")
def modular(plain: Any) -> Any:
    pipe = FluxAutoBlocks().init_pipeline()
    pipe.update_components(**{name: part for name, part in plain.components.items() if name in pipe.component_names})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def loaded(pipe: Any) -> LoadedModel:
    identity = loading._identity(pipe, ModelConfig(name="flux"), None, "")
    return LoadedModel(pipe, identity, loading.family_of(pipe), torch.device("cpu"), torch.float32)


def test_a_modular_pipeline_renders_as_the_other_one_dense_and_sparse(modular: Any, plain: Any) -> None:
    renderers = [Renderer(loaded(pipe), SETTINGS) for pipe in (plain, modular)]
    dense = [one.render("a red circle", 0).frames for one in renderers]
    assert np.array_equal(*dense)
    sparse, counts = [], []
    for one in renderers:
        with sparsify(one.loaded.pipe, policy(one.loaded.pipe, HALF), "reference") as handle:
            sparse.append(one.render("a red circle", 0).frames)
            counts.append((handle.stats().num_calls, handle.stats().by_step))
    assert np.array_equal(*sparse) and not np.array_equal(sparse[0], dense[0])
    assert counts[0] == counts[1]
    with sparsify(modular, policy(modular, DENSE), "reference"):
        assert np.array_equal(renderers[1].render("a red circle", 0).frames, dense[1])
    assert np.array_equal(renderers[1].render("a red circle", 0).frames, dense[1])


def test_a_modular_pipeline_is_loaded_from_its_folder(modular: Any, tmp_path: Path) -> None:
    """All of its components are, of which the tokenizers aren't diffusers' or transformers'."""
    modular.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    made = load_pipeline(ModelConfig(source=str(tmp_path), device="cpu", dtype="float32"))
    assert made.family.name == "flux"
    assert made.identity.pipeline_class == "FluxModularPipeline" and made.identity.layers
    wanted = Renderer(loaded(modular), SETTINGS).render("a red circle", 0).frames
    assert np.array_equal(Renderer(made, SETTINGS).render("a red circle", 0).frames, wanted)


def test_a_modular_pipeline_is_loaded_from_the_hub(
    modular: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a local cache with the cache's layout; the Hub is unreachable, and other repositories aren't needed."""
    commit = "0123456789abcdef" * 2 + "01234567"
    folder = tmp_path / "models--nobody--flux" / "snapshots" / commit
    modular.save_pretrained(str(folder), overwrite_modular_index=True)
    index = folder / "modular_model_index.json"
    index.write_text(index.read_text().replace(str(folder), "another/repository"))
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    made = load_pipeline(ModelConfig(source="nobody/flux", device="cpu", dtype="float32"))
    assert made.identity.revision == commit
    assert (
        made.identity.fingerprint == load_pipeline(ModelConfig(source=str(folder), device="cpu")).identity.fingerprint
    )
    wanted = Renderer(loaded(modular), SETTINGS).render("a red circle", 0).frames
    assert np.array_equal(Renderer(made, SETTINGS).render("a red circle", 0).frames, wanted)


@pytest.mark.slow
def test_a_modular_pipeline_is_tuned_and_evaluated_by_the_commands(modular: Any, working_folder: Path) -> None:
    modular.save_pretrained("flux", overwrite_modular_index=True)
    size = "--num-frames 1 --height 128 --width 128 --num-inference-steps 2 --guidance-scale 3 --num-prompts 1"
    common = f"--model ./flux {size} --min-psnr 1 --min-frame-cosine 0 --backend reference --no-track"
    search = "--n-trials 2 --caches none --set gate.min_psnr_worst=null --set eval.num_prompts=1 --output-dir tuned"
    tuned = CliRunner().invoke(main, ["tune", *common.split(), *search.split()])
    assert tuned.exit_code == 0, tuned.output
    assert "/2 [" not in tuned.output  # no bar of diffusers' own
    judge = "--checkpoint tuned/checkpoint --output-dir judged"
    judged = CliRunner().invoke(main, ["eval", *common.split(), *judge.split()])
    assert judged.exit_code == 0, judged.output
    results = [json.loads(file.read_text()) for file in working_folder.glob("*/**/flux_accuracy_tuned.json")]
    assert len(results) == 2  # the search's own evaluation and the later one
    assert {result["config"]["model"]["pipeline_class"] for result in results} == {"FluxModularPipeline"}
    assert results[0]["sparsity"]["overall"] == results[1]["sparsity"]["overall"] > 0


@pytest.mark.parametrize(
    ("blocks", "transformer", "family"),
    [
        (WanBlocks, "WanTransformer3DModel", "wan"),
        (ZImageAutoBlocks, "ZImageTransformer2DModel", "z-image"),
        (AnimaAutoBlocks, "CosmosTransformer3DModel", "anima"),
        (ErnieImageAutoBlocks, "ErnieImageTransformer2DModel", "ernie-image"),
    ],
)
def test_the_family_of_a_modular_pipeline_is_that_of_its_transformer(
    blocks: Any, transformer: str, family: str
) -> None:
    assert family_named(type(blocks().init_pipeline()).__name__, transformer).name == family
