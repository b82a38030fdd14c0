"""What a search measures before its first trial, kept on disk: calibrated curves and the video's sensitivity."""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sparsetune.engine import Event, Stepped, hand_out
from sparsetune.errors import TuningError
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
from sparsetune.tuning.space import num_groups


@dataclass(frozen=True)
class Prepared:
    """What a search reads its policies off, and the file of the curves."""

    curves: Curves
    sensitivity: Sensitivity
    path: Path


def prepare(bench: Bench, probe: bool = True) -> Prepared:
    """Calibrate and probe, as far as an earlier run with the same settings hasn't.

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


def _calibrate(bench: Bench, path: Path) -> Curves:
    """Calibrate on every tune prompt; the dense videos that this renders go to the cache.

    Prompts may come back in any order; they are merged in their own, so that the curves are the same to the last bit.
    """
    parts = [path.with_suffix(f".{index}.npz") for index in range(len(bench.prompts))]
    missing = [index for index, part in enumerate(parts) if not part.is_file()]

    def tell_step(place: int, event: Event) -> None:
        what = event.what
        if isinstance(what, Stepped):
            step = CalibrationStep(missing[place], len(parts), what.step, what.num_steps, event.worker)
            tell(bench.listeners, lambda listener: listener.on_calibration_step(step))
        else:
            bench.tell_incident(what)

    tasks = [_calibration(bench, index) for index in missing]
    done = 0
    for place, outcome in hand_out(bench.engine, tasks, tell_step, bench.has_time):
        outcome.get().save(parts[missing[place]])
        done += 1
    if done < len(missing):
        raise TimeIsUp
    merged = functools.reduce(Curves.merged, [Curves.load(part) for part in parts])
    merged.save(path)
    for part in parts:
        part.unlink(missing_ok=True)
    return merged


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
    """Render every probe that an earlier run hasn't; each result is written when it comes."""
    prompts = bench.probe_prompts
    if not prompts:
        return Sensitivity()
    keep_text = bench.keep_text[0]
    order = best_order(curves, bench.config.tune.orders, keep_text)
    listed = probes(curves, order, keep_text, num_groups(bench.config.tune.granularity, len(curves.layers)))
    path = of_curves.with_name(f"{of_curves.stem}-sensitivity.json")
    known, kind = _known(path), f"{len(listed)} probes in {order}"
    work = {
        f"{kind}, {probe.name}, prompt {index}": bench.score(prompt, probe.policy, ("psnr",))
        for probe in listed
        for index, prompt in enumerate(prompts)
    }
    _probe(bench, work, known, path)
    psnr = {
        probe.name: [known[f"{kind}, {probe.name}, prompt {index}"] for index in range(len(prompts))]
        for probe in listed
    }
    return fit(curves, psnr, order, keep_text)


def _probe(bench: Bench, work: Mapping[str, ScorePrompt], known: dict[str, float], path: Path) -> None:
    """Have those probes rendered that aren't known."""
    numbers = {key: number for number, key in enumerate(work)}
    missing = [key for key in work if key not in known]

    def tell_step(place: int, event: Event) -> None:
        what = event.what
        if isinstance(what, Stepped):
            if what.side == "sparse":
                step = ProbeStep(numbers[missing[place]], len(work), what.step, what.num_steps, event.worker)
                tell(bench.listeners, lambda listener: listener.on_probe_step(step))
        else:
            bench.tell_incident(what)

    for place, outcome in hand_out(bench.engine, [work[key] for key in missing], tell_step, bench.has_time):
        known[missing[place]] = outcome.get().metrics["psnr"]
        write_json(path, known)
    if any(key not in known for key in work):
        raise TimeIsUp


def _known(path: Path) -> dict[str, float]:
    if not path.is_file():
        return {}
    try:
        return {str(key): float(value) for key, value in json.loads(path.read_text()).items()}
    except (OSError, ValueError, AttributeError, TypeError) as problem:
        raise TuningError(
            f"the probes of an earlier run must be readable, but {path} isn't ({problem}); remove it to probe again"
        ) from problem
