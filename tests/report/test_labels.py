"""Names in figures do not cover each other."""

from itertools import pairwise

from attnlens.report.labels import LETTER_PIXELS, LINE_PIXELS, beside, spread


def test_spread_keeps_order_distance_and_bounds():
    wanted = {"a": 50.0, "b": 51.0, "c": 52.0, "d": 299.0, "e": 300.0}
    placed = spread(wanted, 13.0, 300.0)
    heights = [placed[name] for name in wanted]
    assert all(right - left >= 13.0 - 1e-9 for left, right in pairwise(heights))
    assert min(heights) >= 0.0
    assert max(heights) <= 300.0


def test_spread_leaves_alone_what_is_clear():
    wanted = {"b": 200.0, "a": 20.0}
    assert spread(wanted, 13.0, 300.0) == wanted


def test_beside_keeps_names_apart():
    points = [("performer", 100.0, 100.0), ("smyrf", 104.0, 106.0), ("linear", 108.0, 103.0), ("window", 300.0, 100.0)]
    shifts = beside(points)
    assert shifts["window"] == 0.0
    boxes = [(x + 4, x + 12 + LETTER_PIXELS * len(name), y + shifts[name]) for name, x, y in points]
    for index, left in enumerate(boxes):
        for right in boxes[index + 1 :]:
            apart = left[1] <= right[0] or right[1] <= left[0] or abs(left[2] - right[2]) >= LINE_PIXELS - 1
            assert apart, (left, right)
