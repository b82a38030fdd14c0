"""Chart data, independent of how it is drawn: for Plotly in the page and matplotlib images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["main", "second", "third", "best", "muted", "bad"]
"""Meaning of a series, which decides its colour and symbol."""

Number = float | int | None


@dataclass(frozen=True)
class Axis:
    title: str
    log: bool = False
    percent: bool = False  # values are fractions, shown as percentages
    whole: bool = False  # values are integers, such as trial numbers
    labels: tuple[str, ...] = ()  # of a categorical axis, for the integers from 0


@dataclass(frozen=True)
class Series:
    """Points, or the line through them."""

    name: str
    role: Role
    x: tuple[Number, ...]
    y: tuple[Number, ...]
    line: bool = False
    step: bool = False  # the line holds each value until the next
    ids: tuple[int, ...] = ()  # trial numbers of the points, if they are trials
    notes: tuple[str, ...] = ()  # hover text of each point


@dataclass(frozen=True)
class Plot:
    name: str
    title: str
    alt: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]


@dataclass(frozen=True)
class HeatMap:
    """Fractions by row and column, shown as percentages."""

    name: str
    title: str
    alt: str
    x: Axis
    y: Axis
    values: tuple[tuple[Number, ...], ...]


@dataclass(frozen=True)
class Bars:
    """Horizontal bars, from the top; each part has a name, a role and one value per bar, and parts are stacked."""

    name: str
    title: str
    alt: str
    axis: Axis
    labels: tuple[str, ...]
    parts: tuple[tuple[str, Role, tuple[float, ...]], ...]


Chart = Plot | HeatMap | Bars


def extent(values: Sequence[Number]) -> tuple[float, float]:
    """Minimum and maximum of the known values; zeros where there are none."""
    known = [float(value) for value in values if value is not None]
    return (min(known), max(known)) if known else (0.0, 0.0)
