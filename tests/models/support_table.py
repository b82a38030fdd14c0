"""The support table as a page of the documentation."""

from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from sparsetune.config import resolve
from sparsetune.config.files import named_configs
from sparsetune.models.loading import is_commit
from sparsetune.models.random_weights import blueprint
from tests.models.other_pipelines import UNTRIED, others

COLUMNS = ("verdict", "text", "exactness", "compiled", "reason")
_UNSAID = {"compiled": "as above"}
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
- **torch.compile**: whether sparse attention breaks the compiled graph. Some models break it themselves. *as above* is
  another pipeline of a transformer that was compiled.

Heads of another width than 64 or 128 run padded with zeros on kernels that only know those: the block map and the
output are the same but for the rounding of one factor on q.

`transformer.compile_repeated_blocks()` compiles a block once for all layers, sparse as dense. Together with a policy
work (`tests/models/test_combinations.py`): LoRAs, `enable_model_cpu_offload` and `enable_sequential_cpu_offload`, group
offloading, FP8 layerwise casting, VAE tiling, `set_attention_backend`, and caches (first block, pyramid attention
broadcast: what they skip isn't counted). Offloading was tried on a CPU that stands in for the GPU too: the hooks, and
weights on the meta device, are the same, copies between two devices are not. `tests/models/test_offload_gpu.py` tries
it on a GPU and has not been run yet. Context parallelism is refused.

A ControlNet's own attention stays dense and isn't counted.

| pipeline | built as | works | text | full density | torch.compile | runs dense |
| --- | --- | --- | --- | --- | --- | --- |
"""
_TAIL = """
## Not tried

Their transformer is one of a supported family, so `sparsify` takes them; no test shows what it does.

| pipeline | why |
| --- | --- |
"""
_OTHERS = """
## Not supported

All further pipelines of diffusers {version}.

| why | pipelines |
| --- | --- |
"""
_CONFIGURATIONS = """
## Configurations

What `sparsetune models` lists; `--random-weights [--tiny]` builds any of them without a download. Layers, heads, widths
and tokens are those of the model that diffusers builds from the settings in the last column. A revision is pinned where
several projects name the same commit of that repository in public; nothing was downloaded to check it. Where none is
pinned, what the hub gives is loaded with a warning, and its commit is recorded in results and manifests.

| name | hub id | revision | settings from |
| --- | --- | --- | --- |
"""


@dataclass
class Table:
    """The rows by case, each with a value for every one of `COLUMNS`."""

    rows: dict[str, dict[str, str]] = field(default_factory=dict)
    writing: bool = False

    @classmethod
    def read(cls, page: Path, writing: bool) -> "Table":
        rows = {}
        text = page.read_text(encoding="utf-8") if page.is_file() else ""
        for line in text.partition("## Not tried")[0].splitlines():
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
            cells = (pipeline, blueprint, *(row.get(column) or _UNSAID.get(column, "") for column in COLUMNS))
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
    for name in named_configs():
        if name == "demo":
            continue
        model = resolve(name, (), {}).model
        known = f"`{(model.revision or '')[:12]}`" if is_commit(model.revision) else None
        revision = known or (f"branch `{model.revision}`, not pinned" if model.revision else "not pinned")
        rows.append(f"| {name} | {model.source} | {revision} | {blueprint(name).facts_from} |")
    return rows
