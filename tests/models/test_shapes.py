"""Each packaged configuration against the published model, built on the meta device."""

import pytest

from sparsetune.config import resolve
from sparsetune.config.files import find_config, published_models, read_config
from sparsetune.models.families import family_named
from sparsetune.models.loading import LoadedModel
from sparsetune.models.model_shape import ModelShape
from sparsetune.models.random_weights import blueprint
from sparsetune.models.shapes import shape_of

NAMES = published_models()


@pytest.mark.parametrize(
    "name", [name if name == "wan2.1-t2v-1.3b" else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_a_configuration_holds_for_the_published_model(name: str) -> None:
    configuration = read_config(find_config(name))
    config = resolve(name, (), {})
    plan = blueprint(config.model.source)
    assert plan.name == name or config.model.lora is not None  # of the same structure
    shape = shape_of(plan, config.generation)
    assert ModelShape.of_facts(configuration) == shape
    found = (configuration[f"facts.{key}"] for key in ("tokens", "scheduler", "pipeline"))
    assert tuple(found) == (shape.num_tokens, plan.components["scheduler"]["class"], plan.pipeline)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", ["full", "tiny"])
def test_a_configuration_renders_what_its_model_can(name: str, size: str) -> None:
    """Latent sizes and integer numbers of latent frames; the pipeline rejects others (`check_size`)."""
    flags = {"model.source": name, "model.random_weights": size}
    config = resolve(None, (), {}, flags).generation
    plan = blueprint(resolve(name, (), {}).model.source)
    family = family_named(plan.pipeline, plan.components["transformer"]["class"])
    assert family.is_image == (config.num_frames == 1)
    assert family.is_image or (config.num_frames - family.first_frames) % family.frame_unit == 0
    assert config.height % plan.tokens["spatial"] == config.width % plan.tokens["spatial"] == 0


def test_attentions_share_is_as_measured() -> None:
    """On an H100 a step of CogVideoX-2b takes 635 ms, and 279 ms without attention: 56% (55% by FLOPs)."""
    config = resolve("cogvideox-2b", (), {})
    assert shape_of(blueprint("cogvideox-2b"), config.generation).attention_share == pytest.approx(0.56, abs=0.02)


@pytest.mark.parametrize("name", ["demo", "demo-long", "demo-xl"])
def test_the_demo_model_s_configurations_have_its_facts(demo: LoadedModel, name: str) -> None:
    facts, size = read_config(find_config(name)), resolve(name, (), {}).generation
    shape, transformer = ModelShape.of_facts(facts), demo.pipe.transformer
    assert (shape.num_layers, shape.num_heads, shape.head_dim) == (len(demo.identity.layers), 3, 64)
    assert shape.num_parameters == sum(weight.numel() for weight in transformer.parameters())
    assert shape.vae_parameters == sum(weight.numel() for weight in demo.pipe.vae.parameters())
    assert shape.grid == ((size.num_frames - 1) // 4 + 1, size.height // 4, size.width // 4)
    assert (shape.num_text_tokens, facts["facts.tokens"]) == (transformer.config.max_text_seq_length, shape.num_tokens)
    assert facts["facts.scheduler"] == type(demo.pipe.scheduler).__name__
