"""SVG by hand: elements whose texts are escaped, and axes whose ticks are numbers that people count in.

Colours stand in attributes, for programs that know nothing else, and have classes by which `STYLE` changes them where a
page is dark.
"""

from __future__ import annotations

import math
from html import escape
from typing import Iterable, List, NamedTuple, Sequence, Tuple

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
"""Of Okabe and Ito, which people tell apart who are colour-blind."""

_DARK_PALETTE = ("#5AA9E6", "#FF8C42", "#2FC89B", "#E59CC4", "#F0C04A", "#A6DBFF", "#B0B0B0")

DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "1 5")
"""For what comes when all colours are taken."""

INK, PALE, PAPER = "#222222", "#DDDDDD", "#FFFFFF"

STYLE = (
    "@media (prefers-color-scheme: dark){.paper{fill:#1B1D21}.ink{fill:#E4E4E4}"
    ".line{stroke:#3A3D44}.axis{stroke:#9A9A9A}"
    + "".join(f".s{i}{{stroke:{colour}}}.f{i}{{fill:{colour}}}" for i, colour in enumerate(_DARK_PALETTE))
    + "}"
)

FONT = "system-ui,-apple-system,Segoe UI,Roboto,DejaVu Sans,sans-serif"


class Mark(NamedTuple):
    """How a curve is told from the others: by colour, by shape, and by dashes."""

    colour: int
    shape: int
    dashes: str


def mark_of(index: int) -> Mark:
    """Of the curve of that number."""
    count = len(PALETTE)
    return Mark(index % count, index % len(_SHAPES), DASHES[index // count % len(DASHES)])


def element(name: str, content: Iterable[str] = (), **attributes: object) -> str:
    """An element; `class_` is `class`, and other underscores are hyphens. `content` is SVG already."""
    words = [f'{key.rstrip("_").replace("_", "-")}="{escape(_plain(value))}"' for key, value in attributes.items()]
    inner = "".join(content)
    start = " ".join([name, *words])
    return f"<{start}>{inner}</{name}>" if inner else f"<{start}/>"


def text(x: float, y: float, said: str, anchor: str = "start", size: int = 12, **attributes: object) -> str:
    """A line of text, escaped."""
    return element(
        "text", [escape(said)], x=x, y=y, text_anchor=anchor, font_size=size, fill=INK, class_="ink", **attributes
    )


def polyline(points: Sequence[Tuple[float, float]], mark: Mark) -> str:
    """A curve."""
    return element(
        "polyline",
        points=" ".join(f"{_plain(x)},{_plain(y)}" for x, y in points),
        fill="none",
        stroke=PALETTE[mark.colour],
        class_=f"s{mark.colour}",
        stroke_width=1.8,
        stroke_linejoin="round",
        **({"stroke_dasharray": mark.dashes} if mark.dashes else {}),
    )


def band(upper: Sequence[Tuple[float, float]], lower: Sequence[Tuple[float, float]], mark: Mark) -> str:
    """What lies between two curves."""
    around = [*upper, *reversed(lower)]
    return element(
        "polygon",
        points=" ".join(f"{_plain(x)},{_plain(y)}" for x, y in around),
        fill=PALETTE[mark.colour],
        class_=f"f{mark.colour}",
        fill_opacity=0.16,
    )


def marker(x: float, y: float, mark: Mark, says: str = "") -> str:
    """A point of a curve; what it says is shown where a pointer rests on it."""
    return element(
        "path",
        [element("title", [escape(says)])] if says else [],
        d=_SHAPES[mark.shape],
        transform=f"translate({_plain(x)} {_plain(y)})",
        fill=PALETTE[mark.colour],
        class_=f"f{mark.colour}",
    )


_SHAPES = (
    "M-3.6 0a3.6 3.6 0 1 0 7.2 0a3.6 3.6 0 1 0 -7.2 0z",
    "M-3.3 -3.3h6.6v6.6h-6.6z",
    "M0 -4.4L4.2 3.2H-4.2z",
    "M0 -4.6L4.6 0L0 4.6L-4.6 0z",
    "M0 4.4L4.2 -3.2H-4.2z",
)


def ticks(low: float, high: float, count: int = 5) -> List[float]:
    """Round numbers that reach from below `low` to above `high`, about so many."""
    if high - low < max(1e-12, 1e-9 * max(abs(low), abs(high))):
        pad = abs(low) * 0.05 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / count
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(nice * scale for nice in (1, 2, 2.5, 5, 10) if nice * scale >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> Tuple[float, float, List[float]]:
    """The same on a logarithmic scale, of numbers above 0: where it begins and ends, and the ticks.

    These are powers of ten; between fewer than three of them there are 2 and 5 times those, too.
    """
    first, last = math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1
    steps = [digit * 10.0**power for power in range(first, last + 1) for digit in (1, 2, 5)]
    begin = max(step for step in steps if step <= low * 1.0001)
    end = min(step for step in steps if step >= high * 0.9999 and step > begin)
    inside = [step for step in steps if begin <= step <= end]
    tens = [10.0**power for power in range(first, last + 1) if begin <= 10.0**power <= end]
    return begin, end, inside if len(tens) < 3 else tens[:: math.ceil(len(tens) / 8)]


def decimals(values: Sequence[float]) -> int:
    """So many digits behind the point tell ticks apart."""
    step = values[1] - values[0] if len(values) > 1 else 1.0
    return next(digits for digits in range(12) if abs(round(step, digits) - step) < step * 1e-6 or digits == 11)


def _plain(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
