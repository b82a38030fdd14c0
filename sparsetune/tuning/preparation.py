"""What a search measures before its first trial, kept on disk: calibrated curves and the video's sensitivity."""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsetune.engine import Event, Stepped, Task
from sparsetune.errors import TuningError
from sparsetune.evaluation.lock import exclusive
from sparsetune.evaluation.pair import PromptResult
from sparsetune.evaluation.scoring import ScorePrompt
from sparsetune.files import write_json
from sparsetune.tuning.allocate import best_order
from sparsetune.tuning.bench import Bench, calibration_signature, digest
from sparsetune.tuning.calibrate import sample_steps
from sparsetune.tuning.calibration import CalibratePrompt
from sparsetune.tuning.curves import Curves
from sparsetune.tuning.events import CalibrationStep, ProbeStep, tell
from sparsetune.tuning.runner import TimeIsUp
from sparsetune.tuning.sensitivity import Sensitivity, fit, probes
from sparsetune.tuning.sharing import Shelf, share_out
from sparsetune.tuning.space import num_groups


@dataclass(frozen=True)
class Prepared:
    """What a search reads its policies off, and the file of the curves."""

    curves: Curves
    sensitivity: Sensitivity
    path: Path


def prepare(bench: Bench, probe: bool = True) -> Prepared:
    """Calibrate and probe, as far as no run with the same settings has; several at once share it out.

    Args:
        bench: what the search works with.
        probe: whether the policies will be a search's, which needs the sensitivity too.

    Raises:
        TuningError: nothing could be measured, or a file of an earlier run is damaged.
        TimeIsUp: `tune.max_minutes` ended first; what was measured is kept.
    """
    path = curves_path(bench)
    curves = Curves.load(path) if path.is_file() else _calibrate(bench, path)
    return Prepared(curves, _sensitivity(bench, curves, path) if probe else Sensitivity(), path)


def curves_path(bench: Bench) -> Path:
    """Say where the curves of a search are kept."""
    return bench.config.tracking.root / "calibrations" / f"{digest(calibration_signature(bench))}.npz"


@dataclass(frozen=True)
class _Parts:
    """The curves of each prompt, a file each, until they are merged into one."""

    path: Path

    def part(self, key: str) -> Path:
        return self.path.with_suffix(f".{key}.npz")

    def has(self, key: str) -> bool:
        return self.part(key).is_file() or self.path.is_file()

    def put(self, key: str, value: Curves) -> None:
        value.save(self.part(key))

    def merged(self, num_prompts: int) -> Curves:
        """Merge all parts, unless another process has.

        Prompts may come back in any order; they are merged in their own, so that the curves are the same to the last
        bit.
        """
        parts = [self.part(str(index)) for index in range(num_prompts)]
        with exclusive(_lock(self.path, "merge"), what="the calibration", setting="tracking.root"):
            if self.path.is_file():
                return Curves.load(self.path)
            merged = functools.reduce(Curves.merged, [Curves.load(part) for part in parts])
            merged.save(self.path)
            for part in parts:
                part.unlink(missing_ok=True)
            return merged


def _calibrate(bench: Bench, path: Path) -> Curves:
    """Calibrate on every tune prompt; the dense videos that this renders go to the cache."""
    work = {str(index): _calibration(bench, index) for index in range(len(bench.prompts))}

    def tell_event(key: str | None, event: Event) -> None:
        what = event.what
        if key is not None and isinstance(what, Stepped):
            step = CalibrationStep(int(key), len(work), what.step, what.num_steps, event.worker)
            tell(bench.listeners, lambda listener: listener.on_calibration_step(step))
        else:
            bench.tell_incident(what)

    _share_out(bench, work, _Parts(path), path, tell_event, "calibration")
    return _Parts(path).merged(len(work))


def _share_out(
    bench: Bench,
    work: Mapping[str, Task[Any]],
    shelf: Shelf,
    path: Path,
    on_event: Callable[[str | None, Event], None],
    name: str,
) -> None:
    """Have what isn't done yet done, by this process and others on the same study.

    Raises:
        TimeIsUp: `tune.max_minutes` ended first.
    """

    def tell_wait(num_left: int) -> None:
        tell(bench.listeners, lambda listener: listener.on_wait(f"{num_left} {name}{'' if num_left == 1 else 's'}"))

    if not share_out(
        bench.engine,
        work,
        shelf,
        lambda key: _lock(path, key),
        on_event=on_event,
        on_wait=tell_wait,
        more=bench.has_time,
    ):
        raise TimeIsUp


def _lock(path: Path, key: str) -> Path:
    return path.with_name(f"{path.stem}.{digest({'key': key})}.lock")


def _calibration(bench: Bench, index: int) -> CalibratePrompt:
    config = bench.config
    return CalibratePrompt(
        prompt=bench.prompts[index],
        seed=config.tune.seed,
        steps=sample_steps(config.generation.num_inference_steps, config.tune.calibration_steps),
        arrangements=bench.arrangements,
        points=bench.points,
        backend=config.backend,
        select_partial=config.tune.select_partial,
        cache=bench.cache,
    )


def _sensitivity(bench: Bench, curves: Curves, of_curves: Path) -> Sensitivity:
    """Render every probe that no run has yet; each result is written when it comes."""
    prompts = bench.probe_prompts
    if not prompts:
        return Sensitivity()
    keep_text = bench.keep_text[0]
    order = best_order(curves, bench.config.tune.orders, keep_text)
    listed = probes(curves, order, keep_text, num_groups(bench.config.tune.granularity, len(curves.layers)))
    results = _Probes(of_curves.with_name(f"{of_curves.stem}-sensitivity.json"))
    kind = f"{len(listed)} probes in {order}"
    work = {
        f"{kind}, {probe.name}, prompt {index}": bench.score(prompt, probe.policy, ("psnr",))
        for probe in listed
        for index, prompt in enumerate(prompts)
    }
    _probe(bench, work, results)
    known = _known(results.path)
    psnr = {
        probe.name: [known[f"{kind}, {probe.name}, prompt {index}"] for index in range(len(prompts))]
        for probe in listed
    }
    return fit(curves, psnr, order, keep_text)


@dataclass(frozen=True)
class _Probes:
    """The PSNR of each probe, all in one file."""

    path: Path

    def has(self, key: str) -> bool:
        return key in _known(self.path)

    def put(self, key: str, value: PromptResult) -> None:
        with exclusive(_lock(self.path, "file"), what="the probes' file", setting="tracking.root"):
            write_json(self.path, {**_known(self.path), key: value.metrics["psnr"]})


def _probe(bench: Bench, work: Mapping[str, ScorePrompt], results: _Probes) -> None:
    """Have those probes rendered that no process has."""
    numbers = {key: number for number, key in enumerate(work)}

    def tell_event(key: str | None, event: Event) -> None:
        what = event.what
        if key is None or not isinstance(what, Stepped):
            bench.tell_incident(what)
        elif what.side == "sparse":
            step = ProbeStep(numbers[key], len(work), what.step, what.num_steps, event.worker)
            tell(bench.listeners, lambda listener: listener.on_probe_step(step))

    _share_out(bench, work, results, results.path, tell_event, "probe")


def _known(path: Path) -> dict[str, float]:
    if not path.is_file():
        return {}
    try:
        return {str(key): float(value) for key, value in json.loads(path.read_text()).items()}
    except (OSError, ValueError, AttributeError, TypeError) as problem:
        raise TuningError(
            f"the probes of an earlier run must be readable, but {path} isn't ({problem}); remove it to probe again"
        ) from problem
