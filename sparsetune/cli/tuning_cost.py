"""What a search will cost, as text and as JSON."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sparsetune.cli.clock import clock
from sparsetune.cli.tables import table_text

if TYPE_CHECKING:
    from sparsetune.tuning.cost_estimate import Cost


def cost_text(cost: "Cost") -> str:
    """What was measured, and for each tuner its phases with renderings and time, then its peak memory."""
    measured, work = cost.measured, cost.workload
    lines = [
        f"{cost.model} on {cost.device}, backend {cost.backend}: a dense step {measured.dense_step:.3g} s, a sparse "
        f"one {measured.sparse_step:.3g} s, {measured.fixed:.3g} s a rendering besides; {work.num_steps} steps",
        "",
    ]
    rows = []
    for tuner in cost.tuners:
        memory = f"{tuner.peak_memory_gib:.1f} GiB"
        rows.append([tuner.tuner, str(tuner.num_renderings), _time(tuner.seconds), memory])
        rows += [[f"  {phase.name}", str(phase.num_renderings), _time(phase.seconds), ""] for phase in tuner.phases]
    lines.append(table_text((("tuner and its phases", "renderings", "time (m:ss)", "peak memory"), rows)))
    lines += ["", *(f"{tuner.tuner}: {tuner.note}" for tuner in cost.tuners if tuner.note)]
    if cost.max_minutes is not None:
        lines.append(f"--max-minutes {cost.max_minutes:g} ends a search sooner, with the best so far")
    return "\n".join(lines)


def cost_dict(cost: "Cost") -> dict[str, Any]:
    """Give the cost as JSON's value; seconds are null where they can't be told."""
    value = asdict(cost)
    for tuner, given in zip(value["tuners"], cost.tuners, strict=True):
        tuner |= {"num_renderings": given.num_renderings, "seconds": given.seconds}
    return {"schema_version": 1} | value


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else clock(seconds)
