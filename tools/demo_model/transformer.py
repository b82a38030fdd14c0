"""Joint training of transformer and text encoder on latents of the trained VAE."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .build import Pipeline, build_pipeline
from .checkpoint import load_state, load_weights, save_state, save_weights
from .loop import Budget, Ema, captured, is_first_process, lr_scale, num_processes, process_index, timed_steps
from .optim import MuonAdamW
from .pool import Pool, PoolMaker, tokenise
from .scenes import SceneSampler
from .vae import use_channels_last
from .world import BASE_SIZE, Size

_LOSSES_KEPT = 500
_POOL_PARTS = 64
# cuDNN's attention is the fastest for long sequences on an H100.
_ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Batch:
    """Clips of one size in a step of one process; `share` of the steps, in (0, 1], have them."""

    size: Size
    clips: int
    share: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Batch":
        """Return the batch of a text such as '49x240x360:1:0.5': size, clips and optionally share."""
        size, clips, *share = text.split(":")
        return cls(Size.parse(size), int(clips), *(float(value) for value in share))


@dataclass(frozen=True)
class TransformerRecipe:
    """Hyperparameters of the transformer's training; `foreground_weight` decays to 0 at progress `foreground_until`.

    Each size has a pool of clips with as many pixels as `pool` clips of the base size; every
    `refresh_every` steps, 1/64 of one size's pool is replaced.
    """

    batches: Sequence[Batch] = field(default_factory=lambda: (Batch(BASE_SIZE, 96),))
    pool: int = 32768
    refresh_every: int = 64
    muon_lr: float = 0.015
    adam_lr: float = 1.5e-3
    caption_dropout: float = 0.1
    foreground_weight: float = 3.0
    foreground_until: float = 0.6
    seed: int = 2


class Denoising:
    """v-prediction loss on random batches of one size's pool, without host synchronization."""

    def __init__(
        self, pipeline: Pipeline, pool: Pool, clips: int, caption_dropout: float, foreground_weight: Tensor
    ) -> None:
        """Use the pipeline's models; `foreground_weight` is a tensor that the caller changes."""
        self._transformer, self._text_encoder = pipeline.transformer, pipeline.text_encoder
        self._pool, self._clips, self._caption_dropout = pool, clips, caption_dropout
        device = pool.latents.device
        self._alphas = pipeline.scheduler.alphas_cumprod.float().to(device)
        self._null = tokenise(pipeline.tokenizer, [""]).to(device)
        num_frames, (height, width) = pool.latents.shape[1], pool.latents.shape[-2:]
        self._rotary = pipeline._prepare_rotary_positional_embeddings(height * 4, width * 4, num_frames, device)
        self._foreground_weight = foreground_weight

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Return the weighted loss and the unweighted mean squared error of v."""
        batch, device = self._clips, self._null.device
        index = torch.randint(len(self._pool.latents), (batch,), device=device)
        clean = self._pool.latents[index].float()
        dropped = torch.rand(batch, 1, device=device) < self._caption_dropout
        tokens = torch.where(dropped, self._null, self._pool.tokens[index])
        # Stratified: one timestep from each of as many intervals as all processes have clips, equally
        # probable under the density 0.5 + t, t in [0, 1]. Large videos are decided at high noise.
        parts = torch.arange(batch, device=device) + process_index() * batch + torch.rand(batch, device=device)
        t = (0.25 + 2 * parts / (batch * num_processes())).sqrt() - 0.5
        timestep = (t * len(self._alphas)).long().clamp(max=len(self._alphas) - 1)
        alpha = self._alphas[timestep].view(-1, 1, 1, 1, 1)
        noise = torch.randn_like(clean)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        with torch.autocast(device.type, torch.bfloat16):
            text = self._text_encoder(tokens)[0]
            v = self._transformer(noisy, text, timestep, image_rotary_emb=self._rotary, return_dict=False)[0]
        error = (v.float() - target).square()
        weight = 1 + self._foreground_weight * self._pool.foreground[index]
        return (error * (weight / weight.mean())).mean(), error.detach().mean()


def load_pipeline(folder: Path, averaged: bool, device: torch.device) -> Pipeline:
    """Return the pipeline with the checkpoint's weights; the VAE always has its EMA weights."""
    pipeline = build_pipeline(seed=2)
    state = load_state(folder)
    pipeline.vae.register_to_config(scaling_factor=state.scaling_factor)
    pipeline.vae_scaling_factor_image = state.scaling_factor
    load_weights(folder, "vae-ema", {"vae": pipeline.vae})
    name = "transformer-ema" if averaged else "transformer"
    load_weights(folder, name, _modules(pipeline))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def train_transformer(folder: Path, budget: Budget, recipe: TransformerRecipe, device: torch.device) -> None:
    """Train within the time limit, resuming from and saving to the folder's checkpoint.

    Each process (torchrun starts several) has its own clips; gradients are summed. The optimizer
    state isn't saved: it would exceed the limit of 16 MiB per file, and its averages are short
    compared with a run.
    """
    began = time.monotonic()
    state = load_state(folder)
    pipeline = load_pipeline(folder, averaged=False, device=device)
    average = load_pipeline(folder, averaged=True, device=device)
    seed = recipe.seed + state.steps  # a different one in each run
    pipeline.vae.requires_grad_(False)
    use_channels_last(pipeline.vae)
    torch.manual_seed(seed * num_processes() + process_index())
    sampler = SceneSampler(seed * num_processes() + process_index())
    pools = [_RefreshedPool(PoolMaker(pipeline, sampler, b.size, device), b.size, recipe) for b in recipe.batches]
    _report(f"pools of {[len(pool.clips.latents) for pool in pools]} clips after {time.monotonic() - began:.0f} s")
    if device.type == "cuda":
        for block in pipeline.transformer.transformer_blocks:
            block.compile(dynamic=False)
    with sdpa_kernel(_ATTENTION, set_priority=True):
        training = _Training(pipeline, average, [pool.clips for pool in pools], recipe, device)
    _report(f"ready after {time.monotonic() - began:.0f} s")
    chosen = random.Random(seed)  # the same in all processes
    counts = [0] * len(pools)
    steps = 0
    for steps, progress, log in timed_steps(budget, began):
        present = [i for i, batch in enumerate(recipe.batches) if chosen.random() < batch.share]
        training.step(steps, progress, present)
        for i in present:
            counts[i] += 1
        if steps % recipe.refresh_every == 0:
            pools[steps // recipe.refresh_every % len(pools)].refresh()
        if log:
            _report(f"step {steps} progress {progress:.2f} v {training.v_losses()} samples {_samples(recipe, counts)}")
    v_losses = training.v_losses()
    samples = state.samples + sum(_samples(recipe, counts).values())
    done = replace(state, steps=state.steps + steps, samples=samples, progress=budget.end, v_losses=v_losses)
    _report(f"{steps} steps, samples {_samples(recipe, counts)}, v-loss {v_losses}")
    if is_first_process():
        save_weights(folder, "transformer", _modules(pipeline))
        save_weights(folder, "transformer-ema", _modules(average))
        save_state(folder, done)


class _RefreshedPool:
    """Pool of one size's clips, of which a part is replaced at a time."""

    def __init__(self, maker: PoolMaker, size: Size, recipe: TransformerRecipe) -> None:
        self._maker, self._next = maker, 0
        self._part = max(1, recipe.pool * BASE_SIZE.pixels // size.pixels // _POOL_PARTS)
        self.clips = maker.make(self._part * _POOL_PARTS)

    def refresh(self) -> None:
        self.clips.overwrite(self._next * self._part, self._maker.make(self._part))
        self._next = (self._next + 1) % _POOL_PARTS


class _Training:
    """Captured parts of a step: forward and backward of each size, and the update; with their schedules."""

    def __init__(
        self,
        pipeline: Pipeline,
        average: Pipeline,
        pools: Sequence[Pool],
        recipe: TransformerRecipe,
        device: torch.device,
    ) -> None:
        live = list(_modules(pipeline).values())
        self._recipe = recipe
        self._optimizer = MuonAdamW(live, _is_matrix, recipe.muon_lr, recipe.adam_lr)
        self._ema = Ema(live, list(_modules(average).values()))
        self._foreground_weight = torch.zeros((), device=device)
        self._losses: list[list[Tensor]] = [[] for _ in pools]
        self._backward = [
            captured(self._backward_of(pipeline, pool, batch), device)
            for pool, batch in zip(pools, recipe.batches, strict=True)
        ]
        self._optimizer.zero_grad()  # the capture's first steps have added to it, each process's their own
        self._update = captured(self._updated, device)

    def _backward_of(self, pipeline: Pipeline, pool: Pool, batch: Batch) -> Callable[[], Tensor]:
        loss_of = Denoising(pipeline, pool, batch.clips, self._recipe.caption_dropout, self._foreground_weight)

        def backward() -> Tensor:
            loss, unweighted = loss_of()
            torch.autograd.backward(loss)
            return unweighted

        return backward

    def _updated(self) -> Tensor:
        self._optimizer.step()
        self._ema.update()
        return self._optimizer.lr_scale

    def step(self, number: int, progress: float, present: Sequence[int]) -> None:
        """Run a step, numbered from 1 in this run, at this progress of the complete training.

        present: indices of the sizes whose clips this step has.
        """
        self._optimizer.lr_scale.fill_(lr_scale(progress, number))
        decay = max(0.0, 1 - progress / self._recipe.foreground_until)
        self._foreground_weight.fill_(self._recipe.foreground_weight * decay)
        self._optimizer.zero_grad()
        for index in present:
            self._losses[index] = [*self._losses[index][1 - _LOSSES_KEPT :], self._backward[index]().clone()]
        if num_processes() > 1:
            dist.all_reduce(self._optimizer.gradient)
        self._update()
        if self._foreground_weight.is_cuda and number % 8 == 0:
            torch.cuda.synchronize()  # otherwise the host runs far ahead of the device

    def v_losses(self) -> dict[str, float]:
        """Return the unweighted loss for each size, averaged over its last 500 batches of this process."""
        named = zip(self._recipe.batches, self._losses, strict=True)
        return {str(b.size): round(float(torch.stack(kept).mean()), 4) for b, kept in named if kept}


def _modules(pipeline: Pipeline) -> dict[str, nn.Module]:
    return {"transformer": pipeline.transformer, "text_encoder": pipeline.text_encoder}


def _is_matrix(name: str, p: Tensor) -> bool:
    """Return whether Muon updates a weight: the matrices of attention and feed-forward in both networks."""
    inside = ("attn1.to_", ".ff.", "SelfAttention.", "DenseReluDense.")
    return p.dim() == 2 and any(part in name for part in inside) and "relative" not in name


def _samples(recipe: TransformerRecipe, counts: Sequence[int]) -> dict[str, int]:
    """Return the clips of each size, of all processes, after so many batches of each."""
    pairs = zip(recipe.batches, counts, strict=True)
    return {str(batch.size): count * batch.clips * num_processes() for batch, count in pairs}


def _report(text: str) -> None:
    if is_first_process():
        print(f"transformer: {text}", flush=True)
