"""Training of the VAE."""

import copy
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .build import Vae, build_vae
from .checkpoint import load_state, load_weights, save_state, save_weights
from .drawing import draw
from .loop import Budget, Ema, captured, lr_scale, timed_steps
from .optim import MuonAdamW
from .sampling import contact_sheet
from .scenes import SceneSampler


@dataclass(frozen=True)
class VaeRecipe:
    """Hyperparameters of the VAE's training; loss weights refer to videos in [-1, 1]."""

    batch: int = 16
    pool: int = 16384
    muon_lr: float = 0.01
    adam_lr: float = 1.5e-3
    l1_weight: float = 0.05
    kl_weight: float = 2e-4
    moment_weight: float = 1e-3
    seed: int = 1


def draw_pool(sampler: SceneSampler, size: int, device: torch.device) -> Tensor:
    """Return `size` random videos as uint8 (size, 3, frames, height, width)."""
    parts = []
    for start in range(0, size, 512):
        video = draw(sampler.sample(min(512, size - start)), device).video
        parts.append(((video + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(parts)


def vae_loss(vae: Vae, video: Tensor, recipe: VaeRecipe) -> tuple[Tensor, Tensor]:
    """Return the loss and the mean squared error for videos (n, 3, frames, height, width) in [-1, 1].

    Besides KL, a term moves each channel's mean and standard deviation over the batch towards 0 and 1,
    because the pipeline has a single scaling factor for all channels.
    """
    with torch.autocast(video.device.type, torch.bfloat16):
        posterior = vae.encode(video).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        error = vae.decode(z).sample.float() - video
    mse = error.square().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    channels = mean.transpose(0, 1).flatten(1)
    moments = (channels.mean(1).square() + (channels.std(1) - 1).square()).mean()
    loss = mse + recipe.l1_weight * error.abs().mean()
    return loss + recipe.kl_weight * kl + recipe.moment_weight * moments, mse.detach()


@torch.no_grad()
def encode(vae: Vae, video: Tensor) -> Tensor:
    """Return the mean latents (n, frames, channels, height, width), unscaled, float32."""
    with torch.autocast(video.device.type, torch.bfloat16, enabled=video.is_cuda):
        mean = vae.encode(video).latent_dist.mean
    latents: Tensor = mean.float().transpose(1, 2)
    return latents


@torch.no_grad()
def reconstruction_psnr(vae: Vae, video: Tensor) -> float:
    """Return the VAE's reconstruction PSNR in dB, in float32 on [0, 1], for videos in [-1, 1]."""
    errors = []
    for part in torch.split(video, 16):
        decoded = vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1)
        errors.append(((decoded.float() - part.float()) / 2).square().flatten(1).mean(1))
    return float(-10 * torch.cat(errors).mean().log10())


@torch.no_grad()
def show_reconstruction(vae: Vae, video: Tensor, path: Path) -> None:
    """Write a PNG with videos on the left and their reconstructions on the right."""
    decoded = vae.decode(vae.encode(video).latent_dist.mean).sample.clamp(-1, 1)
    frames = ((torch.cat((video, decoded)) + 1) * 127.5).round().to("cpu", torch.uint8).permute(0, 2, 3, 4, 1)
    contact_sheet(frames, ["drawn"] * len(video) + ["reconstructed"] * len(video), path)


def use_channels_last(vae: Vae) -> None:
    """Convert convolution kernels to channels-last, which is faster on tensor cores."""
    for weight in vae.parameters():
        if weight.dim() == 5:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last_3d)


def train_vae(folder: Path, budget: Budget, recipe: VaeRecipe, device: torch.device) -> None:
    """Train within the time limit, resuming from the folder's checkpoint if any, and save there."""
    began = time.monotonic()
    torch.manual_seed(recipe.seed)
    vae = build_vae().to(device)
    load_weights(folder, "vae", {"vae": vae})
    average = copy.deepcopy(vae).requires_grad_(False)
    load_weights(folder, "vae-ema", {"vae": average})
    use_channels_last(vae)
    sampler = SceneSampler(recipe.seed)
    pool = draw_pool(sampler, recipe.pool, device)
    optimizer = MuonAdamW([vae], _is_matrix, recipe.muon_lr, recipe.adam_lr)
    ema = Ema([vae], [average])

    def step() -> Tensor:
        index = torch.randint(len(pool), (recipe.batch,), device=device)
        optimizer.zero_grad()
        loss, mse = vae_loss(vae, pool[index].float() / 127.5 - 1, recipe)
        torch.autograd.backward(loss)
        optimizer.step()
        ema.update()
        return mse

    run = captured(step, device)
    print(f"vae: ready after {time.monotonic() - began:.0f} s", flush=True)
    num_steps = 0
    for num_steps, progress, log in timed_steps(budget, began):
        optimizer.lr_scale.fill_(lr_scale(progress, num_steps))
        mse = run()
        if device.type == "cuda" and num_steps % 8 == 0:
            torch.cuda.synchronize()
        if log:
            print(f"vae: step {num_steps} progress {progress:.2f} mse {float(mse):.5f}", flush=True)
    finish_vae(folder, vae, average, num_steps, device)


def _is_matrix(name: str, p: Tensor) -> bool:
    """Return whether Muon updates a weight: kernels larger than 1 x 1, except the first and last layers."""
    return p.dim() >= 4 and p.shape[-1] > 1 and "conv_in" not in name and "conv_out" not in name


def finish_vae(folder: Path, vae: Vae, average: Vae, steps: int, device: torch.device) -> None:
    """Measure the VAE with EMA weights on unseen clips, and save both sets of weights."""
    torch.backends.cudnn.benchmark = False  # autotuning takes longer than these few calls
    save_weights(folder, "vae", {"vae": vae})
    save_weights(folder, "vae-ema", {"vae": average})
    video = draw(SceneSampler(999).sample(64 if device.type == "cuda" else 4), device).video
    show_reconstruction(average, video[:8], folder / "vae.png")
    psnr = reconstruction_psnr(average, video)
    latents = encode(average, video)
    channels = latents.transpose(0, 2).flatten(1)
    latents = latents.cpu()
    print("vae: channel means", [round(float(v), 2) for v in channels.mean(1)])
    print("vae: channel stds", [round(float(v), 2) for v in channels.std(1)])
    state = load_state(folder)
    scale = 1 / float(latents.std())
    save_state(
        folder,
        replace(state, scaling_factor=scale, vae_steps=state.vae_steps + steps, vae_psnr_db=psnr),
    )
    print(f"vae: {steps} steps, {psnr:.2f} dB on {len(video)} unseen clips, scaling factor {scale:.4f}")
