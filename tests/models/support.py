"""What the support table rests on: each pipeline class, tiny and with random weights, put through `sparsify`."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from sparsetune.attention.policy import Policy
from sparsetune.attention.schedule import DenseSchedule
from sparsetune.attention.stats import SparsityStats
from sparsetune.attention.thresholds import HeadThresholds
from sparsetune.models.families import attention_sites
from sparsetune.models.random_weights import blueprint, build_pipeline
from sparsetune.models.sparse import sparsify

DENSE = HeadThresholds(1.0, cdfthreshd=1.0)
HALF = HeadThresholds(-1.0, cdfthreshd=0.5)
STEPS = 2


@dataclass(frozen=True)
class Case:
    """A pipeline class, what it is built of, and what it is called with beside the prompt."""

    pipeline: str
    blueprint: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.pipeline}-{self.blueprint}"


def image(width: int = 192, height: int = 128) -> Image.Image:
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([across % 256, down % 256, (across + down) % 256], -1).astype(np.uint8))


def clip(num_frames: int = 9) -> list[Image.Image]:
    return [image().rotate(5 * frame) for frame in range(num_frames)]


VIDEO = {"height": 128, "width": 192, "num_frames": 9}
STILL = {"height": 256, "width": 256}
INPAINT = STILL | {"image": image(256, 256), "mask_image": image(256, 256).convert("L"), "strength": 1.0}
CASES = (
    Case("CogVideoXPipeline", "cogvideox-2b", VIDEO | {"max_sequence_length": 32}),
    Case("CogVideoXPipeline", "cogvideox-5b", VIDEO | {"max_sequence_length": 32}),
    Case("CogVideoXPipeline", "cogvideox-1.5-5b", VIDEO | {"num_frames": 13, "max_sequence_length": 32}),
    Case("CogVideoXImageToVideoPipeline", "cogvideox-5b-i2v", VIDEO | {"image": image(), "max_sequence_length": 32}),
    Case(
        "CogVideoXImageToVideoPipeline",
        "cogvideox-1.5-5b-i2v",
        VIDEO | {"num_frames": 13, "image": image(), "max_sequence_length": 32},
    ),
    Case(
        "CogVideoXVideoToVideoPipeline",
        "cogvideox-5b",
        {"height": 128, "width": 192, "video": clip(), "strength": 1.0, "max_sequence_length": 32},
    ),
    Case("WanPipeline", "wan2.1-t2v-1.3b", VIDEO),
    Case("WanPipeline", "wan2.1-t2v-14b", VIDEO),
    Case("WanPipeline", "wan2.2-t2v-a14b", VIDEO),
    Case("WanPipeline", "wan2.2-ti2v-5b", VIDEO | {"height": 256, "width": 384}),
    Case("WanImageToVideoPipeline", "wan2.1-i2v-14b", VIDEO | {"image": image()}),
    Case("WanImageToVideoPipeline", "wan2.2-i2v-a14b", VIDEO | {"image": image()}),
    Case("WanImageToVideoPipeline", "wan2.2-ti2v-5b", VIDEO | {"height": 256, "width": 384, "image": image(384, 256)}),
    Case("WanVideoToVideoPipeline", "wan2.1-t2v-1.3b", {"height": 128, "width": 192, "video": clip(), "strength": 1.0}),
    Case("WanVACEPipeline", "wan2.1-vace-1.3b", VIDEO),
    Case("HunyuanVideoPipeline", "hunyuanvideo", VIDEO | {"prompt_template": {"template": "{}", "crop_start": 0}}),
    Case("HunyuanVideo15Pipeline", "hunyuanvideo-1.5", {"height": 256, "width": 384, "num_frames": 9}),
    Case("LTXPipeline", "ltx-video", {"height": 256, "width": 512, "num_frames": 9}),
    Case(
        "LTXImageToVideoPipeline", "ltx-video", {"height": 256, "width": 512, "num_frames": 9, "image": image(512, 256)}
    ),
    Case(
        "LTXConditionPipeline",
        "ltx-video-0.9.5",
        {"height": 256, "width": 512, "num_frames": 9, "image": image(512, 256)},
    ),
    Case("LTX2Pipeline", "ltx-2", {"height": 256, "width": 512, "num_frames": 9}),
    Case(
        "LTX2ImageToVideoPipeline",
        "ltx-2",
        {"height": 256, "width": 512, "num_frames": 9, "image": image(512, 256), "image_crf": 0},
    ),
    Case("MochiPipeline", "mochi", VIDEO | {"num_frames": 13}),
    Case("AllegroPipeline", "allegro", VIDEO | {"num_frames": 12}),
    Case("EasyAnimatePipeline", "easyanimate", VIDEO),
    Case("SkyReelsV2Pipeline", "skyreels-v2-t2v-14b", VIDEO),
    Case("SkyReelsV2DiffusionForcingPipeline", "skyreels-v2-df-1.3b", VIDEO | {"base_num_frames": 9}),
    Case(
        "SkyReelsV2DiffusionForcingImageToVideoPipeline",
        "skyreels-v2-df-1.3b",
        VIDEO | {"base_num_frames": 9, "image": image()},
    ),
    Case(
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        "skyreels-v2-df-1.3b",
        VIDEO | {"num_frames": 17, "base_num_frames": 9, "overlap_history": 5, "video": clip()},
    ),
    Case("CosmosTextToWorldPipeline", "cosmos-1-t2w-7b", VIDEO | {"num_frames": 17}),
    Case("CosmosVideoToWorldPipeline", "cosmos-1-v2w-7b", VIDEO | {"num_frames": 17, "image": image()}),
    Case("Cosmos2TextToImagePipeline", "cosmos-2-t2i-2b", STILL),
    Case("Cosmos2VideoToWorldPipeline", "cosmos-2-v2w-2b", VIDEO | {"image": image()}),
    Case("Cosmos2_5_PredictBasePipeline", "cosmos-2.5-2b", VIDEO),
    Case("FluxPipeline", "flux-dev", STILL | {"max_sequence_length": 32}),
    Case(
        "FluxImg2ImgPipeline",
        "flux-dev",
        STILL | {"image": image(256, 256), "strength": 1.0, "max_sequence_length": 32},
    ),
    Case("FluxInpaintPipeline", "flux-dev", INPAINT | {"max_sequence_length": 32}),
    Case(
        "FluxKontextPipeline",
        "flux-dev",
        STILL | {"image": image(256, 256), "max_area": 65536, "_auto_resize": False, "max_sequence_length": 32},
    ),
    Case("StableDiffusion3Pipeline", "sd3-medium", STILL | {"max_sequence_length": 32}),
    Case(
        "StableDiffusion3Img2ImgPipeline",
        "sd3-medium",
        STILL | {"image": image(256, 256), "strength": 1.0, "max_sequence_length": 32},
    ),
    Case("StableDiffusion3InpaintPipeline", "sd3-medium", INPAINT | {"max_sequence_length": 32}),
    Case("QwenImagePipeline", "qwen-image", STILL | {"negative_prompt": "blurred", "true_cfg_scale": 2.0}),
    Case(
        "QwenImageImg2ImgPipeline",
        "qwen-image",
        STILL | {"image": image(256, 256), "strength": 1.0, "negative_prompt": "blurred", "true_cfg_scale": 2.0},
    ),
    Case("QwenImageInpaintPipeline", "qwen-image", INPAINT | {"negative_prompt": "blurred", "true_cfg_scale": 2.0}),
)


def build(case: Case) -> Any:
    """Build a case's pipeline: its blueprint's own, or another class over the same parts."""
    made = build_pipeline(blueprint(case.blueprint), "tiny")
    wanted = getattr(diffusers, case.pipeline)
    if not isinstance(made, wanted):
        takes = inspect.signature(wanted.__init__).parameters
        options = {name: value for name, value in blueprint(case.blueprint).options.items() if name in takes}
        made = wanted(**{name: part for name, part in made.components.items() if name in takes}, **options)
    made.set_progress_bar_config(disable=True)
    return made


def rendered(pipe: Any, case: Case) -> torch.Tensor:
    """Call a pipeline for its latents."""
    arguments = {
        "prompt": "a red circle moving right",
        "negative_prompt": "",
        "num_inference_steps": STEPS,
        "guidance_scale": 3.0,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
    } | case.arguments
    takes = inspect.signature(pipe.__call__).parameters
    with torch.inference_mode():
        output = pipe(**{name: value for name, value in arguments.items() if name in takes})
    found = output[0]
    return found if isinstance(found, torch.Tensor) else torch.as_tensor(np.asarray(found))


def policy(pipe: Any, head: HeadThresholds, **rest: Any) -> Policy:
    return Policy.uniform([(layer.name, layer.num_heads) for layer in attention_sites(pipe).layers], head, **rest)


@dataclass(frozen=True)
class Findings:
    """What a pipeline did under `sparsify`."""

    num_layers: int
    head_dims: tuple[int, ...]
    text: str
    difference: float  # at full density, largest over the latents' largest
    sparsity: float
    changed: bool
    restored: bool
    by_step: tuple[float, ...]
    fallbacks: dict[str, int]
    share: float  # of calls that ran sparse

    @property
    def exactness(self) -> str:
        """How near the dense latents are at full density."""
        return "bit for bit" if self.difference == 0.0 else "within 1e-5" if self.difference < 1e-5 else "no"

    @property
    def verdict(self) -> str:
        holds = self.exactness != "no" and self.changed and self.restored and self.sparsity > 0
        steps = len(self.by_step) == STEPS and self.by_step[0] == 0.0 and self.by_step[1] > 0.0
        if not (holds and steps):
            return "not"
        return "partly" if self.fallbacks else "supported"

    @property
    def reason(self) -> str:
        return "; ".join(f"{reason} ({count} calls)" for reason, count in self.fallbacks.items())


def examine(pipe: Any, render: Callable[[], torch.Tensor]) -> Findings:
    """Put a pipeline through `sparsify`."""
    sites = attention_sites(pipe)
    dense = render()

    def under(**rest: Any) -> tuple[torch.Tensor, SparsityStats]:
        with sparsify(pipe, policy(pipe, **rest), "reference") as handle:
            return render(), handle.stats()

    full, _ = under(head=DENSE)
    half, stats = under(head=HALF)
    _, scheduled = under(head=HALF, schedule=DenseSchedule(0.5))
    calls = stats.num_calls
    return Findings(
        num_layers=len(sites.layers),
        head_dims=tuple(sorted({layer.head_dim for layer in sites.layers})),
        text=", ".join(sorted({layer.text or "none" for layer in sites.layers})),
        difference=float((full - dense).abs().max() / dense.abs().max()),
        sparsity=stats.sparsity,
        changed=not torch.equal(half, dense),
        restored=torch.equal(render(), dense),
        by_step=scheduled.by_step,
        fallbacks=stats.fallbacks,
        share=calls["sparse"] / max(1, sum(calls.values())),
    )


def graph_breaks(pipe: Any, render: Callable[[], torch.Tensor]) -> tuple[set[str], set[str], float]:
    """Compile a pipeline's transformers, dense and then sparse.

    Returns:
        Why the graphs of the dense and of the sparse model break, and the largest difference of the compiled sparse
        latents to those without compilation, over the largest latent.
    """
    names = [site.name for site in attention_sites(pipe).transformers]
    with sparsify(pipe, policy(pipe, HALF), "reference"):
        eager = render()
    plain = {name: getattr(pipe, name) for name in names}

    def compiled() -> tuple[torch.Tensor, set[str]]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        for name in names:
            setattr(pipe, name, torch.compile(plain[name], backend="eager"))
        output = render()
        return output, set(torch._dynamo.utils.counters["graph_break"])

    try:
        _, dense_breaks = compiled()
        with sparsify(pipe, policy(pipe, HALF), "reference"):
            output, sparse_breaks = compiled()
    finally:
        for name, module in plain.items():
            setattr(pipe, name, module)
        torch._dynamo.reset()
    return dense_breaks, sparse_breaks, float((output - eager).abs().max() / eager.abs().max())
