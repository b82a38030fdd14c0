"""Sampling of videos from a demo pipeline, scoring, and contact sheets."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import CogVideoXPipeline
from PIL import Image, ImageDraw
from torch import Tensor

from .build import TEXT_TOKENS, Pipeline
from .scorer import Adherence, Reading, adherence, read
from .world import BASE_SIZE, Scene, Size


def load_model(folder: Path) -> Pipeline:
    """Load the exported pipeline in float32, as used on a CPU."""
    pipeline: Pipeline = CogVideoXPipeline
    pipeline = pipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(
    pipeline: Pipeline,
    captions: Sequence[str],
    steps: int,
    guidance: float,
    seed: int,
    size: Size = BASE_SIZE,
    batch: int = 48,
) -> Tensor:
    """Return videos (n, frames, height, width, 3) uint8; the noise of video i has seed + i."""
    videos = []
    for start in range(0, len(captions), batch):
        part = list(captions[start : start + batch])
        noise = [torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(part))]
        frames = pipeline(
            prompt=part,
            num_frames=size.num_frames,
            height=size.height,
            width=size.width,
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=TEXT_TOKENS,
            generator=noise,
            output_type="np",
        ).frames
        videos.append(torch.from_numpy(np.round(np.stack(frames) * 255).astype(np.uint8)))
    return torch.cat(videos)


def score(videos: Tensor, scenes: Sequence[Scene]) -> tuple[Adherence, list[Reading]]:
    """Return the accuracy of each attribute for one-shape scenes, and the attributes recognized in each video."""
    readings = [read(video) for video in videos]
    return adherence(readings, scenes), readings


def contact_sheet(
    videos: Tensor, captions: Sequence[str], path: Path, columns: int = 6, largest_width: int = 128
) -> None:
    """Write a PNG with one row per video: its caption above frames at equal distances."""
    shown = torch.linspace(0, videos.shape[1] - 1, columns).round().int().tolist()
    reduced = -(-videos.shape[3] // largest_width)
    videos = videos[:, shown, ::reduced, ::reduced]
    height, width = videos.shape[2] + 11, videos.shape[3]
    rows = (len(videos) + 1) // 2
    sheet = Image.new("RGB", (2 * (width * len(shown) + 8), rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (video, caption) in enumerate(zip(videos, captions, strict=True)):
        x, y = (index // rows) * (width * len(shown) + 8), (index % rows) * height
        draw.text((x, y - 1), caption, fill="black")
        for column, frame in enumerate(video):
            sheet.paste(Image.fromarray(frame.numpy()), (x + column * width, y + 11))
    sheet.save(path)
