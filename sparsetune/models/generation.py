"""Rendering videos: one prompt and seed in, frames out."""

import contextlib
import inspect
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sparsetune.config import GenerationConfig
from sparsetune.errors import GenerationError
from sparsetune.models.families import family_of
from sparsetune.models.loading import LoadedModel

Frames = npt.NDArray[np.uint8]
"""RGB video, uint8 of shape (frames, height, width, 3)."""

OnStep = Callable[[int, int], None]
"""Called after each denoising step with the number of steps done, from 1, and of all steps."""

MEMORY_ADVICE = (
    "try, in this order: --vae-tiling, --offload model, fewer --num-frames, a smaller --height and --width, "
    "--offload sequential"
)


_MEMORY_TEXTS = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(frozen=True)
class Rendering:
    """A rendered video: frames before any video encoding, and the seconds that the pipeline took."""

    frames: Frames
    seconds: float


class Renderer:
    """Renders prompts with fixed settings on a loaded model.

    Args:
        loaded: the model; while a policy is installed on its pipeline, renderings are sparse.
        settings: size, frames, steps and guidance.

    Raises:
        GenerationError: the model can't do that size or number of frames; the message names the nearest it can.
    """

    def __init__(self, loaded: LoadedModel, settings: GenerationConfig) -> None:
        check_size(loaded.pipe, settings)
        self.loaded = loaded
        self.settings = settings

    def render(self, prompt: str, seed: int, on_step: OnStep | None = None) -> Rendering:
        """Render one prompt.

        The noise is drawn on the CPU, so that a seed means the same video on every device.

        Raises:
            GenerationError: out of memory, or frames that are NaN or black throughout.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        started = time.perf_counter()
        with _memory_errors(), torch.inference_mode():
            output = self.loaded.pipe(**self._arguments(prompt, generator, on_step))
            frames = np.asarray(output.frames[0])
        return Rendering(to_uint8(frames), time.perf_counter() - started)

    def _arguments(self, prompt: str, generator: torch.Generator, on_step: OnStep | None) -> dict[str, Any]:
        settings = self.settings
        arguments: dict[str, Any] = {
            "prompt": prompt,
            "negative_prompt": settings.negative_prompt,
            "num_frames": settings.num_frames,
            "height": settings.height,
            "width": settings.width,
            "num_inference_steps": settings.num_inference_steps,
            "guidance_scale": settings.guidance_scale,
            "generator": generator,
            "output_type": "np",
        }
        if settings.max_sequence_length is not None:
            arguments["max_sequence_length"] = settings.max_sequence_length
        elif "max_sequence_length" in inspect.signature(self.loaded.pipe.__call__).parameters:
            arguments["max_sequence_length"] = self.loaded.pipe.transformer.config.max_text_seq_length
        if on_step is not None:

            def on_step_end(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
                on_step(step + 1, settings.num_inference_steps)
                return values

            arguments["callback_on_step_end"] = on_step_end
        return arguments


def to_uint8(frames: npt.NDArray[Any]) -> Frames:
    """Turn a pipeline's float frames in [0, 1] into uint8, rounding to the nearest.

    Args:
        frames: (frames, height, width, 3).

    Raises:
        GenerationError: a value isn't finite, or all frames are black: the model broke down.
    """
    if not np.isfinite(frames).all():
        raise GenerationError("frames must be finite, but the model gave NaN or infinite values; try another --dtype")
    video: Frames = np.rint(np.clip(frames, 0.0, 1.0) * 255.0).astype(np.uint8)
    if not video.any():
        raise GenerationError("frames must show something, but all are black; try another --dtype or more steps")
    return video


def check_size(pipe: Any, settings: GenerationConfig) -> None:
    """Check that the model can render frames of that number and size.

    Raises:
        GenerationError: it can't; the message names the nearest that it can.
    """
    unit = family_of(pipe).frame_unit
    if (settings.num_frames - 1) % unit:
        nearest = round((settings.num_frames - 1) / unit) * unit + 1
        raise GenerationError(
            f"num_frames must be a multiple of {unit} plus 1, but is {settings.num_frames}; the nearest is {nearest}"
        )
    # The pipelines of diffusers refuse what 8 doesn't divide, also where the model itself could do it.
    unit = math.lcm(8, pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size)
    for name, value in (("height", settings.height), ("width", settings.width)):
        if value % unit:
            nearest = max(1, round(value / unit)) * unit
            raise GenerationError(f"{name} must be a multiple of {unit}, but is {value}; the nearest is {nearest}")


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    try:
        yield
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        raise GenerationError(f"the video must fit into memory, but it ran out; {MEMORY_ADVICE}") from error
    except RuntimeError as error:
        if not any(text in str(error) for text in _MEMORY_TEXTS):
            raise
        raise GenerationError(f"the video must fit into memory, but it ran out; {MEMORY_ADVICE}") from error
