"""Measurements before the first trial, kept on disk: calibrated curves, sensitivity and refined thresholds."""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from sparsetune.attention.backends import skips_work
from sparsetune.attention.policy import Policy
from sparsetune.bench.step_time import StepSeconds
from sparsetune.checkpoint import versions
from sparsetune.documents import read_json, read_text
from sparsetune.errors import TuningError
from sparsetune.evaluation.tasks import TimeStep
from sparsetune.executor import Event, Incident, Phase, StepDone, Task, run_all, run_one
from sparsetune.files import write_json
from sparsetune.locks import exclusive_if_free
from sparsetune.tuning.calibration.attention_tap import sample_steps
from sparsetune.tuning.calibration.bounded_policy import Bounds, starting_policy
from sparsetune.tuning.calibration.calibrate import CalibratePrompt
from sparsetune.tuning.calibration.curves import Curves, reading
from sparsetune.tuning.calibration.refine import RefinedThresholds, RefinePrompt
from sparsetune.tuning.calibration.sensitivity import Sensitivity, fit, probes
from sparsetune.tuning.context import TimeIsUp, TuningContext, calibration_signature, digest
from sparsetune.tuning.events import notify
from sparsetune.tuning.search.allocation import best_order
from sparsetune.tuning.search.space import num_groups

POLL_SECONDS = 0.5
"""How often a process checks whether another one has finished measuring."""

_REFINEMENT_VERSION = 1
"""Increment when refinement comes to other thresholds than before; earlier files are then ignored."""


@dataclass(frozen=True)
class Prepared:
    curves: Curves
    sensitivity: Sensitivity
    path: Path  # of the curves


_TOPK = (0.7, 0.4, 0.15)
"""Fractions of the key blocks at which a step is timed."""

_REPEATS = 3  # of each timing: under half a minute for CogVideoX-2b's steps of 0.6 s

NUM_TIMED_STEPS = (len(_TOPK) + 4) * (2 * _REPEATS + 1)
"""Denoising steps that `measure_step` runs, most to warm up: dense twice, sparse, with orders, without attention."""


def measure_step(context: TuningContext) -> StepSeconds | None:
    """Time a denoising step, unless an earlier run on this GPU has.

    None where speed isn't the goal, or the kernel computes every pair. Raises TuningError where no attention call can
    run sparse.
    """
    if context.goal != "speed" or not skips_work(context.runtime.kernel):
        return None
    runtime = context.runtime
    signature = calibration_signature(context) | {
        "device_name": runtime.device_name,
        "compiled": runtime.compiled,
        "versions": versions(),
    }
    path = context.config.tracking.root / "calibrations" / "steps" / f"{digest(signature)}.json"
    with _locked(context, "preparation", path):
        if path.is_file():
            with reading(path, "seconds of a step", "measure again"):
                return StepSeconds(**read_json(read_text(path)))
        task = TimeStep(context.prompts[0], context.config.tune.seed, context.config.backend, _TOPK, _REPEATS)
        times = run_one(context.executor, task)
        if not any(row.sparsity for row in times.sparse):
            raise TuningError(
                f"cannot tune this model: none of its attention calls can run sparse: {'; '.join(times.fallbacks)}"
            )
        done = StepDone("preparation", "dense", NUM_TIMED_STEPS, NUM_TIMED_STEPS)
        notify(context.listeners, lambda listener: listener.on_step(done))
        measured = StepSeconds.of(times)
        write_json(path, asdict(measured))
    return measured


def prepare(context: TuningContext, probe: bool = True) -> Prepared:
    """Calibrate and, if `probe`, measure sensitivity, as far as no earlier run with the same settings has.

    Raises `TimeIsUp` where `tune.max_minutes` are over, and keeps completed prompts; `TuningError` where a layer can't
    be measured or a file of an earlier run is damaged.
    """
    config, path = context.config, curves_path(context)
    tasks = [
        CalibratePrompt(
            prompt=prompt,
            seed=config.tune.seed,
            steps=sampled_steps(context),
            arrangements=context.arrangements,
            points=context.points,
            backend=config.backend,
            select_partial=config.tune.select_partial,
            cache=context.cache,
        )
        for prompt in context.prompts
    ]
    curves = _measured_table(context, "calibration", path, Curves.load, tasks)
    return Prepared(curves, _sensitivity(context, curves, path) if probe else Sensitivity(), path)


def sampled_steps(context: TuningContext) -> tuple[int, ...]:
    """Denoising steps at which attention is measured."""
    return sample_steps(context.config.generation.num_inference_steps, context.config.tune.calibration_steps)


def curves_path(context: TuningContext) -> Path:
    return context.config.tracking.root / "calibrations" / f"{digest(calibration_signature(context))}.npz"


def refined_policy(context: TuningContext, curves: Curves) -> Policy:
    """Search the sparsest policy with every head's error within `tune.l1` and `tune.pv_l1`, unless a run has before.

    The curves determine each head's simthreshd1 and token order. Each prompt is then rendered dense once more, and the
    lowest mask threshold and `pvthreshd` within the bounds are searched with the kernel at the sampled steps. Raises as
    `prepare` does.
    """
    tune, start = context.config.tune, refinement_start(context, curves)
    bounds, steps = Bounds(tune.l1, tune.pv_l1), sampled_steps(context)
    tasks = [
        RefinePrompt(prompt, tune.seed, start, bounds, steps, context.config.backend) for prompt in context.prompts
    ]
    path = refined_path(context, start)
    return _measured_table(context, "refinement", path, RefinedThresholds.load, tasks).policy(start)


def refinement_start(context: TuningContext, curves: Curves) -> Policy:
    """Policy whose simthreshd1 and token orders refinement keeps."""
    tune = context.config.tune
    return starting_policy(curves, tune.l1, orders=tune.orders, keep_text=context.keep_text[0], rule=tune.rules[0])


def refined_path(context: TuningContext, start: Policy) -> Path:
    """File of the refined thresholds; its name is a digest of all that decides them."""
    tune = context.config.tune
    signature = calibration_signature(context) | {
        "search": _REFINEMENT_VERSION,
        "l1": tune.l1,
        "pv_l1": tune.pv_l1,
        "start": [
            [layer.name, order, layer.rule, [head.simthreshd1 for head in layer.heads]]
            for layer, order in zip(start.layers, start.orders, strict=True)
        ],
        "keep_text": start.keep_text,
    }
    return context.config.tracking.root / "calibrations" / "limits" / f"{digest(signature)}.npz"


def _sensitivity(context: TuningContext, curves: Curves, path_of_curves: Path) -> Sensitivity:
    """Render the probes that are missing in the file, and fit the sensitivity."""
    prompts = context.probe_prompts
    if not prompts:
        return Sensitivity()
    keep_text = context.keep_text[0]
    order = best_order(curves, context.config.tune.orders, keep_text)
    listed = probes(curves, order, keep_text, num_groups(context.config.tune.granularity, len(curves.layers)))
    path = path_of_curves.with_name(f"{path_of_curves.stem}-sensitivity.json")

    def key(name: str, index: int) -> str:
        return f"{len(listed)} probes in {order}, {name}, prompt {index}"

    tasks = {
        key(name, index): context.score(prompt, policy, ("psnr",))
        for name, policy in listed.items()
        for index, prompt in enumerate(prompts)
    }
    keys = list(tasks)
    with _locked(context, "sensitivity", path):
        known = _read_probes(path)

        def keep(number: int, result: Any) -> None:
            known[keys[number]] = result.metrics["psnr"]
            write_json(path, known)

        _run_missing(context, "sensitivity", list(tasks.values()), lambda number: keys[number] in known, keep)
    psnr = {name: [known[key(name, index)] for index in range(len(prompts))] for name in listed}
    return fit(curves, psnr, order, keep_text)


def _read_probes(path: Path) -> dict[str, float]:
    if not path.is_file():
        return {}
    with reading(path, "probes", "probe again"):
        known = {key: float(value) for key, value in dict(read_json(read_text(path))).items()}
        if damaged := [key for key, value in known.items() if not math.isfinite(value)]:
            raise ValueError(f"{damaged[0]} is not finite")
        return known


Table = TypeVar("Table", Curves, RefinedThresholds)


def _measured_table(
    context: TuningContext, phase: Phase, path: Path, load: Callable[[Path], Table], tasks: Sequence[Task[Table]]
) -> Table:
    """Load a table, or run the tasks that measure it, one a prompt.

    Each prompt's table is saved in a file of its own, so that an interrupted run is resumed, until all are merged: in
    the order of the prompts, so that the result is the same to the last bit whatever order they were measured in.
    """
    if path.is_file():
        return load(path)
    parts = [path.with_suffix(f".{index}.npz") for index in range(len(tasks))]
    with _locked(context, phase, path):
        if path.is_file():
            return load(path)
        _run_missing(
            context, phase, tasks, lambda index: parts[index].is_file(), lambda index, table: table.save(parts[index])
        )
        merged = functools.reduce(lambda one, other: one.merged(other), [load(part) for part in parts])
        merged.save(path)
        for part in parts:
            part.unlink()
    return merged


def _run_missing(
    context: TuningContext,
    phase: Phase,
    tasks: Sequence[Task[Any]],
    is_done: Callable[[int], bool],
    keep: Callable[[int, Any], None],
) -> None:
    """Run the tasks that aren't done, and keep each result as it comes; raises `TimeIsUp` if time didn't suffice."""
    missing = [number for number in range(len(tasks)) if not is_done(number)]

    def on_event(index: int, event: Event) -> None:
        what = event.what
        if isinstance(what, Incident):
            notify(context.listeners, lambda listener: listener.on_incident(what))
        elif isinstance(what, StepDone) and (phase != "sensitivity" or what.side == "sparse"):
            step = replace(what, phase=phase, index=missing[index], num_renderings=len(tasks), worker=event.worker)
            notify(context.listeners, lambda listener: listener.on_step(step))

    for index, future in run_all(context.executor, [tasks[number] for number in missing], on_event, context.has_time):
        keep(missing[index], future.result())
    if not all(map(is_done, range(len(tasks)))):
        raise TimeIsUp


@contextlib.contextmanager
def _locked(context: TuningContext, phase: Phase, path: Path) -> Iterator[None]:
    """Hold the lock of a file: one process measures, the others wait and notify listeners. May raise `TimeIsUp`."""
    notified = False
    while True:
        with exclusive_if_free(path.with_suffix(".lock"), setting="tracking.root") as free:
            if free:
                yield
                return
        if not context.has_time():
            raise TimeIsUp
        if not notified:
            notify(context.listeners, lambda listener: listener.on_wait(f"the {phase}"))
            notified = True
        time.sleep(POLL_SECONDS)
