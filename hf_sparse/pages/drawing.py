"""How pictures look, and their files: SVG that follows the page's colours, and SVG and PNG for cards.

Colours are those of Okabe and Ito, which all kinds of colour vision tell apart; lines differ by dashes
and points by shape, too.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEEDED = "pictures are drawn by matplotlib: pip install 'hf_sparse[plots]'"
# What colours are for, by name: in light and in dark surroundings.
ROLES = {
    "ink": ("#1c1d1f", "#e8e8ea"),
    "soft": ("#5b5f66", "#a9adb5"),
    "line": ("#d3d6db", "#3c4048"),
    "after": ("#0072b2", "#56b4e9"),
    "before": ("#b34700", "#e69f00"),
    "third": ("#007a59", "#2fc39a"),
    "paper": ("#ffffff", "#17191c"),
}
# Sequences of values: the same in both, since cividis is read by its lightness alone.
SCALE = "cividis"
HATCHES = ("", "///", "\\\\\\", "xx", "--", "||")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_WIDTH, _DOTS = 5.2, 200
_FONTS = "'DejaVu Sans', Verdana, Arial, sans-serif"


@dataclass(frozen=True)
class Colours:
    """A colour for each of the `ROLES`."""

    ink: str
    soft: str
    line: str
    after: str
    before: str
    third: str
    paper: str


LIGHT = Colours(**{name: light for name, (light, _) in ROLES.items()})
# Colours that no picture has, in whose place the page puts its own.
_STAND_INS = Colours(**{name: f"#0a0b{number:02x}" for number, name in enumerate(ROLES, 1)})

Draw = Callable[["Figure", Colours], Any]


@dataclass(frozen=True)
class Picture:
    """A picture and what it shows in words.

    Attributes:
        name: of its files, without an ending.
        title: in a few words.
        alt: what is to be seen, for those who do not see it.
        draw: draws it into an empty figure, in the colours that it is given.
        height: in inches; it is 5.2 wide.
    """

    name: str
    title: str
    alt: str
    draw: Draw
    height: float = 2.6

    @cached_property
    def page_svg(self) -> str:
        """SVG whose colours follow the reader's choice of light or dark, without a background."""
        svg = self._svg(_STAND_INS, transparent=True)
        for name, colour in vars(_STAND_INS).items():
            svg = svg.replace(colour, f"var(--{name})")
        light, dark = (
            ";".join(f"--{name}:{shades[kind]}" for name, shades in ROLES.items())
            for kind in (0, 1)
        )
        style = f"svg{{{light}}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}"
        return re.sub(r"(<svg[^>]*>)", rf"\1<style>{style}</style>", svg, count=1)

    @cached_property
    def svg(self) -> str:
        """SVG on white, for cards and papers."""
        return self._svg(LIGHT, transparent=False)

    def png(self) -> bytes:
        """PNG on white, 1040 dots wide, for cards and papers."""
        file = io.BytesIO()
        self._figure(LIGHT, transparent=False, save=(file, "png"))
        return file.getvalue()

    def _svg(self, colours: Colours, *, transparent: bool) -> str:
        file = io.StringIO()
        self._figure(colours, transparent=transparent, save=(file, "svg"))
        svg = file.getvalue()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
        svg = re.sub(r"'DejaVu Sans'(, sans-serif)?", _FONTS, svg)
        return re.sub(r">\s+<", "><", svg)

    def _figure(self, colours: Colours, *, transparent: bool, save: tuple[Any, str]) -> None:
        matplotlib = need_matplotlib()
        from matplotlib.figure import Figure

        with matplotlib.rc_context(_settings(colours)):
            figure = Figure(figsize=(_WIDTH, self.height), layout="constrained")
            self.draw(figure, colours)
            file, kind = save
            metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
            face = "none" if transparent else colours.paper
            figure.savefig(file, format=kind, dpi=_DOTS, facecolor=face, metadata=metadata)


def need_matplotlib() -> Any:
    """Matplotlib, imported when it is first needed.

    Raises:
        ImportError: it is not installed; the message tells how to install it.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(NEEDED) from error
    return matplotlib


def _settings(colours: Colours) -> dict[str, Any]:
    """Matplotlib's settings of a picture; those of the user play no part."""
    matplotlib = need_matplotlib()
    return {
        **{key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"},
        "svg.fonttype": "none",
        "svg.hashsalt": "hf_sparse",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 10,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": colours.line,
        "axes.labelcolor": colours.soft,
        "axes.facecolor": "none",
        "axes.axisbelow": True,
        "grid.color": colours.line,
        "grid.linewidth": 0.6,
        "text.color": colours.ink,
        "xtick.color": colours.line,
        "ytick.color": colours.line,
        "xtick.labelcolor": colours.ink,
        "ytick.labelcolor": colours.ink,
        "legend.frameon": False,
        "legend.labelcolor": colours.ink,
        "hatch.color": colours.paper,
        "hatch.linewidth": 0.8,
    }
