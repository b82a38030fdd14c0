"""Events of `--log-format json` and their fields: the stable interface for programs."""

from collections.abc import Mapping
from typing import Final, Literal

SCHEMA_VERSION: Final = 1
"""Incremented when a field is removed or changes its meaning; new events and fields do not count."""

Level = Literal["info", "warning", "error"]

COMMON: Final[Mapping[str, str]] = {
    "time": "UTC, ISO 8601 with milliseconds",
    "level": "info, warning or error",
    "event": "name of the event, from the table below",
    "message": "the line that the text format prints",
}
"""Fields of every line."""

_TRIAL: Final = {"trial": "the trial's number in the study, from 0"}
_PROMPT: Final = {"prompt_index": "index of the prompt, from 0", "num_prompts": "number of prompts"}

EVENTS: Final[Mapping[str, Mapping[str, str]]] = {
    "start": {
        "command": "the command, e.g. tune",
        "version": "version of sparsetune",
        "schema_version": f"version of these events: {SCHEMA_VERSION}",
    },
    "loading": {"model": "the model, as given to --model"},
    "study_start": {
        "study_name": "the study's name",
        "n_trials": "total trials, including earlier runs",
        "num_done": "trials of earlier runs",
        "num_prompts": "number of tune prompts",
        "num_steps": "denoising steps of a rendering",
    },
    "phase": {"phase": "the phase that starts: calibration, refinement, sensitivity, trials, validation or evaluation"},
    "progress": {
        "phase": "the current phase: one of those, or render for `sparsetune generate`",
        "fraction": "part of the phase that is done, in [0, 1]",
        "seconds_left_phase": "estimate for the current phase",
        "seconds_left": "estimate for all phases; null while a later phase cannot be estimated",
        "estimated_by": "what the estimate is based on, in words",
        "process_memory_gib": "resident memory of this process; null if unknown",
        "gpu_memory_gib": "memory reserved by PyTorch on this process's GPU; null without one",
    },
    "trial_start": _TRIAL
    | {"params": "parameters by name", "worker": "host and device that run it; null for this process"},
    "trial_prompt": _TRIAL | _PROMPT | {"psnr": "PSNR of this prompt in dB", "sparsity": "of this prompt, in [0, 1]"},
    "trial_end": _TRIAL
    | {
        "state": "complete, pruned or failed",
        "reason": "why it was pruned or failed; null when complete",
        "sparsity": "mean over its prompts, in [0, 1]; null if nothing was measured, as are the next three",
        "psnr": "mean PSNR in dB",
        "psnr_worst": "PSNR of its worst prompt in dB",
        "frame_cosine": "mean frame_cosine",
        "feasible": "whether it is complete and meets the gate on the tune prompts",
        "seconds": "duration",
        "best_trial": "number of the best trial of this run so far; null while none meets the gate",
    },
    "incident": {
        "change": "what happened to a worker: lost, joined, refused or out of memory",
        "worker": "its number, host and GPU",
    },
    "wait": {"what": "what other processes of the study still run"},
    "validation": _TRIAL
    | {
        "num_prompts": "number of validation prompts",
        "psnr": "mean PSNR on them in dB; null where a rendering failed",
        "psnr_worst": "PSNR of the worst of them in dB; null as psnr",
        "feasible": "whether it meets the gate on them too",
    },
    "winner": _TRIAL
    | {"sparsity": "see trial_end", "psnr": "see trial_end", "checkpoint_path": "its checkpoint folder"},
    "study_end": {
        "best_trial": "number of the winner; null without one",
        "seconds": "duration of this run",
        "interrupted": "whether Ctrl-C ended the search early",
    },
    "evaluation_start": {
        "policy": "tuned, or default for SpargeAttn's default thresholds",
        "num_prompts": "prompts to evaluate",
        "num_steps": "denoising steps of a rendering",
    },
    "prompt_start": _PROMPT | {"prompt": "text of the prompt"},
    "prompt_end": _PROMPT
    | {
        "prompt": "text of the prompt",
        "error": "why it failed; null if it did not",
        "metrics": "values by metric name; empty if it failed",
        "sparsity": "sparsity in [0, 1]; null if it failed",
        "seconds_dense": "duration of the dense rendering, of the original one if it was cached; null if it failed",
        "seconds_sparse": "duration of the sparse rendering; null if it failed",
        "dense_cached": "whether the dense video came from the cache",
    },
    "evaluation_end": {
        "policy": "see evaluation_start",
        "score": "score out of 100; null if every prompt failed",
        "verdict": "excellent, good, acceptable, degraded or failed",
        "gate_passed": "whether the metrics pass the gate to deploy",
        "sparsity": "over all attention calls, in [0, 1]; null if every prompt failed",
    },
    "timing": {"name": "what was timed", "milliseconds": "duration"},
    "pair": {"name": "name of the two videos", "metrics": "values by metric name"},
    "note": {},
    "log": {"logger": "name of the Python logger"},
    "output": {},
    "error": {"error_type": "class of the error", "exit_code": "exit status of the command"},
}
"""Fields of each event, besides the common ones."""

JSON_ONLY: Final = frozenset(
    {"start", "trial_start", "trial_prompt", "study_end", "evaluation_start", "evaluation_end"}
)
"""Events that the text format omits, since other lines or the result show them."""
