"""What a search measures before its first trial, kept on disk: calibrated curves and the video's sensitivity."""

import json
from dataclasses import dataclass
from pathlib import Path

from sparsetune.errors import GenerationError, TuningError
from sparsetune.evaluation.events import Side
from sparsetune.evaluation.pair import evaluate_prompt
from sparsetune.files import write_json
from sparsetune.models.sparse import default_policy, sparsify
from sparsetune.tuning.allocate import best_order
from sparsetune.tuning.bench import Bench, calibration_signature, digest
from sparsetune.tuning.calibrate import calibrate, sample_steps
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
    """Calibrate on every tune prompt; the dense videos that this renders go to the cache."""
    config, renderer = bench.config, bench.renderer
    steps = sample_steps(config.generation.num_inference_steps, config.tune.calibration_steps)
    merged: Curves | None = None
    for index, prompt in enumerate(bench.prompts):
        part = path.with_suffix(f".{index}.npz")
        if part.is_file():
            curves = Curves.load(part)
        else:
            if bench.seconds_left == 0.0:
                raise TimeIsUp

            def on_step(step: int, num_steps: int, index: int = index) -> None:
                event = CalibrationStep(index, len(bench.prompts), step, num_steps)
                tell(bench.listeners, lambda listener: listener.on_calibration_step(event))

            curves, rendering = calibrate(
                renderer,
                prompt,
                config.tune.seed,
                steps=steps,
                arrangements=bench.arrangements,
                points=bench.points,
                backend=bench.backend,
                select_partial=config.tune.select_partial,
                on_step=on_step,
            )
            bench.keep_dense(prompt, rendering.frames, rendering.seconds)
            curves.save(part)
        merged = curves if merged is None else merged.merged(curves)
    if merged is None:
        raise ValueError("load_prompts gives at least one prompt")
    merged.save(path)
    for index in range(len(bench.prompts)):
        path.with_suffix(f".{index}.npz").unlink(missing_ok=True)
    return merged


def _sensitivity(bench: Bench, curves: Curves, of_curves: Path) -> Sensitivity:
    """Render every probe that an earlier run hasn't; each result is written before the next begins."""
    prompts = bench.probe_prompts
    if not prompts:
        return Sensitivity()
    keep_text = bench.keep_text[0]
    order = best_order(curves, bench.config.tune.orders, keep_text)
    listed = probes(curves, order, keep_text, num_groups(bench.config.tune.granularity, len(curves.layers)))
    path = of_curves.with_name(f"{of_curves.stem}-sensitivity.json")
    known, kind = _known(path), f"{len(listed)} probes in {order}"
    work = [(probe, index) for probe in listed for index in range(len(prompts))]
    pipe = bench.renderer.loaded.pipe
    with sparsify(pipe, default_policy(pipe), bench.config.backend) as handle:
        for number, (probe, index) in enumerate(work):
            key = f"{kind}, {probe.name}, prompt {index}"
            if key in known:
                continue
            if bench.seconds_left == 0.0:
                raise TimeIsUp
            handle.policy = probe.policy

            def watch(side: Side, step: int, num_steps: int, cached: bool, number: int = number) -> None:
                if side == "sparse":
                    event = ProbeStep(number, len(work), step, num_steps)
                    tell(bench.listeners, lambda listener: listener.on_probe_step(event))

            result = evaluate_prompt(
                bench.renderer, handle, prompts[index], bench.config.tune.seed, bench.cache, ("psnr",), watch
            )
            if result.error is not None:
                raise GenerationError(result.error)
            known[key] = result.metrics["psnr"]
            write_json(path, known)
    psnr = {
        probe.name: [known[f"{kind}, {probe.name}, prompt {index}"] for index in range(len(prompts))]
        for probe in listed
    }
    return fit(curves, psnr, order, keep_text)


def _known(path: Path) -> dict[str, float]:
    if not path.is_file():
        return {}
    try:
        return {str(key): float(value) for key, value in json.loads(path.read_text()).items()}
    except (OSError, ValueError, AttributeError, TypeError) as problem:
        raise TuningError(
            f"the probes of an earlier run must be readable, but {path} isn't ({problem}); remove it to probe again"
        ) from problem
