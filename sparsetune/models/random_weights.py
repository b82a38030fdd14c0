"""Pipelines with random weights, built from a model's published configuration without a download."""

import importlib
import json
import re
import zlib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizer

from sparsetune.config.files import nearest
from sparsetune.errors import ModelError

Size = Literal["full", "tiny"]

_FOLDER = Path(__file__).parent / "blueprints"


@dataclass(frozen=True)
class Blueprint:
    """Classes and configurations of a model's components."""

    name: str  # as `--model` takes it
    hub_id: str
    facts_from: str  # source of the configuration
    pipeline: str  # class in diffusers
    options: dict[str, Any]  # the pipeline's own settings
    components: dict[str, dict[str, Any]]  # for each: `class`, the published `config`, and its changes for `tiny`
    tokens: dict[str, int]  # frames and pixels in a side of a latent (`temporal`, `spatial`); most `text` tokens


def blueprints() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


@cache
def blueprint(name: str) -> Blueprint:
    """Read a model's blueprint by its name or hub id; ModelError where there is none."""
    for known in blueprints():
        content = json.loads((_FOLDER / f"{known}.json").read_text(encoding="utf-8"))
        if name in (known, content["hub_id"]):
            same_as = content.pop("as", None)  # another model of the same structure
            return (
                Blueprint(name=known, **content)
                if same_as is None
                else replace(blueprint(same_as), name=known, **content)
            )
    hint = nearest(name, dict.fromkeys(blueprints()))
    raise ModelError(
        f"no model {name!r} with random weights; "
        + (f"did you mean {hint}?" if hint else f"choose one of {', '.join(blueprints())}")
    )


def build_pipeline(plan: Blueprint, size: Size, dtype: torch.dtype = torch.float32) -> Any:
    """Build a pipeline with random weights, the same each time.

    Text and image encoders have one narrow layer and a vocabulary of hashed words at any size: only the width of their
    embeddings matters. Transformer and VAE are as published, or `tiny`: a few layers and channels.
    """
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = {name: build_component(plan, name, size, dtype) for name in plan.components}
    pipeline: Any = getattr(diffusers, plan.pipeline)
    return pipeline(**parts, **plan.options)


def build_component(plan: Blueprint, name: str, size: Size, dtype: torch.dtype = torch.float32) -> Any:
    """Build one component with random weights; on the meta device where that is torch's default."""
    part = plan.components[name]
    found, config = _class_named(part["class"]), part["config"] | (part.get("tiny", {}) if size == "tiny" else {})
    before = torch.get_default_dtype()
    if issubclass(found, nn.Module):
        torch.set_default_dtype(dtype)  # a full transformer may only fit in bfloat16
    try:
        if issubclass(found, nn.Module) and hasattr(found, "config_class"):  # transformers
            built = _encoder(found, config)
        else:  # from_config: diffusers
            built = found.from_config(config) if hasattr(found, "from_config") else found(**config)
    finally:
        torch.set_default_dtype(before)
    return _ready(built) if isinstance(built, nn.Module) else built


def _class_named(kind: str) -> type[Any]:
    """Import a class: by its full path, or from this module, diffusers or transformers."""
    module, _, name = kind.rpartition(".")
    with torch.device("cpu"):  # tensor constants of imported modules must not be on the meta device
        places = map(importlib.import_module, (module,) if module else (__name__, "diffusers", "transformers"))
        found: type = next(getattr(place, name) for place in places if hasattr(place, name))
    return found


def _ready(module: nn.Module) -> nn.Module:
    """Prepare a module for inference as loading would: in evaluation mode, some of its parts in float32.

    Parameters initialized to zero get random values, so that they affect the output.
    """
    in_fp32 = getattr(module, "_keep_in_fp32_modules", None) or ()
    for name, parameter in module.named_parameters():
        if any(part in name.split(".") for part in in_fp32):
            parameter.data = parameter.data.float()
        if parameter.device.type != "meta" and parameter.dim() > 1 and not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.02)
    return module.eval()


_SPECIAL = ("<pad>", "<bos>", "<unk>", "<eos>")
_VOCABULARY = 1024
_CHAT = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"


class HashTokenizer(PreTrainedTokenizer):
    """Maps words to ids by hash, without a vocabulary."""

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 (transformers wants a list)

    def __init__(self, model_max_length: int = 512, **rest: Any) -> None:
        pad, bos, unk, eos = _SPECIAL
        special = {"pad_token": pad, "bos_token": bos, "unk_token": unk, "eos_token": eos}
        rest = {"chat_template": _CHAT, "padding_side": "right"} | special | rest
        super().__init__(model_max_length=model_max_length, **rest)  # type: ignore[no-untyped-call]

    @property
    def vocab_size(self) -> int:
        return _VOCABULARY

    def get_vocab(self) -> dict[str, int]:
        """Return only the special tokens: words are hashed."""
        return {token: number for number, token in enumerate(_SPECIAL)}

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: Any = None) -> list[int]:
        return [*token_ids_0, _SPECIAL.index("<eos>")]

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
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
    """Stands in for Cosmos' guardrail, a large model of its own; accepts everything."""

    device = torch.device("cpu")
    dtype = torch.float32

    def check_text_safety(self, text: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def _encoder(kind: Any, config: dict[str, Any]) -> Any:
    """Build a text or image encoder of class `kind` from transformers, with one or two narrow layers."""
    defaults = next(values for prefix, values in _ENCODERS.items() if kind.__name__.startswith(prefix))
    return kind(kind.config_class(**(defaults(config) if callable(defaults) else defaults | config)))


_TOKENS = {"vocab_size": _VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}
_T5 = {"d_ff": 8, "d_kv": 8, "num_heads": 1, "num_layers": 1, "vocab_size": _VOCABULARY}
_DECODER = {
    "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
} | _TOKENS  # fmt: skip
_CLIP = {"intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}


def _qwen_text(config: dict[str, Any]) -> dict[str, Any]:
    half = config["hidden_size"] // 4  # half of a head's width, divided among time, height and width
    sections = [half - 2 * (half // 3), half // 3, half // 3]
    rope = {"rope_type": "default", "type": "default", "mrope_section": sections, "rope_theta": 1000000.0}
    return _DECODER | config | {"rope_parameters": rope}


def _qwen_vl(config: dict[str, Any]) -> dict[str, Any]:
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "embed_dim": 16}
    return {"text_config": _qwen_text(config), "vision_config": vision | {"out_hidden_size": config["hidden_size"]}}


def _mistral(config: dict[str, Any]) -> dict[str, Any]:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {"text_config": _DECODER | config | {"head_dim": 8}, "vision_config": vision | {"head_dim": 8}}


def _gemma(config: dict[str, Any]) -> dict[str, Any]:
    text = _DECODER | config | {"head_dim": 8, "num_hidden_layers": 1}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {"text_config": text, "vision_config": vision}


_ENCODERS: dict[str, Any] = {
    "T5": _T5,
    "UMT5": _T5,
    "CLIPVision": _CLIP,
    "CLIP": _CLIP | _TOKENS,
    "Llama": _DECODER,
    "Qwen2_5_VLText": _qwen_text,
    "Qwen2": _qwen_vl,
    "Qwen3": _DECODER | {"head_dim": 8},
    "Gemma3": _gemma,
    "Mistral3": _mistral,
}
