"""The pipeline classes of diffusers that are not in the support table, with the reason."""

import functools
import inspect
import typing
import warnings

import diffusers
from diffusers import DiffusionPipeline

from sparsetune.models.family_table import FAMILIES, REFUSED

_ABOVE = "its transformer is one of those above"
_CONTROL = f"takes a ControlNet in addition to the prompt; {_ABOVE}"
_UNSEEDED = f"its control image uses noise that ignores the generator, so two dense renderings differ; {_ABOVE}"
_LTX2 = f"a stage or variant of LTX-2 with different inputs; {_ABOVE}"
_CHUNKS = f"renders in chunks that attend to each other; {_ABOVE}"
_EDIT = f"edits images that its text encoder also reads, each upscaled to a megapixel; {_ABOVE}"
_VARIANT = f"takes other inputs (an image, a mask or guidance of another kind); {_ABOVE}"
_ADDED_MASK = f"adds its mask of zeros and ones to the scores, so that its calls run dense; {_ABOVE}"
_VISUAL_CLOZE = f"arranges several images in a grid; {_ABOVE}"
UNTRIED = {
    "LTXI2VLongMultiPromptPipeline": f"renders windows of a long video, each with its own prompt; {_ABOVE}",
    "LTX2DFRPipeline": _LTX2,
    "LTX2DFRTemporalRefinePipeline": _LTX2,
    "LTX2HDRPipeline": _LTX2,
    "LTX2InContextPipeline": _LTX2,
    "EasyAnimateControlPipeline": "fails in diffusers: it passes an unknown argument to encode_prompt",
    "EasyAnimateInpaintPipeline": "fails in diffusers: it reads a setting that its VAE doesn't have",
    "Cosmos2_5_TransferPipeline": _CHUNKS,
    "QwenImageControlNetInpaintPipeline": _CONTROL,
    "QwenImageEditPlusPipeline": _EDIT,
    "QwenImageLayeredPipeline": f"renders several layers of an image at once; {_ABOVE}",
    "StableDiffusion3ControlNetPipeline": _UNSEEDED,
    "StableDiffusion3ControlNetInpaintingPipeline": _UNSEEDED,
    "StableDiffusion3PAGImg2ImgPipeline": f"as StableDiffusion3PAGPipeline; {_ABOVE}",
    "VisualClozePipeline": _VISUAL_CLOZE,
    "VisualClozeGenerationPipeline": _VISUAL_CLOZE,
    "BriaFiboEditPipeline": _VARIANT,
    "ChromaImg2ImgPipeline": _ADDED_MASK,
    "ChromaInpaintPipeline": _ADDED_MASK,
    "CogView4ControlPipeline": _VARIANT,
    "Flux2KleinInpaintPipeline": _VARIANT,
    "Flux2KleinKVPipeline": (
        "keeps the reference images' keys in a cache, which its queries don't have: such calls run dense and are "
        f"counted; {_ABOVE}"
    ),
    "HeliosPyramidPipeline": _VARIANT,
    "HunyuanDiTControlNetPipeline": _CONTROL,
    "HunyuanDiTPAGPipeline": _VARIANT,
    "HunyuanImageRefinerPipeline": _VARIANT,
    "Kandinsky5I2IPipeline": _VARIANT,
    "Kandinsky5I2VPipeline": _VARIANT,
    "Kandinsky5T2IPipeline": _VARIANT,
    "LongCatImageEditPipeline": _VARIANT,
    "MotifVideoImage2VideoPipeline": _VARIANT,
    "PixArtSigmaPAGPipeline": _VARIANT,
    "ZImageControlNetInpaintPipeline": _CONTROL,
    "ZImageControlNetPipeline": _CONTROL,
    "ZImageInpaintPipeline": _VARIANT,
    "ZImageOmniPipeline": f"puts text between images, so that its tokens count as one row; {_ABOVE}",
}
"""Those whose transformer is one of a supported family: `sparsify` takes them, but no test shows what it does."""

_AUDIO = "generates audio"
_LINEAR = "its self-attention is linear and has no blocks to skip"
_FEW = "its sequences are too short to benefit"
_UNET = "denoises with a UNet, which is not supported"
_OTHER = "outputs embeddings, text, shapes, molecules or other latents instead of images or videos"
_BY_TRANSFORMER = {
    "AceStepTransformer1DModel": _AUDIO,
    "LongCatAudioDiTTransformer": _AUDIO,
    "StableAudioDiTModel": _AUDIO,
    "StableAudio3DiTModel": _AUDIO,
    "SanaTransformer2DModel": _LINEAR,
    "SanaVideoTransformer3DModel": _LINEAR,
    "DiTTransformer2DModel": _FEW,
    "LatteTransformer3DModel": _FEW,
    "Transformer2DModel": _FEW,
    "UVit2DModel": _FEW,
    "RFD4ProteinaTransformer": _OTHER,
}
_UNETS = {"unet", "image_unet", "decoder"}


@functools.cache
def pipelines() -> tuple[str, ...]:
    """Return the names of all pipeline classes of diffusers; importing them takes some seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what their modules use
        found = {name: getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Pipeline")}
    return tuple(
        name
        for name, kind in found.items()
        if inspect.isclass(kind) and issubclass(kind, DiffusionPipeline) and kind is not DiffusionPipeline
    )


def uses_a_supported_transformer(name: str) -> bool:
    """Return whether a pipeline's transformer belongs to a supported family."""
    return bool(_transformers(name) & {family.transformer_class for family in FAMILIES})


def others() -> dict[str, list[str]]:
    """Return the pipelines whose transformer belongs to no supported family, by reason."""
    found: dict[str, list[str]] = {}
    for name in pipelines():
        if not uses_a_supported_transformer(name):
            found.setdefault(_reason(name), []).append(name)
    return dict(sorted(found.items()))


def _reason(name: str) -> str:
    transformers = _transformers(name)
    if transformers:
        reasons = _BY_TRANSFORMER | {kind: f"{reason}; `sparsify` rejects it" for kind, reason in REFUSED.items()}
        return next(reasons[kind] for kind in transformers if kind in reasons)
    if "Audio" in name or "Music" in name:
        return _AUDIO
    return _UNET if _UNETS & inspect.signature(getattr(diffusers, name).__init__).parameters.keys() else _OTHER


def _transformers(name: str) -> set[str]:
    parameter = inspect.signature(getattr(diffusers, name).__init__).parameters.get("transformer")
    if parameter is None:
        return set()
    kinds = typing.get_args(parameter.annotation) or (parameter.annotation,)
    return {kind if isinstance(kind, str) else kind.__name__ for kind in kinds if kind is not type(None)}
