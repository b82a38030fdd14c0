"""`--tuner builtin`: SpargeAttn's own search on the attention calls of any model family, on one GPU or several."""

import contextlib
import copy
import importlib
import importlib.util
import inspect
import io
import logging
import os
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sparsetune.attention.backends.sparge import SpargeBackend
from sparsetune.attention.interception import AttentionCall, Interception
from sparsetune.attention.policy import Policy
from sparsetune.attention.sites import AttentionSites, TransformerSite
from sparsetune.attention.thresholds import LayerThresholds
from sparsetune.attention.unmask import Refusal, UnmaskedCall, unmasked_call
from sparsetune.bench.latency import device_clock
from sparsetune.checkpoint import read_sparge_pt
from sparsetune.checkpoint.policy_file import Column, from_columns
from sparsetune.errors import TuningError
from sparsetune.executor import StepDone
from sparsetune.files import atomic_path
from sparsetune.models.families import attention_sites
from sparsetune.tuning.context import TuningContext
from sparsetune.tuning.events import notify

CONTRACT = {
    "SparseAttentionMeansim": ("l1", "pv_l1"),
    "SparseAttentionMeansim.forward": ("q", "k", "v", "tune_mode"),
    "SparseAttentionMeansim.autotune": ("head_idx",),
    "extract_sparse_attention_state_dict": ("model",),
    "GPUProcessPoolExecutor": (),
    "executor.submit": (),
    "executor.shutdown": (),
}
"""Names of `spas_sage_attn.autotune` that are used, with the parameters passed, as of SpargeAttn's commit bfd980b."""

COLUMNS = ("is_sparse", "cdfthreshd", "simthreshd1", "simthreshd2", "pvthreshd")
"""State of a tuned module, one value per head, in the order of its state dict."""

_PACKAGE = "spas_sage_attn"

VARIABLE = "PARALLEL_TUNE"
"""Environment variable that SpargeAttn reads at every call: if set, its processes search the heads."""


def check_builtin(*, parallel: bool = False) -> None:
    """Raise TuningError, before a model is loaded, where the search could not run: see `_autotune`, `check_gpus`."""
    _autotune(torch.device("cuda"))
    if parallel:
        check_gpus()


def checkpoint_file(context: TuningContext, transformer: str = "transformer") -> Path:
    """File of the thresholds in SpargeAttn's format, named as its users do: NAME_L1_PVL1.pt.

    A pipeline's attribute other than `transformer` is a suffix of the file's name.
    """
    tune, suffix = context.config.tune, "" if transformer == "transformer" else f"_{transformer}"
    return context.output_dir / f"{context.renderer.loaded.identity.name}_{tune.l1:g}_{tune.pv_l1:g}{suffix}.pt"


def run_builtin(context: TuningContext) -> Policy:
    """Run `SparseAttentionMeansim`'s search on every self-attention call of dense renderings of the tune prompts.

    Each layer has a module of SpargeAttn's, called in its tune mode with the layer's q, k and v; the video stays
    dense, and goes to the cache. After each prompt the thresholds so far are saved by SpargeAttn's own state dict
    (`checkpoint_file`). Once `tune.max_minutes` are over, only layers without thresholds are searched, and no further
    prompt is started.

    As in SpargeAttn, the search has neither token orders nor dense steps, and always computes no block (rendering
    computes the first one). It assumes a softmax scale of head_dim^-0.5; other calls are refused. Before Ada it uses
    its SageAttention1 kernel. `tune.parallel_tune` distributes heads over all GPUs, with the same result.
    """
    if context.config.tune.parallel_tune:
        check_gpus()
    package = _autotune(context.renderer.loaded.device)
    sites = attention_sites(context.renderer.loaded.pipe)
    search = _Search(context, package, sites)
    interception = Interception(sites, search.attend)
    try:
        with parallel_tuning(package, context.config.tune.parallel_tune):
            for index in range(len(context.prompts)):
                search.prompt(index)
                policy = search.save()
                if not context.has_time():
                    break
    except BrokenExecutor as error:
        raise TuningError(
            f"a process of SpargeAttn's parallel tuning died ({error}); "
            "run without --parallel-tune, or with --tuner calibrate"
        ) from error
    finally:
        interception.remove()
    return policy


class _Search:
    """The search: one module of SpargeAttn's for each layer."""

    def __init__(self, context: TuningContext, package: ModuleType, sites: AttentionSites) -> None:
        tune = context.config.tune
        self._context, self._package, self._sites = context, package, sites
        self._modules: dict[str, Any] = {
            layer.name: package.SparseAttentionMeansim(l1=tune.l1, pv_l1=tune.pv_l1) for layer in sites.layers
        }
        self._kernel = SpargeBackend(context.renderer.loaded.device)
        self._refused: dict[str, str] = {}
        self._seconds = 0.0

    def prompt(self, index: int) -> None:
        context, prompt, seed = self._context, self._context.prompts[index], self._context.config.tune.seed
        self._seconds = 0.0

        def on_step(step: int, num_steps: int) -> None:
            self._check(self._refused)  # a whole search takes days
            event = StepDone("calibration", "dense", step, num_steps, index, len(context.prompts))
            notify(context.listeners, lambda listener: listener.on_step(event))

        rendering = context.renderer.render(prompt, seed, on_step)
        self._check(self._modules)
        context.keep_dense(prompt, rendering.frames, rendering.seconds - self._seconds)

    def attend(self, call: AttentionCall) -> Tensor:
        name, plain = call.layer.name, unmasked_call(call)
        reason = plain.reason if isinstance(plain, Refusal) else self._refusal(plain)
        if isinstance(plain, Refusal) or reason is not None:
            self._refused[name] = str(reason)
        elif self._context.has_time() or self._modules[name].is_sparse is None:
            self._tune(self._modules[name], plain)
        return call.original()

    def _refusal(self, plain: UnmaskedCall) -> str | None:
        if abs(plain.scale * plain.q.shape[-1] ** 0.5 - 1.0) > 1e-6:
            return f"its softmax scale {plain.scale:g} isn't head_dim^-0.5"
        return self._kernel.refusal(plain.q, plain.k, plain.v)

    def _tune(self, module: Any, plain: UnmaskedCall) -> None:
        started = device_clock(plain.q.device)
        with (
            torch.cuda.device_of(plain.q),  # type: ignore[no-untyped-call]
            # Not tensors of inference mode: modules are used after it, and sent to other processes.
            torch.inference_mode(False),
            torch.no_grad(),
            contextlib.redirect_stdout(io.StringIO()),  # it prints every layer's thresholds at every step
        ):
            module(*(x.clone() for x in (plain.q, plain.k, plain.v)), tune_mode=True)
        self._seconds += device_clock(plain.q.device) - started

    def _check(self, layers: dict[str, Any]) -> None:
        for name in layers:
            if self._modules[name].is_sparse is None:
                raise TuningError(
                    f"SpargeAttn's search can't tune attention layer {name}: "
                    f"{self._refused.get(name, 'no attention call was made there')}; use --tuner calibrate"
                )

    def save(self) -> Policy:
        """Save the thresholds in SpargeAttn's format, one file per transformer, and check that our loader reads them.

        SpargeAttn's own loader compares parts of names, and misreads models with `single_transformer_blocks`.
        """
        found: list[LayerThresholds] = []
        for transformer in self._sites.transformers:
            path = checkpoint_file(self._context, transformer.name)
            tensors = self._package.extract_sparse_attention_state_dict(_skeleton(transformer, self._modules))
            with atomic_path(path) as temporary:
                torch.save({key: tensor.detach().cpu() for key, tensor in tensors.items()}, temporary)
            layers = [
                from_columns(layer.name, "cdf", _columns(self._modules[layer.name])) for layer in transformer.layers
            ]
            read = read_sparge_pt(path, root=transformer.name)
            if {layer.name: layer for layer in read.layers} != {layer.name: layer for layer in layers}:
                raise TuningError(f"{path} doesn't contain the thresholds that were saved; please report this bug")
            found += layers
        return Policy(tuple(found))


def _columns(module: Any) -> dict[str, Column]:
    return {column: getattr(module, column).detach().float().cpu().numpy() for column in COLUMNS}


def _skeleton(transformer: TransformerSite, modules: dict[str, Any]) -> nn.Module:
    """A module that contains only SpargeAttn's, under the names that they have in a patched transformer."""
    skeleton = nn.Module()
    for layer in transformer.layers:
        parent = skeleton
        for part in layer.name.removeprefix(f"{transformer.name}.").split("."):
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module("inner_attention", modules[layer.name])
    return skeleton


def check_gpus() -> None:
    """Raise TuningError where there are fewer than two GPUs, or GPUs of different kinds."""
    count = torch.cuda.device_count()
    if count < 2:
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        where = "" if shown is None else f" (CUDA_VISIBLE_DEVICES is {shown!r})"
        raise TuningError(f"--parallel-tune needs several CUDA GPUs, but this host has {count}{where}; run without it")
    kinds = {torch.cuda.get_device_capability(index): torch.cuda.get_device_name(index) for index in range(count)}
    if len(kinds) > 1:
        raise TuningError(
            "--parallel-tune needs GPUs of one kind, since SpargeAttn's kernel, and so the effect of a threshold, "
            f"differs between kinds, but this host has {' and '.join(sorted(kinds.values()))}; select one kind with "
            "CUDA_VISIBLE_DEVICES, or run without it"
        )


@contextlib.contextmanager
def parallel_tuning(package: Any, wanted: bool) -> Iterator[None]:
    """Have SpargeAttn search heads on all GPUs while the block runs, or one after the other where not wanted.

    Its processes start with the first call and have a CUDA context on their own GPU and on the model's, whose tensors
    they open. At the end of the block they exit, and the memory that the model's GPU held for them is freed. `wanted`
    overrides the user's own `PARALLEL_TUNE`.
    """
    before, pool = os.environ.pop(VARIABLE, None), package.executor
    if wanted:
        os.environ[VARIABLE] = "1"
        package.executor = KeepingPool(pool)
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)
        if before is not None:
            os.environ[VARIABLE] = before
        if wanted:
            pool.shutdown()
            package.executor = package.GPUProcessPoolExecutor()  # a pool that was shut down accepts no tasks
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]  # frees what the processes had open
                torch.cuda.empty_cache()


class KeepingPool:
    """Wraps SpargeAttn's `GPUProcessPoolExecutor` so that a module keeps what the processes found.

    The search of a head combines the results of all its calls, which are in the module's `hyperparams_cache`. But a
    process has a copy of the module, and returns only the thresholds: without this pool a parallel search uses only
    the last call, one step of one prompt. With it, the thresholds are those of the sequential search.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def submit(self, autotune: Any, *args: Any, head_idx: int, **kwargs: Any) -> Any:
        module = autotune.__self__
        sent = copy.copy(module)
        sent.hyperparams_cache = {head_idx: module.hyperparams_cache.get(head_idx, [])}  # the others' aren't needed
        future = self._pool.submit(search_head, sent, *args, head_idx=head_idx, **kwargs)

        def result() -> Any:
            thresholds, module.hyperparams_cache[head_idx] = future.result()
            return thresholds

        return SimpleNamespace(result=result)


def search_head(module: Any, *args: Any, head_idx: int, **kwargs: Any) -> tuple[Any, Any]:
    """In a process of the pool: return a head's thresholds and the results that they were chosen from."""
    thresholds = module.autotune(*args, head_idx=head_idx, **kwargs)
    return thresholds, module.hyperparams_cache[head_idx]


def _autotune(device: torch.device) -> ModuleType:
    """Import `spas_sage_attn.autotune`; raises TuningError where it is missing or has another interface."""
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
    finally:  # its import configures the root logger
        root.handlers[:] = handlers
        root.setLevel(level)
    changed = [name for name, parameters in CONTRACT.items() if not _has(package, name, parameters)]
    if changed:
        raise _refusal(f"its {', '.join(changed)} isn't as in SpargeAttn's commit bfd980b")
    return package


def _has(package: ModuleType, name: str, parameters: tuple[str, ...]) -> bool:
    found: Any = package
    for part in name.split("."):
        found = getattr(found, part, None)
    return callable(found) and set(parameters) <= set(inspect.signature(found).parameters)


def _refusal(reason: str) -> TuningError:
    return TuningError(
        f"--tuner builtin needs SpargeAttn's package and a CUDA GPU, but {reason}; "
        "use --tuner calibrate, which needs neither"
    )
