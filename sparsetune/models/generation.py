"""Rendering of videos from prompts and seeds."""

import contextlib
import functools
import inspect
import logging
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sparsetune.attention.breakeven import dtype_name
from sparsetune.config import GenerationConfig
from sparsetune.config.files import DEMO
from sparsetune.errors import GenerationError, OutOfMemoryError
from sparsetune.models import modular
from sparsetune.models.clock import DenoisingClock
from sparsetune.models.families import family_of, main_transformer, token_side
from sparsetune.models.loading import LoadedModel
from sparsetune.models.prompts import AnyPrompt, Prompt, as_prompt, open_image

_LOG = logging.getLogger(__name__)

Frames = npt.NDArray[np.uint8]
"""RGB video, uint8 of shape (frames, height, width, 3); a still image is a video of one frame."""

OnStep = Callable[[int, int], None]
"""Called after each denoising step with the number of steps done, from 1, and of all steps."""

_MEMORY_ADVICE = (
    "try, in this order: --vae-tiling, --offload model, fewer --num-frames, a smaller --height and --width, "
    "--offload sequential"
)

_MEMORY_TEXTS = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
TIMED_STEPS = 4
"""Dense steps timed beside each sparse rendering, after one that warms up."""


@dataclass(frozen=True)
class Rendering:
    """A rendered video: frames before any video encoding, and the pipeline's seconds; those of the denoising alone."""

    frames: Frames
    seconds: float
    denoising_seconds: float | None = None


class Renderer:
    """Renders prompts with fixed settings on a loaded model.

    Args:
        loaded: the model; while a policy is installed on its pipeline, renderings are sparse.
        settings: size, frames, steps and guidance; an image model always renders one frame.

    Raises:
        GenerationError: the model can't render that size or number of frames (the message names the nearest), or has
            no second transformer for guidance_scale_2, or sigmas are of another number of steps or can't be given.
    """

    def __init__(self, loaded: LoadedModel, settings: GenerationConfig) -> None:
        check_size(loaded.pipe, settings)
        check_guidance(loaded.pipe, settings)
        self.loaded = loaded
        self.settings = settings
        self._takes = modular.parameters(loaded.pipe)
        num_sigmas, num_steps = len(settings.sigmas), settings.num_inference_steps
        if num_sigmas and "sigmas" not in self._takes:
            raise GenerationError(f"{type(loaded.pipe).__name__} takes no sigmas; leave generation.sigmas empty")
        if num_sigmas not in (0, num_steps):
            raise GenerationError(
                f"generation.sigmas has {num_sigmas} values for {num_steps} steps; "
                "empty it with --set generation.sigmas=",
                is_usage=True,
            )

    def with_steps(self, num_inference_steps: int) -> "Renderer":
        """Return a renderer with as many denoising steps, no sigmas of another number, and all else the same."""
        sigmas = self.settings.sigmas if num_inference_steps == self.settings.num_inference_steps else ()
        changes = {"num_inference_steps": num_inference_steps, "sigmas": sigmas}
        return Renderer(self.loaded, self.settings.model_copy(update=changes))

    def render(self, prompt: AnyPrompt, seed: int, on_step: OnStep | None = None) -> Rendering:
        """Render one prompt.

        Args:
            prompt: the prompt; its own seed and negative prompt, if any, override the others.
            seed: of the noise, which is drawn on the CPU: a seed gives the same noise on every device.
            on_step: called after every denoising step.

        Raises:
            GenerationError: an image is missing or not taken, memory ran out, or frames are NaN or all black.
            PromptError: the prompt's image can't be read.
        """
        prompt = as_prompt(prompt)
        if self.loaded.identity.source == DEMO and (unknown := _unknown_words(self.loaded.pipe, prompt.text)):
            _warn_of_words(unknown)
        arguments = self._arguments(prompt, seed, on_step)
        started = time.perf_counter()
        with self._denoising() as clock:
            output = self.loaded.pipe(**arguments)
            frames = np.asarray(modular.rendered(output))
        return Rendering(to_uint8(frames), time.perf_counter() - started, clock.seconds)

    def step_seconds(self, prompt: AnyPrompt, seed: int, num_steps: int = TIMED_STEPS) -> float | None:
        """Time denoising steps as the pipeline runs now: the mean of `num_steps` after one that warms up.

        None where the pipeline makes no transformer call. Raises as `render`.
        """
        short = self.with_steps(num_steps + 1)
        arguments = short._arguments(as_prompt(prompt), seed, None)
        if "output_type" in arguments:
            arguments["output_type"] = "latent"  # nothing is decoded
        with short._denoising() as clock:
            self.loaded.pipe(**arguments)
        return clock.step_seconds(num_steps + 1)

    @contextlib.contextmanager
    def _denoising(self) -> Iterator[DenoisingClock]:
        """Explain errors, and time the transformers' calls."""
        pipe, family = self.loaded.pipe, self.loaded.family
        if family.guidance == "guider" or ("guidance_scale" not in self._takes and hasattr(pipe, "guider")):
            pipe.guider.guidance_scale = self.settings.guidance_scale
        transformers = [module for name in family.transformers if (module := getattr(pipe, name, None)) is not None]
        with (
            self._explained_errors(),
            torch.inference_mode(),
            DenoisingClock(transformers, self.loaded.device) as clock,
        ):
            yield clock

    def _arguments(self, prompt: Prompt, seed: int, on_step: OnStep | None) -> dict[str, Any]:
        settings = self.settings
        generator = torch.Generator("cpu").manual_seed(seed if prompt.seed is None else prompt.seed)
        negative = settings.negative_prompt if prompt.negative_prompt is None else prompt.negative_prompt
        arguments: dict[str, Any] = {
            "prompt": prompt.text,
            "negative_prompt": negative or self.loaded.family.no_negative,
            "num_frames": settings.num_frames,
            "height": settings.height,
            "width": settings.width,
            "num_inference_steps": settings.num_inference_steps,
            self.loaded.family.guidance: settings.guidance_scale,
            "guidance_scale_2": settings.guidance_scale_2,
            "sigmas": list(settings.sigmas) or None,
            "generator": generator,
            "output_type": "np",
        }
        arguments = {name: value for name, value in arguments.items() if name in self._takes and value is not None}
        if (length := self._text_length()) is not None:
            arguments["max_sequence_length"] = length
        if (image := self._image(prompt)) is not None:
            arguments["image"] = image
        if on_step is not None and "callback_on_step_end" in self._takes:

            def on_step_end(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
                on_step(step + 1, settings.num_inference_steps)
                return values

            arguments["callback_on_step_end"] = on_step_end
        return arguments

    @contextlib.contextmanager
    def _explained_errors(self) -> Iterator[None]:
        try:
            yield
        except NotImplementedError as error:  # PyTorch lacks an operator in the model's data type
            device, dtype = self.loaded.device, dtype_name(self.loaded.dtype)
            raise GenerationError(f"cannot compute on {device} in {dtype}: {error}; try another --dtype") from error
        except (RuntimeError, MemoryError) as error:
            of_memory = isinstance(error, torch.cuda.OutOfMemoryError | MemoryError)
            if not of_memory and not any(text in str(error) for text in _MEMORY_TEXTS):
                if self.loaded.compiled and isinstance(error, torch._dynamo.exc.TorchDynamoException):
                    cause = " ".join(str(error).split())[:200]
                    raise GenerationError(f"torch.compile failed: {cause}; leave out --compile") from error
                raise
            raise OutOfMemoryError(f"out of memory while rendering; {_MEMORY_ADVICE}") from error

    def _text_length(self) -> int | None:
        """Return the number of text tokens to request; None leaves it to the pipeline."""
        if "max_sequence_length" not in self._takes:
            return None
        if self.settings.max_sequence_length is not None:
            return self.settings.max_sequence_length
        return getattr(main_transformer(self.loaded.pipe).config, "max_text_seq_length", None)

    def _image(self, prompt: Prompt) -> Any:
        name = type(self.loaded.pipe).__name__
        needed = "image" in self._takes and self._takes["image"].default is inspect.Parameter.empty
        needed = needed or re.fullmatch(self.loaded.family.from_image, name) is not None
        if prompt.image is None:
            if needed:
                raise GenerationError(
                    f"{name} needs an image with each prompt, but {prompt.text!r} has none; "
                    "use --image, or a prompt file in YAML, JSON or CSV with `image`"
                )
            return None
        if "image" not in self._takes:
            raise GenerationError(
                f"{name} takes no image, but the prompt has one; remove the image or use an image-to-video model"
            )
        return open_image(prompt.image).resize((self.settings.width, self.settings.height))


def _unknown_words(pipe: Any, text: str) -> tuple[str, ...]:
    """Return the words of a prompt that aren't one token each: the demo model never saw others."""
    return tuple(word for word in text.split() if len(pipe.tokenizer(word, add_special_tokens=False)["input_ids"]) != 1)


@functools.cache
def _warn_of_words(unknown: tuple[str, ...]) -> None:
    """Warn once a process."""
    _LOG.warning(
        "the demo model doesn't know %s and will draw something else; it renders `a COLOUR SHAPE MOTION over a "
        "BACKGROUND background`, e.g. `a red circle moving right over a grey background`",
        ", ".join(unknown),
    )


def to_uint8(frames: npt.NDArray[Any]) -> Frames:
    """Convert float frames in [0, 1], (frames, height, width, 3), to uint8, rounding to the nearest.

    Raises:
        GenerationError: a value isn't finite, or all frames are black.
    """
    if not np.isfinite(frames).all():
        raise GenerationError("the model returned NaN or infinite frames; try another --dtype")
    video: Frames = np.rint(np.clip(frames, 0.0, 1.0) * 255.0).astype(np.uint8)
    if not video.any():
        raise GenerationError("all frames are black; try another --dtype or more steps")
    return video


def check_size(pipe: Any, settings: GenerationConfig) -> None:
    """Raise GenerationError, naming the nearest valid value, where the model can't render that number or size."""
    family = family_of(pipe)
    unit, first = family.frame_unit, family.first_frames
    if not family.is_image and (settings.num_frames - first) % unit:
        nearest = max(1 - first, round((settings.num_frames - first) / unit)) * unit + first
        raise GenerationError(
            f"num_frames must be a multiple of {unit}{f' plus {first}' if first else ''}, got {settings.num_frames}; "
            f"the nearest is {nearest}",
            is_usage=True,
        )
    unit = size_unit(pipe)
    for name, value in (("height", settings.height), ("width", settings.width)):
        if value % unit:
            nearest = max(1, round(value / unit)) * unit
            raise GenerationError(
                f"{name} must be a multiple of {unit}, got {value}; the nearest is {nearest}", is_usage=True
            )


def check_guidance(pipe: Any, settings: GenerationConfig) -> None:
    """Raise GenerationError where guidance_scale_2 is set without a second transformer."""
    if settings.guidance_scale_2 is not None and getattr(pipe.config, "boundary_ratio", None) is None:
        raise GenerationError(
            "guidance_scale_2 needs a pipeline with a second transformer and boundary_ratio, but "
            f"{type(pipe).__name__} has none; leave it null"
        )


def size_unit(pipe: Any) -> int:
    """Return the number of pixels that must divide a frame's sides: those in a side of a token."""
    # diffusers' pipelines require multiples of 8, even where the model doesn't.
    return math.lcm(8, token_side(pipe))
