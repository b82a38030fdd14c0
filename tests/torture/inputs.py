"""Damaged inputs: whatever is in a file, reading it ends with a value or with one error in a sentence."""

import atexit
import contextlib
import functools
import json
import pickle
import random
import resource
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from click.testing import CliRunner
from PIL import Image

from sparsetune.attention.breakeven import BreakEvenTable, ShapeTimes, load_table, save_table
from sparsetune.checkpoint import save_checkpoint
from sparsetune.checkpoint.sparge_pt import write_sparge_pt
from sparsetune.cli.main import main
from sparsetune.config import TrackingConfig, resolve
from sparsetune.config.files import configs_folder, read_config
from sparsetune.decoding import read_video
from sparsetune.errors import SparsetuneError
from sparsetune.evaluation.baseline import BaselineCache, BaselineKey
from sparsetune.evaluation.result import save_result
from sparsetune.models.prompts import load_prompts, open_image
from sparsetune.tracking import connect, resolve_store
from sparsetune.tracking.flavor import load_model, save_model
from sparsetune.tuning.calibration.curves import Curves
from sparsetune.tuning.record import RECORD_NAME, save_record
from sparsetune.video import write_video
from tests.report.synthetic import record_of, result_of
from tests.torture.mutations import damaged_bytes, damaged_json, damaged_metadata
from tests.tracking.recorded import checkpoint_of
from tests.tuning.tables import curves

MAX_SECONDS = 10
MAX_BYTES = 2**30
EXECUTED = "executed"
"""File that a pickle's code would write into the current folder."""


@dataclass(frozen=True)
class Reader:
    """A file that sparsetune reads: how it is written, damaged and read.

    `write` fills an empty folder and returns the file to damage; `read` gets that file.
    """

    name: str
    write: Callable[[Path], Path]
    read: Callable[[Path], object]
    damage: Callable[[bytes, random.Random], bytes] = damaged_bytes


@dataclass(frozen=True)
class Fault:
    """What a reader must not do with its input `number`."""

    reader: str
    number: int
    text: str


class _Code:
    """Unpickled, it would write `EXECUTED`."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open, (EXECUTED, "w")


def _checkpoint(name: str) -> Callable[[Path], Path]:
    return lambda folder: save_checkpoint(checkpoint_of(0.9), folder / "checkpoint") / name


def _pt(folder: Path) -> Path:
    write_sparge_pt(checkpoint_of(0.9).policy, folder / "a.pt", allow_loss=True)
    return folder / "a.pt"


def _pt_with_code(folder: Path) -> Path:
    torch.save({"transformer_blocks.0.attn1.inner_attention.is_sparse": _Code()}, folder / "a.pt")
    return folder / "a.pt"


def _pickle_with_code(folder: Path) -> Path:
    (folder / "a.pt").write_bytes(pickle.dumps({"a": _Code()}))
    return folder / "a.pt"


def _mlmodel(folder: Path) -> Path:
    save_model(checkpoint_of(0.9), folder / "model")
    return folder / "model" / "MLmodel"


def _settings(folder: Path) -> Path:
    sections: dict[str, dict[str, Any]] = {}
    for key, value in read_config(configs_folder() / "demo.yaml").items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    (folder / "a.yaml").write_text(json.dumps(sections))
    return folder / "a.yaml"


def _prompts(name: str, text: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        Image.new("RGB", (8, 8), "red").save(folder / "red.png")
        (folder / name).write_text(text)
        return folder / name

    return write


def _image(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(pixels).save(folder / name, exif=exif)
        return folder / name

    return write


def _video(folder: Path) -> Path:
    write_video(folder / "a.mp4", np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), np.uint8), 8)
    return folder / "a.mp4"


def _gif(folder: Path) -> Path:
    frames = [Image.fromarray(frame) for frame in np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)]
    frames[0].save(folder / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    return folder / "a.gif"


def _result(folder: Path) -> Path:
    save_result(result_of(), folder / "result.json")
    shutil.copy(folder / "result.json", folder / "demo_accuracy_tuned.json")
    return folder / "demo_accuracy_tuned.json"


def _record(folder: Path) -> Path:
    save_record(record_of(before=result_of(), after=result_of(variant=1)), folder / RECORD_NAME)
    return folder / RECORD_NAME


def _break_even(folder: Path) -> Path:
    sparse = [{"kernel": "sparge", "rule": "topk", "sparsity": at, "latency_ms": 9.0 - 8 * at} for at in (0.2, 0.6)]
    shape = {"batch": 1, "heads": 4, "tokens": 512, "head_dim": 64, "dtype": "float32", "dense_ms": {"sdpa": 5.0}}
    times = ShapeTimes.model_validate({**shape, "sparse": sparse})
    save_table(BreakEvenTable(device="cpu", versions={}, shapes=(times,)), folder / "a.json")
    return folder / "a.json"


def _curves(folder: Path) -> Path:
    curves().save(folder / "a.npz")
    return folder / "a.npz"


KEY = BaselineKey(
    source="demo", revision=None, fingerprint="0" * 64, pipeline_class="CogVideoXPipeline", prompt="a cat",
    negative_prompt="", seed=1, num_frames=5, height=16, width=16, num_inference_steps=2, guidance_scale=6.0,
    max_sequence_length=None, scheduler="DDIM", dtype="float32", device="cpu", vae_tiling=False, versions=(),
)  # fmt: skip


def _baseline(folder: Path) -> Path:
    BaselineCache(folder / "cache", 1.0).put(
        KEY, np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8), 1.0
    )
    return folder / "cache" / f"{KEY.digest}.npz"


def _read_baseline(path: Path) -> None:
    cache = BaselineCache(path.parent, 1.0)
    cache.ls()
    cache.get(KEY)
    cache.clear()


def _use_table(path: Path) -> None:
    for times in (table := load_table(path, "cpu")).shapes:
        table.limit("sparge", (times.batch, times.heads, times.tokens, times.head_dim), times.dtype)


def _store(folder: Path) -> Path:
    shutil.copy(_empty_store(), folder / "mlflow.db")
    return folder / "mlflow.db"


@functools.cache
def _empty_store() -> Path:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    connect(resolve_store(TrackingConfig(root=folder), {}))
    return folder / "mlflow.db"


class CommandFault(Exception):
    """A command ended otherwise than with a result or one error."""


def _command(*arguments: str) -> Callable[[Path], None]:
    """Run a command; FILE and FOLDER in its arguments are the damaged file and its folder."""

    def read(path: Path) -> None:
        named = {"FILE": str(path), "FOLDER": str(path.parent)}
        words = [functools.reduce(lambda text, one: text.replace(*one), named.items(), word) for word in arguments]
        done = CliRunner().invoke(main, words)
        errors = [line for line in done.stderr.splitlines() if line.startswith("sparsetune: ")]
        unexpected = any(line.startswith("sparsetune: unexpected ") for line in errors)
        if done.exit_code not in (0, 1, 2, 3) or "Traceback" in done.output or unexpected:
            raise CommandFault(f"{' '.join(arguments)} ended with {done.exit_code}: {done.stderr[-300:]}")
        if done.exit_code and len(errors) != 1:
            raise CommandFault(f"{' '.join(arguments)} ended with {done.exit_code} and printed {errors}")

    return read


PROMPTS_JSON = '["a cat", {"prompt": "a dog", "image": "red.png", "seed": 7, "negative_prompt": "blurred"}]'
PROMPT_LINES = '"a cat"\n{"prompt": "a dog", "image": "red.png", "seed": 7}\n'
READERS = (
    Reader("manifest.json", _checkpoint("manifest.json"), _command("checkpoint", "show", "FOLDER"), damaged_json),
    Reader("policy.safetensors", _checkpoint("policy.safetensors"), _command("checkpoint", "show", "FOLDER")),
    Reader(
        "policy metadata", _checkpoint("policy.safetensors"), _command("checkpoint", "show", "FOLDER"), damaged_metadata
    ),
    Reader("SpargeAttn .pt", _pt, _command("checkpoint", "show", "FILE")),
    Reader(".pt with code", _pt_with_code, _command("checkpoint", "show", "FILE")),
    Reader("pickle with code", _pickle_with_code, _command("checkpoint", "show", "FILE")),
    Reader("MLmodel", _mlmodel, lambda path: load_model(str(path.parent))),
    Reader("settings, YAML", _settings, lambda path: resolve(path, environ={}), damaged_json),
    Reader("settings, command", _settings, _command("cache", "ls", "--config", "FILE"), damaged_json),
    Reader("prompts .txt", _prompts("a.txt", "a cat\na dog\n"), load_prompts),
    Reader("prompts .yaml", _prompts("a.yaml", "- a cat\n- {prompt: a dog, seed: 7}\n"), load_prompts),
    Reader("prompts .json", _prompts("a.json", PROMPTS_JSON), load_prompts, damaged_json),
    Reader("prompts .jsonl", _prompts("a.jsonl", PROMPT_LINES), load_prompts),
    Reader("prompts .csv", _prompts("a.csv", "prompt,seed\na cat,\na dog,7\n"), load_prompts),
    Reader("image .png", _image("a.png"), open_image),
    Reader("image .jpg", _image("a.jpg"), open_image),
    Reader("image .tif", _image("a.tif"), open_image),
    Reader("video .mp4", _video, read_video),
    Reader("video .gif", _gif, read_video),
    Reader("result, compare", _result, _command("compare", "FOLDER/result.json", "FILE", "--force"), damaged_json),
    Reader("result, report", _result, _command("report", "FILE"), damaged_json),
    Reader("tuning.json, report", _record, _command("report", "FOLDER"), damaged_json),
    Reader("calibration", _curves, Curves.load),
    Reader("break-even table", _break_even, _use_table, damaged_json),
    Reader("cached dense video", _baseline, _read_baseline),
    Reader("run store", _store, _command("runs", "--tracking-uri", "sqlite:///FILE")),
)


def faults(reader: Reader, folder: Path, seed: int, numbers: Iterable[int]) -> Iterator[Fault]:
    """Damage the reader's file anew for each number but 0, read it, and yield what is wrong.

    The current folder must be empty: `EXECUTED` is looked for there.
    """
    for number in numbers:
        draw = random.Random(f"{seed}/{reader.name}/{number}")
        place = folder / f"{number}"
        place.mkdir(parents=True)
        path = reader.write(place)
        if number:
            path.write_bytes(reader.damage(path.read_bytes(), draw))
        if text := _fault(reader, path):
            yield Fault(reader.name, number, text)
        shutil.rmtree(place)


def _fault(reader: Reader, path: Path) -> str | None:
    executed = Path(EXECUTED)
    memory, start, text = _peak_bytes(), time.monotonic(), None
    try:
        with warnings.catch_warnings(), _alarm(3 * MAX_SECONDS):
            warnings.simplefilter("ignore")
            reader.read(path)
    except SparsetuneError:
        pass
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if executed.exists():
        executed.unlink()
        return "ran the file's code"
    if (seconds := time.monotonic() - start) > MAX_SECONDS:
        return f"took {seconds:.0f} s"
    if (grown := _peak_bytes() - memory) > MAX_BYTES:
        return f"took {grown / 2**30:.1f} GB more memory"
    return text


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
