"""One look for every figure: a family has the same color everywhere, a method the same symbol.

Colors are those of Okabe and Ito (2008), "Color universal design", which the common forms of color blindness can tell
apart, then of Paul Tol's "muted" scheme; their pale yellow is left out, since it vanishes in print.
"""

from collections.abc import Mapping, Sequence

# Exact attention and the nulls are what the others are measured against: ink and gray, no hue.
FAMILY_COLORS = {
    "exact": "#000000",
    "null": "#8a8a8a",
    "sparse": "#e69f00",
    "clustering": "#56b4e9",
    "sampling": "#009e73",
    "low rank": "#0072b2",
    "random features": "#d55e00",
    "kernel": "#cc79a7",
    "recurrent": "#332288",
}
FURTHER_COLORS = ("#882255", "#999933", "#117733", "#44aa99", "#aa4499", "#6b4c2a")
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")

INK = "#1a1a1a"
FAINT = "#6b6b6b"
GRID = "#e4e4e4"


def colors(families: Sequence[str]) -> dict[str, str]:
    """Families in a fixed order, each with its color; one that has none of its own takes the next further color."""
    present = set(families)
    chosen = {name: color for name, color in FAMILY_COLORS.items() if name in present}
    unknown = sorted(present - set(chosen))
    return chosen | {name: FURTHER_COLORS[i % len(FURTHER_COLORS)] for i, name in enumerate(unknown)}


def symbols(family_of: Mapping[str, str]) -> dict[str, str]:
    """A symbol a method, in the order given; methods of one family (one color) differ in it."""
    seen: dict[str, int] = {}
    chosen = {}
    for method, family in family_of.items():
        chosen[method] = SYMBOLS[seen.get(family, 0) % len(SYMBOLS)]
        seen[family] = seen.get(family, 0) + 1
    return chosen
