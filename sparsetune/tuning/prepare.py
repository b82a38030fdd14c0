"""What a search measures before its first trial, kept on disk: calibrated curves and the video's sensitivity."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sparsetune.errors import TuningError
from sparsetune.evaluation.prompt import PromptResult
from sparsetune.evaluation.tasks import ScorePrompt
from sparsetune.executor import Event, StepDone
from sparsetune.files import write_json
from sparsetune.locks import exclusive
from sparsetune.tuning.calibration.attention_tap import sample_steps
from sparsetune.tuning.calibration.calibrate import CalibratePrompt
from sparsetune.tuning.calibration.curves import Curves
from sparsetune.tuning.calibration.sensitivity import Sensitivity, fit, probes
from sparsetune.tuning.context import TuningContext, calibration_signature, digest
from sparsetune.tuning.events import tell
from sparsetune.tuning.search.allocation import best_order
from sparsetune.tuning.search.space import num_groups
from sparsetune.tuning.shared_files import lock_file, measured, share


@dataclass(frozen=True)
class Prepared:
    """What a search reads its policies off, and the file of the curves."""

    curves: Curves
    sensitivity: Sensitivity
    path: Path


def prepare(bench: TuningContext, probe: bool = True) -> Prepared:
    """Calibrate and probe, as far as no run with the same settings has; several at once share it out.

    Args:
        bench: what the search works with.
        probe: whether the policies will be a search's, which needs the sensitivity too.

    Raises:
        TuningError: nothing could be measured, or a file of an earlier run is damaged.
        TimeIsUp: `tune.max_minutes` ended first; what was measured is kept.
    """
    path = curves_path(bench)
    curves = _calibrated(bench, path)
    return Prepared(curves, _sensitivity(bench, curves, path) if probe else Sensitivity(), path)


def curves_path(bench: TuningContext) -> Path:
    """Say where the curves of a search are kept."""
    return bench.config.tracking.root / "calibrations" / f"{digest(calibration_signature(bench))}.npz"


def _calibrated(bench: TuningContext, path: Path) -> Curves:
    """Calibrate on every tune prompt; the dense videos that this renders go to the cache."""
    tasks = {str(index): _calibration(bench, index) for index in range(len(bench.prompts))}
    return measured(bench, path, Curves.load, tasks, "calibration")


def sampled_steps(bench: TuningContext) -> tuple[int, ...]:
    """Give the denoising steps at which a bench's prompts are measured."""
    return sample_steps(bench.config.generation.num_inference_steps, bench.config.tune.calibration_steps)


def _calibration(bench: TuningContext, index: int) -> CalibratePrompt:
    config = bench.config
    return CalibratePrompt(
        prompt=bench.prompts[index],
        seed=config.tune.seed,
        steps=sampled_steps(bench),
        arrangements=bench.arrangements,
        points=bench.points,
        backend=config.backend,
        select_partial=config.tune.select_partial,
        cache=bench.cache,
    )


def _sensitivity(bench: TuningContext, curves: Curves, of_curves: Path) -> Sensitivity:
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
        with exclusive(lock_file(self.path, "file"), what="the probes' file", setting="tracking.root"):
            write_json(self.path, {**_known(self.path), key: value.metrics["psnr"]})


def _probe(bench: TuningContext, work: Mapping[str, ScorePrompt], results: _Probes) -> None:
    """Have those probes rendered that no process has."""
    numbers = {key: number for number, key in enumerate(work)}

    def tell_event(key: str | None, event: Event) -> None:
        what = event.what
        if key is None or not isinstance(what, StepDone):
            bench.tell_incident(what)
        elif what.side == "sparse":
            step = replace(what, phase="sensitivity", index=numbers[key], num_renderings=len(work), worker=event.worker)
            tell(bench.listeners, lambda listener: listener.on_step(step))

    share(bench, work, results, results.path, tell_event, "probe")


def _known(path: Path) -> dict[str, float]:
    if not path.is_file():
        return {}
    try:
        return {str(key): float(value) for key, value in json.loads(path.read_text()).items()}
    except (OSError, ValueError, AttributeError, TypeError) as problem:
        raise TuningError(
            f"the probes of an earlier run must be readable, but {path} isn't ({problem}); remove it to probe again"
        ) from problem
