"""Where the names of methods stand in a figure, in pixels, so that they can be read in print without a legend."""

from collections.abc import Mapping, Sequence

LINE_PIXELS = 13.0
LETTER_PIXELS = 6.2


def spread(wanted: Mapping[str, float], gap: float, height: float) -> dict[str, float]:
    """Positions in [0, height], in the order of the `wanted` ones and at least `gap` apart.

    Where more labels than fit are asked for they run over the lower end rather than into each other.
    """
    order = sorted(wanted, key=lambda name: wanted[name])
    placed: dict[str, float] = {}
    floor = 0.0
    for name in order:
        placed[name] = max(wanted[name], floor)
        floor = placed[name] + gap
    ceiling = height
    for name in reversed(order):
        placed[name] = min(placed[name], ceiling)
        ceiling = placed[name] - gap
    return placed


def beside(points: Sequence[tuple[str, float, float]]) -> dict[str, float]:
    """The vertical shift of the name to the right of every point (name, x, y), in steps of half a line.

    A name keeps clear of the other points and of the names placed before it.
    """
    steps = [sign * step * LINE_PIXELS / 2 for step in range(1, 2 * len(points) + 2) for sign in (-1, 1)]
    taken: list[tuple[float, float, float]] = []
    shifts: dict[str, float] = {}
    for name, x, y in sorted(points, key=lambda point: (point[2], point[1], point[0])):
        left, right = x + 4, x + 12 + LETTER_PIXELS * len(name)
        marks = [(other_x - 6, other_x + 6, other_y) for other, other_x, other_y in points if other != name]
        boxes = [*taken, *marks]
        free = (step for step in (0.0, *steps) if not any(_covers(left, right, y + step, box) for box in boxes))
        shifts[name] = next(free, 0.0)
        taken.append((left, right, y + shifts[name]))
    return shifts


def _covers(left: float, right: float, y: float, box: tuple[float, float, float]) -> bool:
    return left < box[1] and box[0] < right and abs(y - box[2]) < LINE_PIXELS - 1
