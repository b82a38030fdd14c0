"""Small parts that stand in for those of a published model where only the shape of their output matters."""

import re
import zlib
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizer

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
