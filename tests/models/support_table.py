"""The support table as a page of the documentation."""

from dataclasses import dataclass, field
from pathlib import Path

COLUMNS = ("verdict", "text", "exactness", "compiled", "reason")
_HEAD = """# Models

What `sparsify` does on each pipeline class of diffusers. The table is written by the tests that check it
(`tests/models/test_support.py`): each class is built tiny with random weights, rendered dense and sparse on the CPU's
reference backend, and put through `torch.compile`.

- **works**: at full density the latents are the dense ones; at half the probability (`cdfthreshd` 0.5) blocks are left
  out and the latents differ; the first half of the steps runs dense where the schedule says so; taking the policy off
  restores the pipeline exactly. *partly* names the calls that run dense, and why.
- **text**: where text tokens lie in the joint attention, which `keep_text` and the token orders follow; `none` where
  text comes in by cross-attention, which stays dense.
- **full density**: how near the dense latents are. Not bit for bit where a padding mask is cut off.
- **torch.compile**: whether sparse attention breaks the compiled graph. Some models break it themselves.

Heads of another width than 64 or 128 run padded with zeros on kernels that only know those: the block map and the
output are the same but for the rounding of one factor on q.

`transformer.compile_repeated_blocks()` compiles a block once for all layers, sparse as dense. LoRAs, CPU and group
offloading, FP8 layerwise casting, VAE tiling, `set_attention_backend` and caches (first block, pyramid attention
broadcast: what they skip isn't counted) work together with a policy (`tests/models/test_combinations.py`). Context
parallelism is refused.

| pipeline | built as | works | text | full density | torch.compile | runs dense |
| --- | --- | --- | --- | --- | --- | --- |
"""
_TAIL = """
## Not tried

| pipeline | why |
| --- | --- |
"""

_CONTROL = "takes a control image or a ControlNet beside the prompt; its transformer is one of the above"
_EDIT = "edits an image that its text encoder reads too; its transformer is one of the above"
_IMAGE_ENCODER = (
    "needs a vision-language encoder, which no small stand-in is made for; its transformer is one of the above"
)
_LTX2 = "a stage or variant of LTX-2 with inputs of its own; its transformer is one of the above"
_NO_TRANSFORMER = "has no transformer"
UNTRIED = {
    "CogVideoXFunControlPipeline": _CONTROL,
    "WanAnimatePipeline": "its transformer, WanAnimateTransformer3DModel, is none of a supported family",
    "HunyuanSkyreelsImageToVideoPipeline": "a third-party variant of HunyuanVideo; its transformer is one of the above",
    "HunyuanVideoFramepackPipeline": "its transformer, HunyuanVideoFramepackTransformer3DModel, mixes past frames in",
    "HunyuanVideoImageToVideoPipeline": _IMAGE_ENCODER,
    "HunyuanVideo15ImageToVideoPipeline": _IMAGE_ENCODER,
    "LTXI2VLongMultiPromptPipeline": "renders windows of a long video, each with a prompt of its own",
    "LTXLatentUpsamplePipeline": _NO_TRANSFORMER,
    "LTX2ConditionPipeline": _LTX2,
    "LTX2DFRPipeline": _LTX2,
    "LTX2DFRTemporalRefinePipeline": _LTX2,
    "LTX2HDRPipeline": _LTX2,
    "LTX2InContextPipeline": _LTX2,
    "LTX2LatentUpsamplePipeline": _NO_TRANSFORMER,
    "LTX2VideoDiffusionDecodePipeline": _LTX2,
    "EasyAnimateControlPipeline": _CONTROL,
    "EasyAnimateInpaintPipeline": "takes a masked video beside the prompt; its transformer is one of the above",
    "SkyReelsV2ImageToVideoPipeline": _IMAGE_ENCODER,
    "Cosmos2_5_TransferPipeline": _CONTROL,
    "Cosmos3OmniPipeline": "its transformer, Cosmos3OmniTransformer, is none of a supported family",
    "FluxControlImg2ImgPipeline": _CONTROL,
    "FluxControlInpaintPipeline": _CONTROL,
    "FluxControlNetImg2ImgPipeline": _CONTROL,
    "FluxControlNetInpaintPipeline": _CONTROL,
    "FluxControlNetPipeline": _CONTROL,
    "FluxControlPipeline": _CONTROL,
    "FluxFillPipeline": "takes a masked image, which its transformer has more channels for",
    "FluxKontextInpaintPipeline": _EDIT,
    "FluxPriorReduxPipeline": _NO_TRANSFORMER,
    "QwenImageControlNetInpaintPipeline": _CONTROL,
    "QwenImageControlNetPipeline": _CONTROL,
    "QwenImageEditInpaintPipeline": _EDIT,
    "QwenImageEditPipeline": _EDIT,
    "QwenImageEditPlusPipeline": _EDIT,
    "QwenImageLayeredPipeline": "renders several layers of an image at once",
}


@dataclass
class Table:
    """The rows by case, each with a value for every one of `COLUMNS`."""

    rows: dict[str, dict[str, str]] = field(default_factory=dict)
    writing: bool = False

    @classmethod
    def read(cls, page: Path, writing: bool) -> "Table":
        rows = {}
        text = page.read_text(encoding="utf-8") if page.is_file() else ""
        for line in text.partition(_TAIL.splitlines()[1])[0].splitlines():
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if line.startswith("| ") and len(cells) == len(COLUMNS) + 2 and cells[0].endswith("Pipeline"):
                rows[f"{cells[0]}-{cells[1]}"] = dict(zip(COLUMNS, cells[2:], strict=True))
        return cls(rows, writing)

    def check(self, case: str, **found: str) -> None:
        """Compare what was found with the committed row, or note it where the page is being written."""
        if self.writing:
            self.rows.setdefault(case, {}).update(found)
        else:
            assert {name: self.rows[case][name] for name in found} == found

    def page(self, order: list[str]) -> str:
        lines = []
        for case in order:
            pipeline, _, blueprint = case.partition("-")
            row = self.rows.get(case, {})
            cells = (pipeline, blueprint, *(row.get(column, "") for column in COLUMNS))
            lines.append(f"| {' | '.join(cells)} |")
        untried = [f"| {name} | {why} |" for name, why in UNTRIED.items()]
        return _HEAD + "\n".join(lines) + "\n" + _TAIL + "\n".join(untried) + "\n"
