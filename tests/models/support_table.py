"""The documentation page with the support table."""

from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from sparsetune.config import resolve
from sparsetune.config.files import published_models
from sparsetune.models.loading import is_commit
from sparsetune.models.random_weights import blueprint
from tests.models.other_pipelines import UNTRIED, others

COLUMNS = ("verdict", "text", "tokens", "exactness", "compiled", "reason")
_HEAD = """# Models

What `sparsify` does on each pipeline class of diffusers. The tests that check this table also generate it
(`tests/models/test_support.py`): they build each class tiny with random weights, render it dense and sparse on the
CPU's reference backend, and compile it with `torch.compile`.

- **works**: at full density the latents equal the dense ones; with `cdfthreshd` 0.5 blocks are skipped and the latents
  differ; the first half of the steps runs dense if the schedule says so; removing the policy restores the pipeline
  exactly. *partly* lists the calls that run dense, with the reason.
- **text**: the position of text tokens in joint attention, which `keep_text` and the token orders respect; `none` if
  text is used in cross-attention, which stays dense.
- **tokens**: what lies in a sequence of the tiny model, in order: text (and others that aren't the video's, such as
  audio or earlier frames), the grid of frames, rows and columns, and more, such as the tokens of reference images. A
  test orders the tokens of each call along a curve and puts them back.
- **full density**: how close the latents are to the dense ones. Not bit for bit if a padding mask is cut off.
- **torch.compile**: whether sparse attention breaks the compiled graph. Some models break it themselves.

Heads of a width other than 64 or 128 are padded with zeros for kernels that support only these widths: block map and
output are the same except for the rounding of one factor on q.

`--compile` compiles the transformer's repeated blocks (`torch.compile`) when the model is loaded, for dense and sparse
renderings alike: use it if you serve compiled models. A block is compiled once for all layers, two to six times in all
with other strides and with a policy; installing, changing and removing policies then compiles nothing again. Dense
videos are cached separately, since compiled kernels round differently, and results and checkpoints record it. It is
diffusers' `transformer.compile_repeated_blocks()`, and `block.compile()` for each block around self-attention where
diffusers names no repeated blocks (CogVideoX, Mochi, Allegro, EasyAnimate, Cosmos, SD3). It needs a C++ compiler on the
CPU, Triton on a GPU, and doesn't work with `--offload sequential`.

These work together with a policy (`tests/models/test_combinations.py`): LoRA, `enable_model_cpu_offload` and
`enable_sequential_cpu_offload`, group offloading, FP8 layerwise casting, VAE tiling, `set_attention_backend`, and
step caches (those of a policy, and a user's own; calls that they skip are counted as skipped). Offloading was tested
on a CPU in place of the GPU, where hooks and weights on the meta device are the same and copies between two devices are
not; `tests/models/test_offload_gpu.py` tests it on a GPU. Context parallelism is rejected.

A ControlNet's own attention stays dense and isn't counted.

## Other models

A model of no known family runs too, with a warning: whatever its class names call attention of the video is taken for
self-attention, its tokens count as one row, and the first key block is kept. Tell what you know of its tokens with
`layout`, for all its layers alike, here 77 text tokens before a video of 13 × 30 × 45 tokens:

<!-- not run: names a model that doesn't exist -->
```python
from sparsetune.attention.ordering import TokenLayout

handle = sparsify(pipe, policy, layout=TokenLayout(grid=(13, 30, 45), text=range(77)))
```

Or register a family, which works for all sizes. `sparsetune.models.calls` has functions that read a call's timestep and
grid, here of latents (batch, channels, frames, height, width):

<!-- not run: names a model that doesn't exist -->
```python
from sparsetune.models import calls
from sparsetune.models.families import register_family
from sparsetune.models.family import Family, LayerRule

layers = (LayerRule(r"blocks\\.\\d+\\.attn", text="start"),)
register_family(Family("mine", "MyTransformer3DModel", layers, calls.latents_call))
```

## Tested models

*transformer* is a tiny transformer with a scheduler, without text encoder and VAE.

| pipeline | built as | works | text | tokens | full density | torch.compile | runs dense |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""
_TAIL = """
## Not tested

Their transformer belongs to a supported family, so `sparsify` accepts them, but no test covers them.

| pipeline | why |
| --- | --- |
"""
_OTHERS = """
## Not supported

All other pipelines of diffusers {version}.

| why | pipelines |
| --- | --- |
"""
_CONFIGURATIONS = """
## Configurations

`sparsetune models` lists these; `--random-weights [--tiny]` builds any of them without a download. Layers, heads,
widths and tokens are those of the model that diffusers builds from the settings in the last column. A revision is
pinned if several public projects name the same commit of that repository; it was not downloaded to check it.
Without a pinned revision, the Hub's current one is loaded with a warning, and its commit is recorded in results and
manifests. Names with a number of steps are distilled to so many; `--random-weights` leaves their LoRA out.

| name | hub id | revision | settings from |
| --- | --- | --- | --- |
"""


@dataclass
class Table:
    """The rows by case, each with a value for each of `COLUMNS`."""

    rows: dict[str, dict[str, str]] = field(default_factory=dict)
    writing: bool = False

    @classmethod
    def read(cls, page: Path, writing: bool) -> "Table":
        rows = {}
        text = page.read_text(encoding="utf-8") if page.is_file() else ""
        for line in text.partition("## Not tested")[0].splitlines():
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if line.startswith("| ") and len(cells) == len(COLUMNS) + 2 and cells[0].endswith("Pipeline"):
                rows[f"{cells[0]}-{cells[1]}"] = dict(zip(COLUMNS, cells[2:], strict=True))
        return cls(rows, writing)

    def check(self, case: str, **found: str) -> None:
        """Compare results with the committed row, or record them if the page is being written."""
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
        rest = [f"| {why} | {', '.join(names)} |" for why, names in others().items()]
        parts = (
            (_HEAD, lines),
            (_TAIL, untried),
            (_OTHERS.format(version=version("diffusers")), rest),
            (_CONFIGURATIONS, _configurations()),
        )
        return "".join(head + "\n".join(rows) + "\n" for head, rows in parts)


def _configurations() -> list[str]:
    rows = []
    for name in published_models():
        model = resolve(name, (), {}).model
        known = f"`{(model.revision or '')[:12]}`" if is_commit(model.revision) else None
        revision = known or (f"branch `{model.revision}`, not pinned" if model.revision else "not pinned")
        source = model.source if model.lora is None else f"{model.source} with LoRA {model.lora}"
        rows.append(f"| {name} | {source} | {revision} | {blueprint(model.source).facts_from} |")
    return rows
