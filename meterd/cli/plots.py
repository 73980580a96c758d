"""The picture of a simulation: the exposure over time of each variant, and its calls.

The rule: the library that draws is an extra; without it everything but the picture works, and the
sentence says what to install.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meterd.cli.daemon import WrongUse
from meterd.cli.screen import plain
from meterd.core.money import MICROS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from meterd.core.simulate import Outcome

FORMATS = (".svg", ".png")
POINTS_MAX = 1500  # More than a picture has columns would only make the file large.


def ready(file: Path) -> None:
    """Find out before the long run whether this picture can be drawn. Raises `WrongUse`."""
    if file.suffix.lower() not in FORMATS:
        raise WrongUse(f"--plot {plain(file)}: write a name that ends with .svg or .png")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise WrongUse(
            "--plot needs matplotlib: pip install 'meterd[plot]', or leave --plot out"
        ) from None


def draw(file: Path, results: Sequence[tuple[str, Outcome]]) -> None:
    """Draw the variants into a file. The same results give the same picture."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "meterd", "svg.fonttype": "none"}):
        rows = len(results) + 1
        figure = Figure(figsize=(10, 1.2 + 1.6 * rows), layout="constrained")
        *panels, calls = figure.subplots(rows, 1, squeeze=False)[:, 0]
        top = max(found.together.worst for _, found in results) / MICROS
        for place, (panel, (name, found)) in enumerate(zip(panels, results, strict=True)):
            panel.sharex(panels[0])
            _exposure(panel, found, f"C{place % 10}")
            panel.set_ylim(0, top * 1.05 or 1)  # One scale, so that the eye compares the heights.
            panel.tick_params(labelbottom=panel is panels[-1])
            panel.set_title(f"{place + 1}. {_text(name)}", fontsize="medium", loc="left")
        panels[-1].set_xlabel("time (UTC)")
        figure.supylabel("earned and not paid, USDC (dashed: the mean)", fontsize="medium")
        names = [f"{place}." for place in range(1, rows)]
        colours = [f"C{place % 10}" for place in range(rows - 1)]
        bars = calls.barh(names, [found.releases for _, found in results], color=colours)
        calls.bar_label(bars, padding=3)
        calls.margins(x=0.1)
        calls.invert_yaxis()
        calls.set_title("calls", fontsize="medium", loc="left")
        try:
            figure.savefig(file, metadata={"Date": None} if file.suffix.lower() == ".svg" else None)
        except OSError as error:
            raise WrongUse(f"{plain(file)}: {error.strerror}; name another file") from None


def _exposure(panel: Axes, found: Outcome, colour: str) -> None:
    """Draw what was earned and not paid, from moment to moment, and its mean."""
    points = thinned(found.points)
    times: list[Any] = [datetime.fromtimestamp(at / 1000, UTC) for at, _ in points]
    heights = [exposure / MICROS for _, exposure in points]
    panel.fill_between(times, heights, step="post", color=colour, linewidth=0, alpha=0.6)
    panel.axhline(found.together.mean / MICROS, color=colour, linestyle="--", linewidth=1)
    panel.grid(alpha=0.3)


def _text(name: str) -> str:
    """A name as it is: no mathematics between two dollar signs."""
    return plain(name).replace("$", r"\$")


def thinned(points: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Leave out what no eye could see: of each column of the picture the highest and the last."""
    if len(points) <= 2 * POINTS_MAX:
        return list(points)
    begins = points[0][0]
    width = (points[-1][0] - begins) // POINTS_MAX + 1
    columns: dict[int, list[tuple[int, int]]] = {}
    for point in points:
        column = columns.setdefault((point[0] - begins) // width, [point, point])
        if point[1] > column[0][1]:
            column[0] = point
        column[1] = point
    return [
        point
        for highest, last in columns.values()
        for point in ((highest, last) if highest != last else (last,))
    ]
