"""Labels beside the points of a figure, put where they hide least.

A legend sends the eye back and forth; a name beside its line or point does not. Points of one x
get their names in one stack, in the order of the points, so that no two leaders cross.
"""

import matplotlib.patheffects
import numpy as np
import pandas as pd

SIZE = 9  # points: the smallest text that is legible where a page shows 8 inches as 800 pixels
GAP = 16  # pixels between a point and its label
PRICE = 8  # dark pixels that a label may hide before the next place is better
HALO = [matplotlib.patheffects.withStroke(linewidth=2.5, foreground="white")]


def spread(heights: np.ndarray, distance: float) -> np.ndarray:
    """Move ascending heights apart, up and down alike, until neighbours keep the distance."""
    steps = distance * np.arange(len(heights))
    upwards = np.maximum.accumulate(heights - steps) + steps
    downwards = np.minimum.accumulate((heights - steps)[::-1])[::-1] + steps
    return (upwards + downwards) / 2  # both keep the distance, and so does their mean


def _stacks(points: np.ndarray, sizes: np.ndarray):
    """Yield places for labels on both sides of their points, near ones first, and all in pixels.

    A place is an array (n, 4): left, bottom, right and top of each label.
    """
    line = 1.1 * sizes[:, 1].max()
    heights = spread(points[:, 1], line)
    for lines_up in sorted(np.arange(-4, 4.5, 0.5), key=abs):
        for side in (1, -1):
            x = points[:, 0] + side * (GAP + sizes[:, 0] / 2)
            centres = np.column_stack([x, heights + lines_up * line])
            yield np.hstack([centres - sizes / 2, centres + sizes / 2]).astype(int)


def _hidden(ax, dark: np.ndarray, stack: np.ndarray) -> float:
    """Return how many dark pixels a stack of labels would hide; infinite outside the axes."""
    is_inside = all(ax.bbox.contains(x, y) for x, y in stack.reshape(-1, 2))  # opposite corners
    if not is_inside:
        return np.inf
    return sum(dark[bottom:top, left:right].sum() for left, bottom, right, top in stack)


def write(ax, labels: pd.DataFrame):
    """Write labels (columns x, y, text, colour) beside their points, with a thin line to each.

    Everything else must be drawn before, since what is dark on the canvas decides.
    """
    ax.figure.canvas.draw()
    ax.autoscale(False)  # the leaders must not move what they point to
    rows_from_below = np.asarray(ax.figure.canvas.buffer_rgba())[::-1, :, :3]
    dark = rows_from_below.min(axis=-1) < 200  # darker than the grid
    to_data = ax.transData.inverted().transform

    for _, column in labels.sort_values("y", kind="stable").groupby("x"):
        notes = [ax.text(row.x, row.y, row.text, color=row.colour, fontsize=SIZE, ha="center",
                         va="center", path_effects=HALO) for row in column.itertuples()]
        sizes = np.array([note.get_window_extent().size for note in notes])
        points = ax.transData.transform(column[["x", "y"]])
        stacks = list(_stacks(points, sizes))
        prices = [_hidden(ax, dark, stack) + PRICE * i for i, stack in enumerate(stacks)]
        best = stacks[int(np.argmin(prices))]
        for note, point, (left, bottom, right, top) in zip(notes, points, best, strict=True):
            middle = (bottom + top) / 2
            note.set_position(to_data(((left + right) / 2, middle)))
            dark[bottom:top, left:right] = True
            leader = to_data([point, (np.clip(point[0], left, right), middle)])
            ax.plot(*leader.T, color=note.get_color(), linewidth=0.6, zorder=1)
