"""Serve the promoted checkpoint over HTTP.

    python examples/server.py

A sketch with FastAPI and uvicorn, which come with MLflow: one pipeline, one rendering at a time, a short queue.
"""

import sys
import tempfile
import threading
from pathlib import Path
from typing import Annotated

import torch
import uvicorn
from diffusers import CogVideoXPipeline
from fastapi import FastAPI, HTTPException, Response
from pydantic import BaseModel, Field

import sparsetune
from sparsetune.models.demo import WEIGHTS
from sparsetune.video import write_video

SETTINGS = {"num_frames": 17, "height": 64, "width": 64, "num_inference_steps": 10, "guidance_scale": 1.0}
"""What the checkpoint was tuned for. Callers choose prompt and seed only."""

app = FastAPI()
rendering = threading.Lock()  # a diffusers pipeline renders one video at a time
places = threading.BoundedSemaphore(4)  # requests that render or wait

# The demo model; for CogVideoX-2b: "zai-org/CogVideoX-2b", torch.bfloat16, and .to("cuda").
pipe = CogVideoXPipeline.from_pretrained(WEIGHTS, dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
handle = sparsetune.sparsify(pipe, "models:/demo-sparse@champion")


class VideoRequest(BaseModel):
    """What a caller may choose."""

    prompt: Annotated[str, Field(min_length=1, max_length=500)]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42


@app.post("/videos")
def videos(request: VideoRequest) -> Response:
    """Answer with an MP4 file, or 503 while too many wait."""
    if not places.acquire(blocking=False):
        raise HTTPException(503, "too many requests wait; try again later", {"Retry-After": "60"})
    try:
        with rendering:
            content, sparsity, fallbacks = render(request.prompt, request.seed)
    finally:
        places.release()
    headers = {"Sparsity": f"{sparsity:.3f}", "Fallbacks": str(fallbacks)}
    return Response(content, media_type="video/mp4", headers=headers)


def render(prompt: str, seed: int) -> tuple[bytes, float, int]:
    """Render a prompt; return the file, its sparsity, and the number of calls that the kernel couldn't run."""
    handle.reset()
    generator = torch.Generator().manual_seed(seed)
    output = pipe(prompt, **SETTINGS, max_sequence_length=32, generator=generator, output_type="np")
    stats = handle.stats()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        write_video(path, (output.frames[0] * 255).round().astype("uint8"), fps=8)
        return path.read_bytes(), stats.sparsity, sum(stats.fallbacks.values())


if __name__ == "__main__":
    render("a red circle moving right", seed=0)  # warms up: kernels are compiled in the first rendering
    uvicorn.run(app, port=int(sys.argv[1]) if sys.argv[1:] else 8000)
