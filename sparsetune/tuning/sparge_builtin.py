"""SpargeAttn's own search, on the attention calls of any model family."""

import contextlib
import importlib
import importlib.util
import inspect
import io
import logging
import time
from concurrent.futures import BrokenExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from sparsetune.attention.backends.sparge import SpargeBackend
from sparsetune.attention.interception import AttentionCall, Interception
from sparsetune.attention.policy import Policy
from sparsetune.attention.sites import AttentionSites, TransformerSite
from sparsetune.attention.thresholds import LayerThresholds
from sparsetune.attention.unmask import Refusal, UnmaskedCall, unmasked_call
from sparsetune.checkpoint import read_sparge_pt
from sparsetune.checkpoint.policy_file import from_columns
from sparsetune.errors import TuningError
from sparsetune.executor import StepDone
from sparsetune.files import atomic_path
from sparsetune.models.families import attention_sites
from sparsetune.tuning.context import TuningContext
from sparsetune.tuning.events import tell
from sparsetune.tuning.sparge_pool import check_gpus, parallel_tuning

CONTRACT = {
    "SparseAttentionMeansim": ("l1", "pv_l1"),
    "SparseAttentionMeansim.forward": ("q", "k", "v", "tune_mode"),
    "SparseAttentionMeansim.autotune": ("head_idx",),
    "extract_sparse_attention_state_dict": ("model",),
    "GPUProcessPoolExecutor": (),
    "executor.submit": (),
    "executor.shutdown": (),
}
"""What is used of `spas_sage_attn.autotune`, as of SpargeAttn's commit bfd980b: names, and the parameters given."""

COLUMNS = ("is_sparse", "cdfthreshd", "simthreshd1", "simthreshd2", "pvthreshd")
"""A tuned module's state, one value a head, in the order of its state dict."""

_PACKAGE = "spas_sage_attn"


def check_builtin(device: torch.device | str = "cuda", *, parallel: bool = False) -> None:
    """Check that SpargeAttn's own search can run, before a model is loaded for it.

    Args:
        device: where the model will be.
        parallel: whether heads are to be searched on several GPUs.

    Raises:
        TuningError: the package or a GPU is missing, the package isn't one that this search knows, or heads can't be
            shared among the GPUs there are.
    """
    _autotune(torch.device(device))
    if parallel:
        check_gpus()


def checkpoint_file(bench: TuningContext, transformer: str = "transformer") -> Path:
    """Say where the thresholds are left in SpargeAttn's format, named as its users do: NAME_L1_PVL1.pt.

    Args:
        bench: what the search works with.
        transformer: the pipeline's attribute; any other than `transformer` has its name in the file's.
    """
    tune, suffix = bench.config.tune, "" if transformer == "transformer" else f"_{transformer}"
    return bench.output_dir / f"{bench.renderer.loaded.identity.name}_{tune.l1:g}_{tune.pv_l1:g}{suffix}.pt"


def run_builtin(bench: TuningContext) -> Policy:
    """Run `SparseAttentionMeansim`'s search on every self-attention call of dense renderings of the tune prompts.

    Each layer has a module of SpargeAttn's, called in its tune mode with the layer's q, k and v; the video stays
    dense, and goes to the cache. After each prompt the thresholds found so far are saved by SpargeAttn's own state
    dict (`checkpoint_file`). Once `tune.max_minutes` are over only layers that have no thresholds yet are searched,
    and no further prompt is begun.

    As in SpargeAttn, the search knows neither token orders nor dense steps, and keeps no block of its own (rendering
    keeps the first one). Its search takes a softmax scale of head_dim^-0.5 for granted; other calls are refused. Before
    Ada it searches with its SageAttention1 kernel.

    Args:
        bench: what the search works with; `tune.l1` and `tune.pv_l1` bound the relative L1 error of a head's output,
            `tune.parallel_tune` spreads heads over all GPUs, and finds the same.

    Returns:
        The thresholds: raster order, no dense steps, keep_text False.

    Raises:
        TuningError: the package or a GPU is missing, heads can't be shared among the GPUs, or a layer's calls are none
            that it can search.
        GenerationError: a rendering failed.
    """
    if bench.config.tune.parallel_tune:
        check_gpus()
    package = _autotune(bench.renderer.loaded.device)
    sites = attention_sites(bench.renderer.loaded.pipe)
    search = _Search(bench, package, sites)
    interception = Interception(sites, search.attend)
    try:
        with parallel_tuning(package, bench.config.tune.parallel_tune):
            for index in range(len(bench.prompts)):
                search.prompt(index)
                policy = search.save()
                if search.is_over():
                    break
    except BrokenExecutor as error:
        raise TuningError(
            f"SpargeAttn's parallel tuning must keep a process on each GPU, but one died ({error}); "
            "leave --parallel-tune out, or use --tuner calibrate"
        ) from error
    finally:
        interception.remove()
    return policy


class _Search:
    """SpargeAttn's modules, one a layer, and what they were given."""

    def __init__(self, bench: TuningContext, package: ModuleType, sites: AttentionSites) -> None:
        tune = bench.config.tune
        self._bench, self._package, self._sites = bench, package, sites
        self._modules: dict[str, Any] = {
            layer.name: package.SparseAttentionMeansim(l1=tune.l1, pv_l1=tune.pv_l1) for layer in sites.layers
        }
        self._kernel = SpargeBackend(bench.renderer.loaded.device)
        self._refused: dict[str, str] = {}
        self._seconds = 0.0

    def is_over(self) -> bool:
        """Whether the time that was given is spent."""
        return self._bench.seconds_left is not None and self._bench.seconds_left <= 0.0

    def prompt(self, index: int) -> None:
        """Search along the dense rendering of one prompt, and keep its video."""
        bench, prompt, seed = self._bench, self._bench.prompts[index], self._bench.config.tune.seed
        self._seconds = 0.0

        def on_step(step: int, num_steps: int) -> None:
            self._check(self._refused)  # before days are spent
            event = StepDone("calibration", "dense", step, num_steps, index, len(bench.prompts))
            tell(bench.listeners, lambda listener: listener.on_step(event))

        rendering = bench.renderer.render(prompt, seed, on_step)
        self._check(self._modules)

        bench.keep_dense(prompt, rendering.frames, rendering.seconds - self._seconds)

    def attend(self, call: AttentionCall) -> Tensor:
        """Search on a call, and run it as the pipeline made it."""
        name, plain = call.layer.name, unmasked_call(call)
        reason = plain.reason if isinstance(plain, Refusal) else self._refusal(plain)
        if isinstance(plain, Refusal) or reason is not None:
            self._refused[name] = str(reason)
        elif not self.is_over() or self._modules[name].is_sparse is None:
            self._tune(self._modules[name], plain)
        return call.original()

    def _refusal(self, plain: UnmaskedCall) -> str | None:
        if abs(plain.scale * plain.q.shape[-1] ** 0.5 - 1.0) > 1e-6:
            return f"its softmax scale {plain.scale:g} isn't head_dim^-0.5"
        return self._kernel.refusal(plain.q, plain.k, plain.v)

    def _tune(self, module: Any, plain: UnmaskedCall) -> None:
        if plain.q.is_cuda:
            torch.cuda.synchronize(plain.q.device)  # else the wait for earlier work would count as ours
        started = time.perf_counter()
        with (
            torch.cuda.device_of(plain.q),  # type: ignore[no-untyped-call]
            # Ordinary tensors rather than those of inference mode: modules outlive it, and go to other processes.
            torch.inference_mode(False),
            torch.no_grad(),
            contextlib.redirect_stdout(io.StringIO()),  # it prints every layer's thresholds at every step
        ):
            module(*(x.clone() for x in (plain.q, plain.k, plain.v)), tune_mode=True)
        self._seconds += time.perf_counter() - started

    def _check(self, layers: dict[str, Any]) -> None:
        """Check that each of these layers has thresholds."""
        for name in layers:
            if self._modules[name].is_sparse is None:
                raise TuningError(
                    f"every self-attention layer must be one that SpargeAttn's search can take, but {name} isn't: "
                    f"{self._refused.get(name, 'no attention call was made there')}; use --tuner calibrate"
                )

    def save(self) -> Policy:
        """Save the thresholds in SpargeAttn's format, a file a transformer, and check what our loader makes of it.

        Its own loader compares parts of names: of models with `single_transformer_blocks` it reads some wrongly.
        """
        found: list[LayerThresholds] = []
        for transformer in self._sites.transformers:
            path = checkpoint_file(self._bench, transformer.name)
            tensors = self._package.extract_sparse_attention_state_dict(_skeleton(transformer, self._modules))
            with atomic_path(path) as temporary:
                torch.save({key: tensor.detach().cpu() for key, tensor in tensors.items()}, temporary)
            layers = [self._thresholds(layer.name) for layer in transformer.layers]
            read = read_sparge_pt(path, root=transformer.name)
            if {layer.name: layer for layer in read.layers} != {layer.name: layer for layer in layers}:
                raise TuningError(f"{path} must hold the thresholds that were found, but reads otherwise; report this")
            found += layers
        return Policy(tuple(found))

    def _thresholds(self, name: str) -> LayerThresholds:
        return from_columns(name, "cdf", {column: getattr(self._modules[name], column) for column in COLUMNS})


def _skeleton(transformer: TransformerSite, modules: dict[str, Any]) -> nn.Module:
    """Give a module with nothing in it but SpargeAttn's, under the names that they have in a patched transformer."""
    skeleton = nn.Module()
    for layer in transformer.layers:
        parent = skeleton
        for part in layer.name.removeprefix(f"{transformer.name}.").split("."):
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module("inner_attention", modules[layer.name])
    return skeleton


def _autotune(device: torch.device) -> ModuleType:
    """Import `spas_sage_attn.autotune`; raise TuningError where it can't be had or isn't as we know it."""
    missing = []
    if importlib.util.find_spec(_PACKAGE) is None:
        missing.append(f"{_PACKAGE} is not installed")
    if not torch.cuda.is_available():
        missing.append("there is no CUDA GPU")
    reason = " and ".join(missing) or SpargeBackend.missing(device)
    if reason is not None:
        raise _refusal(reason)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        package = importlib.import_module(f"{_PACKAGE}.autotune")
    except (ImportError, OSError) as error:
        cause = " ".join(str(error).split())[:120]
        raise _refusal(f"{_PACKAGE}.autotune can't be imported ({cause})") from error
    finally:  # on import it configures the logging of the whole program
        root.handlers[:] = handlers
        root.setLevel(level)
    unmet = [name for name, given in CONTRACT.items() if not _offers(package, name, given)]
    if unmet:
        raise _refusal(f"its {', '.join(unmet)} isn't as in SpargeAttn's commit bfd980b")
    return package


def _offers(package: ModuleType, name: str, given: tuple[str, ...]) -> bool:
    found: Any = package
    for part in name.split("."):
        found = getattr(found, part, None)
    return callable(found) and set(given) <= set(inspect.signature(found).parameters)


def _refusal(reason: str) -> TuningError:
    return TuningError(
        f"--tuner builtin must have SpargeAttn's package and a CUDA GPU, but {reason}; "
        "use --tuner calibrate, which needs neither"
    )
