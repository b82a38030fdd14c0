"""Joint training of transformer and text encoder on latents of the trained VAE."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .build import Pipeline, build_pipeline
from .checkpoint import State, load_state, load_weights, save_state, save_weights
from .loop import Budget, Ema, captured, lr_scale, timed_steps
from .optim import MuonAdamW
from .pool import Pool, PoolMaker, tokenise
from .scenes import SceneSampler
from .vae import use_channels_last

_LOSSES_KEPT = 500


@dataclass(frozen=True)
class TransformerRecipe:
    """Hyperparameters of the transformer's training; `foreground_weight` decays to 0 at progress `foreground_until`."""

    batch: int = 96
    pool: int = 32768
    refresh: int = 512
    refresh_every: int = 64
    muon_lr: float = 0.015
    adam_lr: float = 1.5e-3
    caption_dropout: float = 0.1
    foreground_weight: float = 3.0
    foreground_until: float = 0.6
    seed: int = 2


class Denoising:
    """v-prediction loss on random batches of a pool, without host synchronization."""

    def __init__(self, pipeline: Pipeline, pool: Pool, recipe: TransformerRecipe) -> None:
        """Use the pipeline's models; `foreground_weight` is a tensor that the caller sets."""
        self._transformer, self._text_encoder = pipeline.transformer, pipeline.text_encoder
        self._pool, self._recipe = pool, recipe
        device = pool.latents.device
        self._alphas = pipeline.scheduler.alphas_cumprod.float().to(device)
        self._null = tokenise(pipeline.tokenizer, [""]).to(device)
        num_frames, size = pool.latents.shape[1], pool.latents.shape[-1] * 4
        self._rotary = pipeline._prepare_rotary_positional_embeddings(size, size, num_frames, device)
        self.foreground_weight = torch.zeros((), device=device)

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Return the weighted loss and the unweighted mean squared error of v."""
        batch, device = self._recipe.batch, self._null.device
        index = torch.randint(len(self._pool.latents), (batch,), device=device)
        clean = self._pool.latents[index].float()
        dropped = torch.rand(batch, 1, device=device) < self._recipe.caption_dropout
        tokens = torch.where(dropped, self._null, self._pool.tokens[index])
        # Stratified: one timestep from each of `batch` equal intervals reduces the variance of the loss.
        parts = (torch.arange(batch, device=device) + torch.rand(batch, device=device)) / batch
        timestep = (parts * len(self._alphas)).long().clamp(max=len(self._alphas) - 1)
        alpha = self._alphas[timestep].view(-1, 1, 1, 1, 1)
        noise = torch.randn_like(clean)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        with torch.autocast(device.type, torch.bfloat16):
            text = self._text_encoder(tokens)[0]
            v = self._transformer(noisy, text, timestep, image_rotary_emb=self._rotary, return_dict=False)[0]
        error = (v.float() - target).square()
        weight = 1 + self.foreground_weight * self._pool.foreground[index]
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

    The optimizer state isn't saved: it would exceed the limit of 16 MiB per file, and its averages
    are short compared with a run.
    """
    began = time.monotonic()
    state = load_state(folder)
    pipeline = load_pipeline(folder, averaged=False, device=device)
    average = load_pipeline(folder, averaged=True, device=device)
    seed = recipe.seed + state.steps  # a different one in each run
    torch.manual_seed(seed)
    pipeline.vae.requires_grad_(False)
    use_channels_last(pipeline.vae)
    maker = PoolMaker(pipeline, SceneSampler(seed), device)
    pool = maker.make(recipe.pool)
    print(f"transformer: {recipe.pool} clips encoded after {time.monotonic() - began:.0f} s", flush=True)
    if device.type == "cuda":
        for block in pipeline.transformer.transformer_blocks:
            block.compile(dynamic=False)
    training = _Training(pipeline, average, pool, recipe, device)
    print(f"transformer: ready after {time.monotonic() - began:.0f} s", flush=True)
    steps = 0
    for steps, progress, log in timed_steps(budget, began):
        training.step(steps, progress)
        if steps % recipe.refresh_every == 0:
            row = steps // recipe.refresh_every * recipe.refresh % recipe.pool
            pool.overwrite(row, maker.make(recipe.refresh))
        if log:
            print(f"transformer: step {steps} progress {progress:.2f} v {training.v_loss(steps):.4f}", flush=True)
    samples = state.samples + steps * recipe.batch
    v_loss = training.v_loss(steps)
    done = replace(state, steps=state.steps + steps, samples=samples, progress=budget.end, v_loss=v_loss)
    _save(folder, pipeline, average, done)


class _Training:
    """Captured step of one run, with its schedules."""

    def __init__(
        self, pipeline: Pipeline, average: Pipeline, pool: Pool, recipe: TransformerRecipe, device: torch.device
    ) -> None:
        live = list(_modules(pipeline).values())
        self._recipe = recipe
        self._optimizer = MuonAdamW(live, _is_matrix, recipe.muon_lr, recipe.adam_lr)
        self._ema = Ema(live, list(_modules(average).values()))
        self._loss_of = Denoising(pipeline, pool, recipe)
        self._losses = torch.zeros(_LOSSES_KEPT, device=device)
        self._run = captured(self._update, device)

    def _update(self) -> Tensor:
        self._optimizer.zero_grad()
        loss, unweighted = self._loss_of()
        torch.autograd.backward(loss)
        self._optimizer.step()
        self._ema.update()
        return unweighted

    def step(self, number: int, progress: float) -> None:
        """Run a step, numbered from 1 in this run, at this progress of the complete training."""
        self._optimizer.lr_scale.fill_(lr_scale(progress, number))
        decay = max(0.0, 1 - progress / self._recipe.foreground_until)
        self._loss_of.foreground_weight.fill_(self._recipe.foreground_weight * decay)
        self._losses[number % _LOSSES_KEPT] = self._run()
        if self._losses.is_cuda and number % 8 == 0:
            torch.cuda.synchronize()  # otherwise the host runs far ahead of the device

    def v_loss(self, steps: int) -> float:
        """Return the unweighted loss, averaged over at most the last 500 of `steps` steps."""
        return float(self._losses.sum() / max(1, min(steps, _LOSSES_KEPT)))


def _modules(pipeline: Pipeline) -> dict[str, nn.Module]:
    return {"transformer": pipeline.transformer, "text_encoder": pipeline.text_encoder}


def _is_matrix(name: str, p: Tensor) -> bool:
    """Return whether Muon updates a weight: the matrices of attention and feed-forward in both networks."""
    inside = ("attn1.to_", ".ff.", "SelfAttention.", "DenseReluDense.")
    return p.dim() == 2 and any(part in name for part in inside) and "relative" not in name


def _save(folder: Path, pipeline: Pipeline, average: Pipeline, state: State) -> None:
    save_weights(folder, "transformer", _modules(pipeline))
    save_weights(folder, "transformer-ema", _modules(average))
    save_state(folder, state)
    print(f"transformer: {state.steps} steps, {state.samples} samples, v-loss {state.v_loss:.4f} over the last 500")
