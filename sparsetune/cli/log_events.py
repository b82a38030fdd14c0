"""The events that `--log-format json` writes, and the fields of each: what programs may rely on."""

from collections.abc import Mapping
from typing import Final, Literal

SCHEMA_VERSION: Final = 1
"""Raised when a field changes its meaning or goes; further events and fields may come without that."""

Level = Literal["info", "warning", "error"]

COMMON: Final[Mapping[str, str]] = {
    "time": "when, in UTC as ISO 8601 with milliseconds",
    "level": "info, warning or error",
    "event": "what happened: a name of the table below",
    "message": "the same for people, as the text format prints it",
}
"""Fields of every line."""

_TRIAL: Final = {"trial": "the trial's number in the study, from 0"}
_PROMPT: Final = {"prompt_index": "the prompt's place, from 0", "num_prompts": "how many there are"}

EVENTS: Final[Mapping[str, Mapping[str, str]]] = {
    "start": {
        "command": "the command, e.g. tune",
        "version": "sparsetune's",
        "schema_version": f"of these events: {SCHEMA_VERSION}",
    },
    "loading": {"model": "what is loaded, as --model names it"},
    "study_start": {
        "study_name": "the study's name",
        "n_trials": "trials that it will have in the end",
        "num_done": "trials that earlier runs did",
        "num_prompts": "tune prompts",
        "num_steps": "denoising steps of a rendering",
    },
    "phase": {"phase": "the phase that begins: calibrate, refine, search, probe, trials or judge"},
    "progress": {
        "phase": "the phase in hand: one of those, or render for a lone rendering",
        "fraction": "of that phase, in [0, 1]",
        "seconds_left_phase": "estimate for the phase in hand",
        "seconds_left": "estimate for all that is left; null while a phase to come was never measured",
        "estimated_by": "what the estimate rests on, in words",
        "process_memory_gib": "resident memory of this process; null where the system doesn't tell",
        "gpu_memory_gib": "memory that PyTorch holds on this process's GPU; null without one",
    },
    "trial_start": _TRIAL
    | {"params": "its parameters by name", "worker": "host and device that run it; null for this process"},
    "trial_prompt": _TRIAL | _PROMPT | {"psnr": "of this prompt, in dB", "sparsity": "of this prompt, in [0, 1]"},
    "trial_end": _TRIAL
    | {
        "state": "complete, pruned or failed",
        "reason": "why it was pruned or failed; null when complete",
        "sparsity": "mean over its prompts, in [0, 1]; null where nothing was measured, as for the next three",
        "psnr": "mean, in dB",
        "psnr_worst": "of its worst prompt, in dB",
        "frame_cosine": "mean",
        "feasible": "whether it is complete and meets the gate on the tune prompts",
        "seconds": "that it took",
        "best_trial": "number of the best trial of this run so far; null while none meets the gate",
    },
    "incident": {
        "change": "what happened to a worker: lost, joined, refused or out of memory",
        "worker": "its number, host and GPU",
    },
    "wait": {"what": "what other processes of the study are waited for"},
    "winner": _TRIAL
    | {"sparsity": "see trial_end", "psnr": "see trial_end", "checkpoint_path": "folder of its checkpoint"},
    "study_end": {
        "best_trial": "number of the winner; null without one",
        "seconds": "that this run took",
        "interrupted": "whether Ctrl-C ended the search early",
    },
    "evaluation_start": {
        "policy": "tuned, or default for SpargeAttn's default thresholds",
        "num_prompts": "prompts to judge",
        "num_steps": "denoising steps of a rendering",
    },
    "prompt_start": _PROMPT | {"prompt": "its text"},
    "prompt_end": _PROMPT
    | {
        "prompt": "its text",
        "error": "why it failed; null when it didn't",
        "metrics": "value by metric's name; empty when it failed",
        "sparsity": "in [0, 1]; null when it failed",
        "seconds_dense": "of its dense rendering, an earlier one's where it was cached; null when it failed",
        "seconds_sparse": "of its sparse rendering; null when it failed",
        "dense_cached": "whether the dense video came from the cache",
    },
    "evaluation_end": {
        "policy": "see evaluation_start",
        "score": "out of 100; null when every prompt failed",
        "verdict": "excellent, good, acceptable, degraded or failed",
        "gate_passed": "whether the gate to deploy is met by the numbers",
        "sparsity": "over all attention calls, in [0, 1]; null when every prompt failed",
    },
    "timing": {"name": "what was timed", "milliseconds": "that it took"},
    "pair": {"name": "the videos' name", "metrics": "value by metric's name"},
    "note": {},
    "log": {"logger": "the part of the program that says it"},
    "output": {},
    "error": {"error_type": "class of the error", "exit_code": "status that the command ends with"},
}
"""Each event's own fields, by its name."""


FOR_PROGRAMS: Final = frozenset(
    {"start", "trial_start", "trial_prompt", "study_end", "evaluation_start", "evaluation_end"}
)
"""Events that the text format leaves out: people read them off the lines around, or off the result."""


def documentation() -> str:
    """Give the events and fields as Markdown."""
    lines = ["| field | of every line |", "| --- | --- |"]
    lines += [f"| `{name}` | {text} |" for name, text in COMMON.items()]
    lines += ["", "| event | field | |", "| --- | --- | --- |"]
    for event, fields in EVENTS.items():
        rows = list(fields.items()) or [("", "nothing further")]
        lines += [
            f"| {f'`{event}`' if place == 0 else ''} | {f'`{name}`' if name else ''} | {text} |"
            for place, (name, text) in enumerate(rows)
        ]
    return "\n".join(lines)
