"""SpargeAttn's processes, one a GPU, that search heads in parallel."""

import contextlib
import copy
import os
from collections.abc import Iterator
from typing import Any

import torch

from sparsetune.errors import TuningError

VARIABLE = "PARALLEL_TUNE"
"""What SpargeAttn reads at every call: whether it is set says whether heads go to its processes."""


def check_gpus() -> None:
    """Check that there are GPUs to share heads among.

    Raises:
        TuningError: there are less than two, or they are of different kinds.
    """
    count = torch.cuda.device_count()
    if count < 2:
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        where = "" if shown is None else f" (CUDA_VISIBLE_DEVICES is {shown!r})"
        raise TuningError(
            f"--parallel-tune must have several CUDA GPUs to share the heads among, but this host shows "
            f"{count}{where}; leave it out: one GPU searches head by head"
        )
    kinds = {torch.cuda.get_device_capability(index): torch.cuda.get_device_name(index) for index in range(count)}
    if len(kinds) > 1:
        raise TuningError(
            "--parallel-tune must have GPUs of one kind, since SpargeAttn's kernel, and so what a threshold does, "
            f"differs between kinds, but this host has {' and '.join(sorted(kinds.values()))}; show it one kind with "
            "CUDA_VISIBLE_DEVICES, or leave it out"
        )


@contextlib.contextmanager
def parallel_tuning(package: Any, wanted: bool) -> Iterator[None]:
    """Have SpargeAttn search heads on all GPUs while the block runs, or one after the other where not wanted.

    Its processes start with the first call and have a CUDA context on their own GPU and on the model's, whose tensors
    they open. They end with the block, and so does what the model's GPU held for them.

    Args:
        package: `spas_sage_attn.autotune`.
        wanted: whether to use all GPUs, whatever the user's own `PARALLEL_TUNE` says.
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
            package.executor = package.GPUProcessPoolExecutor()  # a pool that was shut down takes nothing more
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]  # frees what the processes had open
                torch.cuda.empty_cache()


class KeepingPool:
    """Passes heads on to SpargeAttn's processes, and keeps in the module what each of them found.

    Its search joins what every call of a head gave, which it keeps in the module's `hyperparams_cache`. A process has
    a copy of the module, and sends back only the thresholds: left alone, a parallel search forgets all calls but the
    last, and its thresholds are those of one step of one prompt. With this pool they are the ones of the search head
    by head.

    Args:
        pool: SpargeAttn's `GPUProcessPoolExecutor`.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def submit(self, autotune: Any, *args: Any, head_idx: int, **kwargs: Any) -> "_Pending":
        """Have a process search a head; `autotune` is the module's method of that name."""
        module = autotune.__self__
        sent = copy.copy(module)
        sent.hyperparams_cache = {head_idx: module.hyperparams_cache.get(head_idx, [])}  # the others' aren't needed
        return _Pending(module, head_idx, self._pool.submit(search_head, sent, *args, head_idx=head_idx, **kwargs))


class _Pending:
    """A head that a process searches."""

    def __init__(self, module: Any, head: int, future: Any) -> None:
        self._module, self._head, self._future = module, head, future

    def result(self) -> Any:
        """Wait for the thresholds, and keep what they were chosen from."""
        thresholds, self._module.hyperparams_cache[self._head] = self._future.result()
        return thresholds


def search_head(module: Any, *args: Any, head_idx: int, **kwargs: Any) -> tuple[Any, Any]:
    """Search a head, in a process of the pool; give its thresholds and all that they were chosen from."""
    thresholds = module.autotune(*args, head_idx=head_idx, **kwargs)
    return thresholds, module.hyperparams_cache[head_idx]
