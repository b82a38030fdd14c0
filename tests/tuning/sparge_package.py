"""A stand-in for `spas_sage_attn.autotune` on a CPU: its names, signatures, state and behaviour, not its search.

What it does differently: a head's thresholds come from a formula over the data seen, so that a test knows them.
"""

import os
import pickle
import sys
from concurrent.futures import Future
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsetune.attention.backends.sparge import SpargeBackend

RECORDED = {
    "SparseAttentionMeansim.__init__": (
        "self, sim_rule='l1', l1=0.07, pv_l1=0.08, cos_sim=0.98, rmse=0.07, rearrange_kwargs={}, tune_pv=True"
    ),
    "SparseAttentionMeansim.forward": (
        "self, q, k, v, mask=None, is_causal=False, scale=None, tensor_layout='HND', tune_mode=False, smooth_k=True, "
        "return_sparsity=False"
    ),
    "SparseAttentionMeansim.autotune": "self, qi, ki, vi, head_idx, mask=None, is_causal=False, smooth_k=True",
    "SparseAttentionMeansim.fill_results": "self, rtdict",
    "extract_sparse_attention_state_dict": "model, verbose=False",
    "load_sparse_attention_state_dict": "model, saved_state_dict, multigpu=False, verbose=False",
    "GPUProcessPoolExecutor.__init__": (
        "self, gpu_indices=None, mp_context=None, initializer=None, initargs=(), gpu_initializer=torch_gpu_set_func, "
        "gpu_list_func=torch_gpu_list_func"
    ),
}
"""Parameters in SpargeAttn's commit bfd980b."""


class SparseAttentionMeansim(nn.Module):
    def __init__(
        self,
        sim_rule="l1",
        l1=0.07,
        pv_l1=0.08,
        cos_sim=0.98,
        rmse=0.07,
        rearrange_kwargs={},  # noqa: B006
        tune_pv=True,
    ):
        super().__init__()
        assert l1 >= 0 and cos_sim <= 1 and rmse >= 0
        assert pv_l1 > l1
        self.l1, self.pv_l1 = l1, pv_l1
        self.is_sparse = self.cdfthreshd = self.simthreshd1 = self.simthreshd2 = self.pvthreshd = None
        self.num_data_passed = 0
        self.hyperparams_cache = {}
        self.parallel = []

    @torch.no_grad()
    def autotune(self, qi, ki, vi, head_idx, mask=None, is_causal=False, smooth_k=True):
        """The head's largest spread so far; its module stores them all."""
        spreads = [qi.float().std().item(), *self.hyperparams_cache.get(head_idx, [])]
        self.hyperparams_cache[head_idx] = spreads
        return {"spread": max(spreads), "head_idx": head_idx}

    def fill_results(self, rtdict):
        head, spread = rtdict["head_idx"], rtdict["spread"]
        self.cdfthreshd[head] = 1 - 1 / (2 + spread)
        self.simthreshd1[head] = (head - 8) / 16
        self.pvthreshd[head] = 10 + spread
        if head == 1:  # as a head with less than a tenth of sparsity
            self.is_sparse[head] = False
            self.cdfthreshd[head] = 1
            self.simthreshd1[head] = 1

    @torch.no_grad()
    def forward(
        self,
        q,
        k,
        v,
        mask=None,
        is_causal=False,
        scale=None,
        tensor_layout="HND",
        tune_mode=False,
        smooth_k=True,
        return_sparsity=False,
    ):
        assert len(q.shape) == 4
        assert os.environ.get("TUNE_MODE", "") != "" or tune_mode, "the search must not render with the kernel"
        if self.is_sparse is None:
            heads = q.shape[1]
            self.is_sparse = nn.Parameter(torch.ones(heads, dtype=torch.bool), requires_grad=False)
            self.cdfthreshd = nn.Parameter(torch.ones(heads) * 0.1, requires_grad=False)
            self.simthreshd1 = nn.Parameter(-torch.ones(heads), requires_grad=False)
            self.simthreshd2 = nn.Parameter(torch.zeros(heads), requires_grad=False)
            self.pvthreshd = nn.Parameter(torch.ones(heads) * 20, requires_grad=False)
        self.parallel.append(os.environ.get("PARALLEL_TUNE", "") != "")
        open_heads = [head for head in range(q.shape[1]) if self.is_sparse[head].item()]
        split = {head: [x[:, head : head + 1] for x in (q, k, v)] for head in open_heads}
        if self.parallel[-1]:
            executor = sys.modules["spas_sage_attn.autotune"].executor
            futures = [executor.submit(self.autotune, *split[head], head_idx=head) for head in open_heads]
            for future in futures:
                self.fill_results(future.result())
        else:
            for head in open_heads:
                self.fill_results(self.autotune(*split[head], head_idx=head))
        self.num_data_passed += 1
        print(f"{self.cdfthreshd=}")
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal)


def extract_sparse_attention_state_dict(model, verbose=False):
    """Return the state below each module of the class; names are compared as substrings."""
    state = model.state_dict()
    held = [name for name, module in model.named_modules() if isinstance(module, SparseAttentionMeansim)]
    return {key: state[key] for name in held for key in state if name in key}


def load_sparse_attention_state_dict(model, saved_state_dict, multigpu=False, verbose=False):
    """Set the state below each module of the class, in the model's dtype."""
    first = next(model.parameters())
    for name, module in model.named_modules():
        if isinstance(module, SparseAttentionMeansim):
            for key, value in saved_state_dict.items():
                if name in key:
                    value = value.to(device=first.device, dtype=first.dtype)
                    setattr(module, key.split(name)[1][1:], nn.Parameter(value, requires_grad=False))
    return model


def torch_gpu_set_func(gpu_index):
    raise NotImplementedError


def torch_gpu_list_func():
    raise NotImplementedError


class GPUProcessPoolExecutor:
    def __init__(
        self,
        gpu_indices=None,
        mp_context=None,
        initializer=None,
        initargs=(),
        gpu_initializer=torch_gpu_set_func,
        gpu_list_func=torch_gpu_list_func,
    ):
        self.open = True

    def submit(self, fn, *args, **kwargs):
        """Run a call as another process would: on copies, returning a copy of the result."""
        fn, args, kwargs = pickle.loads(pickle.dumps((fn, args, kwargs)))
        future = Future()
        future.set_result(pickle.loads(pickle.dumps(fn(*args, **kwargs))))
        return future

    def shutdown(self):
        self.open = False


def install(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Install the stand-in as `spas_sage_attn.autotune`, and make torch report a GPU."""
    package, autotune = ModuleType("spas_sage_attn"), ModuleType("spas_sage_attn.autotune")
    package.__spec__ = ModuleSpec("spas_sage_attn", None)
    for found in (
        SparseAttentionMeansim,
        extract_sparse_attention_state_dict,
        load_sparse_attention_state_dict,
        GPUProcessPoolExecutor,
    ):
        setattr(autotune, found.__name__, found)
    autotune.executor = GPUProcessPoolExecutor()
    package.autotune = autotune
    monkeypatch.setitem(sys.modules, "spas_sage_attn", package)
    monkeypatch.setitem(sys.modules, "spas_sage_attn.autotune", autotune)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100")
    monkeypatch.setattr(SpargeBackend, "missing", staticmethod(lambda device: None))
    return autotune
