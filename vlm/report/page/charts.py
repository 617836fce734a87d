"""Line charts as inline SVG. Colors come from the style sheet of the page, so that they suit light and dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vlm.report.page.markup import Markup, element

WIDTH, HEIGHT = 440, 280
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 42  # margins
MOST_TICKS = 6
MOST_POINTS = 400  # of one line; more could not be told apart
MOST_DOTS = 40  # above, they would hide the line


@dataclass
class Line:
    """One line of a chart. style: its class in the style sheet; dots: whether each point is marked, if they are few."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: str
    dots: bool = False


@dataclass
class Axis:
    """Values from `low` to `high`, drawn from `start` to `end`. whole: ticks at whole numbers only."""

    label: str
    low: float
    high: float
    start: float = 0.0
    end: float = 0.0
    log: bool = False
    whole: bool = False

    def place(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Round numbers, at most about six."""
        if self.log:
            exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for factors in ((1, 2, 5), (1, 3), (1,)):
                ticks = [f * 10.0**e for e in exponents for f in factors if self.low <= f * 10.0**e <= self.high]
                if len(ticks) <= MOST_TICKS + 1:
                    break
            return ticks
        size = 10.0 ** math.floor(math.log10((self.high - self.low) / MOST_TICKS))
        step = next(size * factor for factor in (1, 2, 5, 10) if (self.high - self.low) / (size * factor) <= MOST_TICKS)
        step = max(step, 1.0) if self.whole else step
        return [i * step for i in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]


def axis_around(label: str, values: Sequence[float], log: bool = False) -> Axis:
    """An axis for positive values with some room above and below them."""
    low, high = min(values), max(values)
    if log:
        return Axis(label, low / 1.1, high * 1.1, log=True)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 0.1
    return Axis(label, max(0.0, low - room), high + room)


def line_chart(lines: Sequence[Line], x: Axis, y: Axis, title: str, mark: float | None = None) -> Markup:
    """A chart with its title and legend.

    Args:
        lines: those without points are left out.
        mark: an upright line at this x.
    """
    x.start, x.end, y.start, y.end = LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM, TOP
    lines = [line for line in lines if len(line.x)]
    parts = [*_grid(x, y)]
    if mark is not None:
        parts.append(element("path", d=f"M{x.place(mark)} {y.start}V{y.end}", class_="mark"))
    parts += [part for line in lines for part in _draw(line, x, y)]
    ends = "; ".join(f"{line.label} from {line.y[0]:.3g} to {line.y[-1]:.3g}" for line in lines)
    svg = element(
        "svg",
        *parts,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{title}, {y.label} over {x.label}: {ends}.",
    )
    keys = [element("span", element("i", class_=line.style), line.label) for line in lines]
    return element("figure", element("h3", title), svg, element("figcaption", *keys, class_="legend"))


def _grid(x: Axis, y: Axis) -> list[Markup]:
    parts = []
    for tick in y.ticks():
        place = y.place(tick)
        parts.append(element("path", d=f"M{x.start} {place}H{x.end}", class_="grid"))
        parts.append(element("text", f"{tick:,.6g}", x=x.start - 7, y=place + 4, text_anchor="end"))
    for tick in x.ticks():
        parts.append(element("path", d=f"M{x.place(tick)} {y.start}v4", class_="grid"))
        parts.append(element("text", f"{tick:,.6g}", x=x.place(tick), y=y.start + 18, text_anchor="middle"))
    middle = (y.start + y.end) / 2
    parts.append(element("text", x.label, x=(x.start + x.end) / 2, y=HEIGHT - 6, text_anchor="middle"))
    parts.append(
        element("text", y.label, x=0, y=0, text_anchor="middle", transform=f"translate(12 {middle}) rotate(-90)")
    )
    return parts


def _draw(line: Line, x: Axis, y: Axis) -> list[Markup]:
    every = math.ceil(len(line.x) / MOST_POINTS)
    kept = sorted({*range(0, len(line.x), every), len(line.x) - 1})
    points = [(x.place(line.x[i]), y.place(line.y[i])) for i in kept]
    path = element("path", d="M" + "L".join(f"{a} {b}" for a, b in points), class_=f"line {line.style}")
    return [
        path,
        *(
            element("circle", cx=a, cy=b, r=3.5, class_=line.style)
            for a, b in points
            if line.dots and len(points) <= MOST_DOTS
        ),
    ]
