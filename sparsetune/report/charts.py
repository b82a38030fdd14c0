"""What a chart shows, apart from how it is drawn: one description for the page's charts and for pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["main", "second", "third", "best", "muted", "bad"]
"""What a series means, which decides its colour and symbol in every drawing."""

Number = float | int | None


@dataclass(frozen=True)
class Axis:
    """One axis.

    Args:
        title: with the unit.
        log: whether it is logarithmic.
        percent: whether values are fractions, to be shown as percentages.
        labels: of the whole numbers from 0 on, where values are places of named things.
    """

    title: str
    log: bool = False
    percent: bool = False
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Series:
    """Points, or the line through them.

    Args:
        name: in the legend.
        role: what it means.
        x, y: the points.
        line: whether a line joins them.
        step: whether that line holds each value until the next.
        ids: trial numbers that the points stand for; empty where they stand for none.
        notes: what is said of each point beside its figures.
    """

    name: str
    role: Role
    x: tuple[Number, ...]
    y: tuple[Number, ...]
    line: bool = False
    step: bool = False
    ids: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plot:
    """Series over two axes."""

    name: str
    title: str
    alt: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]


@dataclass(frozen=True)
class HeatMap:
    """A value in [0, 1] for each row and column, shown as percentages; None where there is none."""

    name: str
    title: str
    alt: str
    x: Axis
    y: Axis
    values: tuple[tuple[Number, ...], ...]


@dataclass(frozen=True)
class Bars:
    """Horizontal bars.

    Args:
        name, title, alt: of the chart.
        axis: of the values.
        labels: one a bar, from the top.
        parts: each part's name, role and values, one a bar; several parts are stacked.
    """

    name: str
    title: str
    alt: str
    axis: Axis
    labels: tuple[str, ...]
    parts: tuple[tuple[str, Role, tuple[float, ...]], ...]


Chart = Plot | HeatMap | Bars


def extent(values: Sequence[Number]) -> tuple[float, float]:
    """Give the least and the greatest of the values that there are; 0 and 0 where there is none."""
    known = [float(value) for value in values if value is not None]
    return (min(known), max(known)) if known else (0.0, 0.0)
