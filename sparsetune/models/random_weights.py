"""Pipelines with random weights, built from a model's published configuration without a download."""

import importlib
import json
import re
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizer

from sparsetune.config.files import nearest
from sparsetune.errors import ModelError

Size = Literal["full", "tiny"]

_LIBRARIES = ("diffusers", "transformers")
_FOLDER = Path(__file__).parent / "blueprints"


@dataclass(frozen=True)
class Blueprint:
    """What a model is built of.

    Args:
        name: as `--model` takes it.
        hub_id: the model on the hub.
        facts_from: where the configuration is from.
        pipeline: the pipeline's class in diffusers.
        options: the pipeline's own settings.
        tokens: frames and pixels in a side of a latent (`temporal`, `spatial`), and the `text` tokens of the joint
            attention at most.
        components: for each of its parts, `class`, the published `config`, and what `tiny` changes in it.
    """

    name: str
    hub_id: str
    facts_from: str
    pipeline: str
    options: dict[str, Any]
    components: dict[str, dict[str, Any]]
    tokens: dict[str, int]

    def config(self, component: str, size: Size = "full") -> dict[str, Any]:
        """Return a component's configuration; what it doesn't name is its class's default."""
        part = self.components[component]
        return dict(part["config"]) | (part.get("tiny", {}) if size == "tiny" else {})


def blueprints() -> tuple[str, ...]:
    """Return the names of all models that can be built."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


@cache
def blueprint(name: str) -> Blueprint:
    """Read a model's blueprint by its name, or by its id on the hub.

    Raises:
        ModelError: there is none; the nearest name is told.
    """
    for known in blueprints():
        found = Blueprint(name=known, **json.loads((_FOLDER / f"{known}.json").read_text(encoding="utf-8")))
        if name in (known, found.hub_id):
            return found
    hint = nearest(name, dict.fromkeys(blueprints()))
    raise ModelError(
        f"a model with random weights must be one of {', '.join(blueprints())}, but is {name!r}; "
        + (f"did you mean {hint}?" if hint else "choose one of them")
    )


def build_pipeline(plan: Blueprint, size: Size, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Build a pipeline with random weights.

    Text and image encoders have one narrow layer and a vocabulary of hashed words at any size: they only have to give
    embeddings of the right width. Transformer and VAE are those of the size that was asked for.

    Args:
        plan: the model.
        size: `full` as published, or `tiny`: a few layers and channels.
        dtype: of the weights.
        seed: of the weights; the same seed gives the same pipeline.
    """
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {name: build_component(plan, name, size, dtype) for name in plan.components}
    pipeline: Any = getattr(diffusers, plan.pipeline)
    return pipeline(**parts, **plan.options)


def build_component(plan: Blueprint, name: str, size: Size, dtype: torch.dtype = torch.float32) -> Any:
    """Build one part of a pipeline with random weights; on the meta device where that is torch's default."""
    kind, config = plan.components[name]["class"], plan.config(name, size)
    found = _find(kind)
    if not issubclass(found, nn.Module):
        return found.from_config(config) if hasattr(found, "from_config") else found(**config)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a full transformer in float32 wouldn't fit where it does in bfloat16
    try:
        module = _module(found, config)
    finally:
        torch.set_default_dtype(before)
    return _settled(module)


def _module(found: Any, config: dict[str, Any]) -> nn.Module:
    from sparsetune.models.random_weights import encoder

    if hasattr(found, "load_config"):  # diffusers; transformers' from_config is another thing
        built: nn.Module = found.from_config(config)
        return built
    return encoder(found, config) if hasattr(found, "config_class") else found(**config)


def _find(kind: str) -> type:
    """Find a class: one of ours, one in a module that is named, or diffusers' before transformers'."""
    from sparsetune.models import random_weights as stand_ins

    module, _, name = kind.rpartition(".")
    with torch.device("cpu"):  # importing makes a module's own constants, which outlive a build on the meta device
        places = [importlib.import_module(module)] if module else [stand_ins, *map(importlib.import_module, _LIBRARIES)]
        found: type = next(getattr(place, name) for place in places if hasattr(place, name))
    return found


def _settled(module: nn.Module) -> nn.Module:
    """Make a module ready to infer as loading would: in evaluation mode, some of its parts in float32.

    Parameters that start at zero get some values: a model that is nothing at all shows no difference.
    """
    kept = getattr(module, "_keep_in_fp32_modules", None) or ()
    for name, parameter in module.named_parameters():
        if any(part in name.split(".") for part in kept):
            parameter.data = parameter.data.float()
        if parameter.device.type != "meta" and parameter.dim() > 1 and not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.02)
    return module.eval()


_SPECIAL = ("<pad>", "<bos>", "<unk>", "<eos>")
_VOCABULARY = 1024
_CHAT = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"


class HashTokenizer(PreTrainedTokenizer):
    """Numbers a word by its hash: deterministic, and needs no vocabulary.

    Args:
        model_max_length: tokens of the longest text.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 (transformers wants a list)

    def __init__(self, model_max_length: int = 512, **rest: Any) -> None:
        pad, bos, unk, eos = _SPECIAL
        rest = {"chat_template": _CHAT, "padding_side": "right"} | rest
        super().__init__(  # type: ignore[no-untyped-call]
            pad_token=pad, bos_token=bos, unk_token=unk, eos_token=eos, model_max_length=model_max_length, **rest
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return _VOCABULARY

    def get_vocab(self) -> dict[str, int]:
        """Return the special tokens; words have no list."""
        return {token: number for number, token in enumerate(_SPECIAL)}

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: Any = None) -> list[int]:
        """Append the end token."""
        return [*token_ids_0, _SPECIAL.index("<eos>")]

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Count the end token."""
        return 1

    def _tokenize(self, text: str, **_rest: Any) -> list[str]:
        return re.findall(r"\w+|[^\w\s]", text)

    def _convert_token_to_id(self, token: str) -> int:
        if token in _SPECIAL:
            return _SPECIAL.index(token)
        return len(_SPECIAL) + zlib.crc32(token.encode()) % (_VOCABULARY - len(_SPECIAL))

    def _convert_id_to_token(self, index: int) -> str:
        return _SPECIAL[index] if index < len(_SPECIAL) else f"w{index}"


class NoSafetyChecker(nn.Module):
    """Takes the place of Cosmos' guardrail, which is a large model of its own, and lets everything pass."""

    device = torch.device("cpu")
    dtype = torch.float32

    def check_text_safety(self, text: str) -> bool:
        """Let any text pass."""
        return True

    def check_video_safety(self, frames: Any) -> Any:
        """Return the frames as they are."""
        return frames


def encoder(kind: Any, config: dict[str, Any]) -> nn.Module:
    """Build a text or image encoder of transformers with one or two narrow layers.

    Args:
        kind: its class.
        config: what decides the shape of its output.
    """
    defaults = next(values for prefix, values in _ENCODERS.items() if kind.__name__.startswith(prefix))
    built: nn.Module = kind(kind.config_class(**(defaults(config) if callable(defaults) else defaults | config)))
    return built


_T5 = {"d_ff": 8, "d_kv": 8, "num_heads": 1, "num_layers": 1, "vocab_size": _VOCABULARY}
_DECODER = {
    "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "vocab_size": _VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3,
}  # fmt: skip
_CLIP = {"intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}


def _qwen_text(config: dict[str, Any]) -> dict[str, Any]:
    half = config["hidden_size"] // 4  # half of a head's width, shared out among time, height and width
    sections = [half - 2 * (half // 3), half // 3, half // 3]
    rope = {"rope_type": "default", "type": "default", "mrope_section": sections, "rope_theta": 1000000.0}
    return _DECODER | config | {"rope_parameters": rope}


def _qwen_vl(config: dict[str, Any]) -> dict[str, Any]:
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "embed_dim": 16}
    return {"text_config": _qwen_text(config), "vision_config": vision | {"out_hidden_size": config["hidden_size"]}}


def _gemma(config: dict[str, Any]) -> dict[str, Any]:
    text = _DECODER | config | {"head_dim": 8, "num_hidden_layers": 1}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {"text_config": text, "vision_config": vision}


_ENCODERS: dict[str, Any] = {
    "T5": _T5,
    "UMT5": _T5,
    "CLIPVision": _CLIP,
    "CLIP": _CLIP | {"vocab_size": _VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3},
    "Llama": _DECODER,
    "Qwen2_5_VLText": _qwen_text,
    "Qwen2": _qwen_vl,
    "Gemma3": _gemma,
}
