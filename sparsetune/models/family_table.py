"""The supported families of diffusers models, as data, and why others aren't supported."""

from sparsetune.attention.sites import ReadCall, TextPlace
from sparsetune.models import calls
from sparsetune.models.family import Family, LayerRule

_BLOCKS_ATTN1 = (LayerRule(r"blocks\.\d+\.attn1"),)
_TRANSFORMER_BLOCKS_ATTN1 = (LayerRule(r"transformer_blocks\.\d+\.attn1"),)
_DOUBLE_AND_SINGLE = r"(single_)?transformer_blocks\.\d+\.attn"

_WAN_UPSTREAM = ((r"blocks\.(\d+)\.self_attn", r"blocks.\1.attn1"),)
_DOUBLE_AND_SINGLE_UPSTREAM = (  # of FLUX and HunyuanVideo
    (r"double_blocks\.(\d+)(?:\.\w*attn\w*)?", r"transformer_blocks.\1.attn"),
    (r"single_blocks\.(\d+)(?:\.\w*attn\w*)?", r"single_transformer_blocks.\1.attn"),
)

_PUBLISHED: tuple[Family, ...] = (
    Family(
        name="cogvideo",
        transformer_class="CogVideoXTransformer3DModel",
        layers=(LayerRule(r"transformer_blocks\.\d+\.attn1", "start"),),
        read_call=calls.frames_first_call,
        # Its VAE decodes a latent frame to 4 frames, and drops one of the first only where their number is odd.
        frame_unit=8,
    ),
    Family(
        name="wan",
        transformer_class="WanTransformer3DModel",
        layers=_BLOCKS_ATTN1,
        transformers=("transformer", "transformer_2"),
        upstream=_WAN_UPSTREAM,
    ),
    Family(
        name="wan-vace",
        transformer_class="WanVACETransformer3DModel",
        layers=(LayerRule(r"(vace_)?blocks\.\d+\.attn1"),),
        transformers=("transformer", "transformer_2"),
    ),
    Family(
        name="hunyuan-video",
        transformer_class="HunyuanVideoTransformer3DModel",
        layers=(LayerRule(_DOUBLE_AND_SINGLE, "end"),),
        upstream=_DOUBLE_AND_SINGLE_UPSTREAM,
    ),
    Family(
        name="hunyuan-video-1.5",
        transformer_class="HunyuanVideo15Transformer3DModel",
        layers=(LayerRule(r"transformer_blocks\.\d+\.attn", "end"),),
        guidance="guider",
    ),
    Family(
        name="ltx",
        transformer_class="LTXVideoTransformer3DModel",
        layers=_TRANSFORMER_BLOCKS_ATTN1,
        read_call=calls.packed_video_call,
        frame_unit=8,
    ),
    Family(  # the audio's own attention has too few tokens for sparsity to help
        name="ltx2",
        transformer_class="LTX2VideoTransformer3DModel",
        layers=_TRANSFORMER_BLOCKS_ATTN1,
        read_call=calls.packed_video_call,
        frame_unit=8,
    ),
    Family(
        name="mochi",
        transformer_class="MochiTransformer3DModel",
        upstream=((r"blocks\.(\d+)\.attn", r"transformer_blocks.\1.attn1"),),
        layers=(LayerRule(r"transformer_blocks\.\d+\.attn1", "end"),),
        frame_unit=6,
    ),
    Family(
        name="allegro",
        transformer_class="AllegroTransformer3DModel",
        layers=_TRANSFORMER_BLOCKS_ATTN1,
        first_frames=0,
        tiled_vae=True,
    ),
    Family(
        name="easyanimate",
        transformer_class="EasyAnimateTransformer3DModel",
        layers=(LayerRule(r"transformer_blocks\.\d+\.attn1", "start"),),
        no_negative="",
    ),
    Family(
        name="skyreels-v2",
        transformer_class="SkyReelsV2Transformer3DModel",
        layers=_BLOCKS_ATTN1,
        upstream=_WAN_UPSTREAM,
    ),
    Family(
        name="cosmos-2.5",
        transformer_class="CosmosTransformer3DModel",
        layers=_TRANSFORMER_BLOCKS_ATTN1,
        steps=calls.sigmas,
        pipelines="Cosmos2_5_.*",
    ),
    Family(
        name="cosmos-2-image",
        transformer_class="CosmosTransformer3DModel",
        layers=_TRANSFORMER_BLOCKS_ATTN1,
        frame_unit=0,
        steps=calls.sigma_ratios,
        pipelines="Cosmos2TextToImagePipeline",
    ),
    Family(
        name="cosmos-2",
        transformer_class="CosmosTransformer3DModel",
        layers=_TRANSFORMER_BLOCKS_ATTN1,
        steps=calls.sigma_ratios,
        pipelines="Cosmos2.*",
        from_image="Cosmos2VideoToWorldPipeline",
    ),
    Family(
        name="anima",
        transformer_class="CosmosTransformer3DModel",
        layers=_TRANSFORMER_BLOCKS_ATTN1,
        frame_unit=0,
        steps=None,
        pipelines="Anima.*",
    ),
    Family(
        name="cosmos",
        transformer_class="CosmosTransformer3DModel",
        layers=_TRANSFORMER_BLOCKS_ATTN1,
        frame_unit=8,
        from_image="CosmosVideoToWorldPipeline",
    ),
    Family(
        name="flux",
        transformer_class="FluxTransformer2DModel",
        layers=(LayerRule(_DOUBLE_AND_SINGLE, "start"),),
        read_call=calls.positioned_call,
        frame_unit=0,
        steps=calls.flow_times,
        packing=2,
        upstream=_DOUBLE_AND_SINGLE_UPSTREAM,
    ),
    Family(
        name="sd3",
        transformer_class="SD3Transformer2DModel",
        layers=(LayerRule(r"transformer_blocks\.\d+\.attn", "end"), LayerRule(r"transformer_blocks\.\d+\.attn2")),
        read_call=calls.latents_call,
        frame_unit=0,
    ),
    Family(
        name="qwen-image",
        transformer_class="QwenImageTransformer2DModel",
        layers=(LayerRule(r"transformer_blocks\.\d+\.attn", "start"),),
        read_call=calls.shaped_call,
        frame_unit=0,
        steps=calls.flow_times,
        guidance="true_cfg_scale",
        no_negative=" ",  # its authors' default: without one there is no guidance
    ),
)

_BLOCKS = r"transformer_blocks\.\d+\."
_VISUAL = "visual_" + _BLOCKS

# Name, transformer class, path of its self-attention, position of text in it, how its calls are read. Their steps are
# counted by the scheduler; images have latents of which the pipeline packs 2 × 2 to a token where they are positioned.
_PACKED = (calls.positioned_call, calls.all_positioned_call, calls.listed_call)
_Row = tuple[str, str, str, TextPlace | None, ReadCall]
_ROWS: tuple[_Row, ...] = (
    ("auraflow", "AuraFlowTransformer2DModel", "(joint|single)_" + _BLOCKS + "attn", "start", calls.latents_call),
    ("bria", "BriaTransformer2DModel", _DOUBLE_AND_SINGLE, "start", calls.positioned_call),
    ("bria-fibo", "BriaFiboTransformer2DModel", _DOUBLE_AND_SINGLE, "start", calls.positioned_call),
    ("bria-fibo-2", "BriaFibo2Transformer2DModel", r"layers\.\d+\.attention", "start", calls.context_call),
    ("chroma", "ChromaTransformer2DModel", _DOUBLE_AND_SINGLE, "start", calls.positioned_call),
    ("cogview-3-plus", "CogView3PlusTransformer2DModel", _BLOCKS + "attn1", "start", calls.latents_call),
    ("cogview-4", "CogView4Transformer2DModel", _BLOCKS + "attn1", "start", calls.latents_call),
    ("ernie-image", "ErnieImageTransformer2DModel", r"layers\.\d+\.self_attention", "end", calls.latents_call),
    ("flux-2", "Flux2Transformer2DModel", _DOUBLE_AND_SINGLE, "start", calls.positioned_call),
    ("glm-image", "GlmImageTransformer2DModel", _BLOCKS + "attn1", "start", calls.latents_call),
    ("hidream", "HiDreamImageTransformer2DModel", r"\w+_stream_blocks\.\d+\.block\.attn1", "end", calls.latents_call),
    ("hunyuan-dit", "HunyuanDiT2DModel", r"blocks\.\d+\.attn1", None, calls.latents_call),
    ("hunyuan-image", "HunyuanImageTransformer2DModel", _DOUBLE_AND_SINGLE, "end", calls.latents_call),
    ("ideogram-4", "Ideogram4Transformer2DModel", r"layers\.\d+\.attention", "start", calls.all_positioned_call),
    ("krea-2", "Krea2Transformer2DModel", _BLOCKS + "attn", "start", calls.all_positioned_call),
    ("longcat-image", "LongCatImageTransformer2DModel", _DOUBLE_AND_SINGLE, "start", calls.positioned_call),
    ("lumina", "LuminaNextDiT2DModel", r"layers\.\d+\.attn1", None, calls.latents_call),
    ("lumina-2", "Lumina2Transformer2DModel", r"layers\.\d+\.attn", "start", calls.latents_call),
    ("ovis-image", "OvisImageTransformer2DModel", _DOUBLE_AND_SINGLE, "start", calls.positioned_call),
    ("pixart", "PixArtTransformer2DModel", _BLOCKS + "attn1", None, calls.latents_call),
    ("z-image", "ZImageTransformer2DModel", r"layers\.\d+\.attention", "end", calls.listed_call),
)  # fmt: skip
_VIDEO_ROWS: tuple[_Row, ...] = (
    ("anyflow", "AnyFlowTransformer3DModel", r"blocks\.\d+\.attn1", None, calls.frames_first_call),
    ("chronoedit", "ChronoEditTransformer3DModel", r"blocks\.\d+\.attn1", None, calls.latents_call),
    ("consisid", "ConsisIDTransformer3DModel", _BLOCKS + "attn1", "start", calls.frames_first_call),
    ("framepack", "HunyuanVideoFramepackTransformer3DModel", _DOUBLE_AND_SINGLE, None, calls.sequence_call),
    ("helios", "HeliosTransformer3DModel", r"blocks\.\d+\.attn1", "start", calls.latents_call),
    ("joyimage", "JoyImageEditTransformer3DModel", r"double_blocks\.\d+\.attn", "end", calls.items_call),
    ("joyimage-plus", "JoyImageEditPlusTransformer3DModel", r"double_blocks\.\d+\.attn", "end", calls.patches_call),
    ("kandinsky-5", "Kandinsky5Transformer3DModel", _VISUAL + "self_attention", None, calls.frames_rows_call),
    ("kandinsky-6", "Kandinsky6Transformer3DModel", _VISUAL + "video.+self_attention", None, calls.frames_rows_call),
    ("minimax-h3", "MiniMaxH3Transformer3DModel", _BLOCKS + "attn", "start", calls.all_positioned_call),
    ("motif-video", "MotifVideoTransformer3DModel", _DOUBLE_AND_SINGLE, "end", calls.latents_call),
    ("wan-animate", "WanAnimateTransformer3DModel", r"blocks\.\d+\.attn1", None, calls.latents_call),
)  # fmt: skip

FAMILIES = (
    *_PUBLISHED,
    *(
        Family(
            name, kind, (LayerRule(path, text),), read, frame_unit=0, steps=None,
            packing=2 if read in _PACKED else 1,
        )
        for name, kind, path, text, read in _ROWS
    ),
    Family(
        name="flux-3",
        transformer_class="Flux3Transformer2DModel",
        layers=(LayerRule("single_" + _BLOCKS + "attn", "start"), LayerRule(r"mode_blocks\.image\.\d+\.attn")),
        read_call=calls.positioned_call,
        frame_unit=0,
        steps=None,
    ),
    *(
        Family(name, kind, (LayerRule(path, text),), read, steps=None)
        for name, kind, path, text, read in _VIDEO_ROWS
    ),
)  # fmt: skip

_IMAGE_QUERIES = (
    "its queries are the image's tokens alone while its keys are also the text's; block maps need both to be the same"
)
REFUSED = {
    "AnyFlowFARTransformer3DModel": (
        "it generates chunk by chunk under a causal mask of FlexAttention and keeps earlier chunks' keys in a cache"
    ),
    "Cosmos3OmniTransformer": (
        "its queries are the video's tokens alone while its keys are also the text's, and heads share keys"
    ),
    "Kandinsky6SRTransformer3DModel": "its own sparse attention (NABLA) already skips blocks, by FlexAttention",
    "NucleusMoEImageTransformer2DModel": _IMAGE_QUERIES,
    "OmniGenTransformer2DModel": "its attention mask is causal over text and full over images in one sequence",
    "PRXTransformer2DModel": _IMAGE_QUERIES,
    "QwenImage21Transformer2DModel": (
        "its attention is block-causal: text and condition images are computed once and kept in a cache of keys, which "
        "the image's queries alone attend to"
    ),
    "SanaWMTransformer3DModel": "three of four of its layers are linear attention, which has no blocks to skip",
    "WanAnimate2Transformer3DModel": (
        "each of its frames attends to all tokens and to a cached reference frame, under a mask of FlexAttention"
    ),
}
"""Transformer classes that `sparsify` rejects, with the reason."""
