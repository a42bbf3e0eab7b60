"""Figures of the notebooks: tidy frame in, matplotlib Figure out.

Colours are safe for colour-blind readers, and each kind of noise has a shape too. Accuracies and
differences are fractions in the frames and percent on the axes. Bars are intervals, or missing.
"""

import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from lib import labels

# Choose the backend now: chosen inside rc_context, a notebook would show the first figure only.
plt.switch_backend(plt.get_backend())

STYLE = {"font.size": 11, "axes.titlesize": 10, "axes.titlelocation": "left",
         "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
         "legend.frameon": False, "legend.fontsize": 10, "figure.constrained_layout.use": True,
         "figure.dpi": 150, "savefig.dpi": 150}
COLOURS = sns.color_palette("colorblind")
SMALL = labels.SIZE
BASE = {"color": "0.45", "linestyle": "--", "linewidth": 1.2,
        "label": "base policy, before training"}
RUNS = {"linestyle": "none", "markersize": 3, "alpha": 0.35}
PREDICTED = {"color": "black", "marker": "|", "markersize": 13, "linestyle": "none", "zorder": 3}
# Colour and shape of each kind of noise in every figure; kinds that are not listed look like OTHER.
KINDS = {"clean": ("black", "o"), "flip": (COLOURS[0], "D"), "mask": (COLOURS[1], "s"),
         "false positives": (COLOURS[2], "^"), "false negatives": (COLOURS[4], "v"),
         "asymmetric": (COLOURS[9], "P"), "abstain": (COLOURS[3], "p"),
         "format only": (COLOURS[5], "X"), "majority vote": (COLOURS[7], "*"),
         "whole numbers only": (COLOURS[8], ">")}
OTHER = (COLOURS[6], "h")
# Noise that a group or a prompt shares leaves a shape half or wholly empty on an axis of numbers.
FILLS = {"group": {"fillstyle": "left", "markerfacecoloralt": "white"},
         "prompt": {"markerfacecolor": "white"}}
QUANTITIES = {"silent": "groups without signal", "spurious": "spurious groups",
              "energy": "mean squared advantage, E[A²]", "gap": "advantage gap"}
REWARDS = {"clean_mean": ("clean reward (what we want)", COLOURS[2], "-"),
           "observed_mean": ("observed reward (what GRPO sees)", COLOURS[3], "--")}


def save(fig: Figure, path: str | Path) -> Path:
    """Write a PNG that has the same bytes for the same figure (no date, no version); close it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, metadata={"Software": None})
    plt.close(fig)
    return path


def look(channel: str) -> dict:
    """Return the keywords that draw points in the colour and shape of a channel's kind."""
    kind = channel.split(" (")[0]  # without the noise level; "asymmetric (b=0.45)" without b
    colour, marker = KINDS.get(kind, OTHER)
    return {"color": colour, "marker": marker}


def _percent(fraction: float, _position=None) -> str:
    """Write a fraction in percent, with as many digits as keep the ticks of a narrow axis apart."""
    value = round(100 * fraction, 6) + 0.0  # + 0.0 makes 0 of -0
    return f"{value:g}".replace("-", "−")


def _estimates(ax, part: pd.DataFrame, value: str, low: str, high: str, filled=None):
    """Draw each row of `part` at its height y, with a bar from `low` to `high`."""
    for i, row in enumerate(part.to_dict("records")):
        looks = look(row["channel"])
        ax.hlines(row["y"], row[low], row[high], color=looks["color"], linewidth=1.2)
        if filled is not None and not filled.iloc[i]:
            looks["markerfacecolor"] = "white"
        ax.plot(row[value], row["y"], **looks)


# --- accuracy over an axis of numbers -------------------------------------------------------------


def _accuracy(table: pd.DataFrame, x: str, xlabel: str, base: float | None, seeds) -> Figure:
    """Draw all arms over column x, and a line from clean through each channel of several rates."""
    fig, ax = plt.subplots(figsize=(8, 4.8))
    clean = table[table["channel"] == "clean"]
    for channel, rows in table.sort_values("rate").groupby("channel", sort=False):
        noise_level = channel.rpartition("(")[2].removesuffix(")")  # "group" of "flip (group)"
        looks = look(channel) | FILLS.get(noise_level, {})
        is_curve = rows["rate"].nunique() == len(rows) > 1
        if is_curve:  # a line to a lone point would show values that nobody ran
            line = pd.concat([clean, rows])
            ax.plot(line[x], line["estimate"], color=looks["color"], linewidth=1.2, alpha=0.7)
        if seeds is not None:
            runs = seeds[seeds["channel"] == channel]
            ax.plot(runs[x], runs["value"], **RUNS, **looks)
        ax.vlines(rows[x], rows["low"], rows["high"], color=looks["color"], linewidth=1)
        ax.plot(rows[x], rows["estimate"], linestyle="none", alpha=0.85, **looks)
    ax.set(xlabel=xlabel, ylabel="accuracy, %")
    ax.margins(x=0.09)
    ax.yaxis.set_major_formatter(_percent)
    if base is not None:
        ax.axhline(base, **BASE)
        ax.annotate(BASE["label"], (0.01, base), (0, 3), color=BASE["color"], fontsize=SMALL,
                    xycoords=ax.get_yaxis_transform(), textcoords="offset points")
    return fig


def _label(ax, table: pd.DataFrame, x: str):
    """Write a channel's name at its highest rate, and the name of every arm that has one."""
    ends = table.sort_values("rate").drop_duplicates("channel", keep="last").index
    text = table["channel"].where(table.index.isin(ends)).where(~table["named"], table["arm"])
    colours = [tuple(0.7 * np.array(to_rgb(look(c)["color"]))) for c in table["channel"]]  # darker
    points = pd.DataFrame({"x": table[x], "y": table["estimate"], "text": text, "colour": colours})
    labels.write(ax, points.dropna(subset="text"))


def _apart(frame: pd.DataFrame, last: float) -> pd.DataFrame:
    """Return the frame with a column x: the rate, or a place beyond the last for arms without."""
    is_apart = (frame["rate"] == 0) & (frame["channel"] != "clean")
    number = pd.factorize(frame["channel"].where(is_apart))[0]  # -1: it has a rate
    return frame.assign(x=frame["rate"].where(~is_apart, last * (1.25 + 0.15 * number)))


@plt.rc_context(STYLE)
def noise_curve(table: pd.DataFrame, base: float | None = None,
                seeds: pd.DataFrame | None = None) -> Figure:
    """Draw accuracy against the noise rate; arms without one rate stand apart on the right.

    These are controls, flawed checkers and rates by difficulty. At least one arm has a rate.

    `table`: arm, named (whether that name is to be shown), channel ("clean" or a channel's name),
    rate, estimate, low, high. `seeds`: channel, rate, value, a faint point a run. `base`: accuracy
    before training.
    """
    last = table["rate"].max()
    table = _apart(table, last)
    seeds = seeds if seeds is None else _apart(seeds, last)
    fig = _accuracy(table, "x", "noise rate", base, seeds)
    ax = fig.axes[0]
    if table["x"].max() > last:
        ax.set_xlim(right=table["x"].max() + 0.3 * last)
        ax.axvspan(1.14 * last, ax.get_xlim()[1], color="0.95", zorder=0)
        ax.text(1.16 * last, 0.98, "no one rate", transform=ax.get_xaxis_transform(), va="top")
        ax.set_xticks([tick for tick in ax.get_xticks() if -1e-9 < tick < last + 1e-9])
    _label(ax, table, "x")
    return fig


@plt.rc_context(STYLE)
def j_axis(table: pd.DataFrame, base: float | None = None,
           seeds: pd.DataFrame | None = None) -> Figure:
    """Draw accuracy against J = 1 - a - b, the signal left in the reward; J falls to the right.

    If the kind of noise did not matter, all channels would lie on one line. `table` and `seeds` as
    for `noise_curve`, with column J; arms without a J (controls) are left out. ValueError with the
    reason where such a figure would say nothing.
    """
    table = table.dropna(subset="J").round({"J": 6})  # 1 - .3 - .3 is not .4 in floats
    if table["J"].nunique() < 2:
        raise ValueError("J does not vary between these arms")
    if table.duplicated(["channel", "J"]).any():
        raise ValueError("arms share a channel and a J, so something else varies as well")
    xlabel = "J = 1 − a − b (1: clean, 0: no signal, below 0: reversed)"
    fig = _accuracy(table, "J", xlabel, base, seeds)
    fig.axes[0].invert_xaxis()
    _label(fig.axes[0], table, "J")
    return fig


# --- a row an arm ---------------------------------------------------------------------------------


def _name_rows(ax, names: list[str]):
    """Give every name a row, from top to bottom."""
    ax.set_yticks(range(len(names)), [textwrap.fill(name, 42) for name in names], fontsize=SMALL)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)


def _row_height(names, least: float) -> float:
    """Return inches enough for the longest of the names, which stand in lines of 42 letters."""
    return max(least, 0.16 * max(len(textwrap.wrap(name, 42)) for name in names))


def _by_effect(table: pd.DataFrame, value: str) -> list[str]:
    """Return the arms, the one with the highest mean first."""
    means = table.groupby("arm", sort=False)[value].mean()
    return list(means.sort_values(ascending=False, kind="stable").index)


@plt.rc_context(STYLE)
def arm_accuracies(table: pd.DataFrame, base: float | None = None,
                   seeds: pd.DataFrame | None = None) -> Figure:
    """Draw the accuracies of arms, best on top.

    `table`: arm, channel, estimate, low, high. `seeds`: arm, value, a faint point a run.
    `base`: accuracy before training, the dashed line.
    """
    arms = _by_effect(table, "estimate")
    table = table.assign(y=table["arm"].map(arms.index))
    fig, ax = plt.subplots(figsize=(8, 1.3 + _row_height(arms, 0.3) * len(arms)))
    if seeds is not None:
        for row in table.itertuples():
            values = seeds.loc[seeds["arm"] == row.arm, "value"]
            ax.plot(values, np.full(len(values), row.y), **RUNS, **look(row.channel))
    _estimates(ax, table, "estimate", "low", "high")
    if base is not None:
        ax.axvline(base, **BASE)
        fig.legend(loc="outside upper center")
    _name_rows(ax, arms)
    ax.xaxis.set_major_formatter(_percent)
    ax.set_xlabel("accuracy, %")
    return fig


def _difference_panels(table: pd.DataFrame, row_height: float):
    """Return a figure and (axes, part) for each reference: a row an arm, the largest gain on top.

    The parts get a column y.
    """
    against = table["reference"].str.split(" | ", regex=False).str[0]  # without the setting
    against = against.where(~table["named"], table["reference"])
    parts = list(table.groupby(against, sort=False))
    sizes = [part["arm"].nunique() for _, part in parts]
    height = 1.2 + 0.35 * len(parts) + _row_height(table["arm"], row_height) * sum(sizes)
    fig, axes = plt.subplots(len(parts), 1, figsize=(8, height), height_ratios=sizes, sharex=True,
                             squeeze=False)
    panels = []
    for ax, (reference, part) in zip(axes.flat, parts, strict=True):
        arms = _by_effect(part, "difference")
        panels.append((ax, part.assign(y=part["arm"].map(arms.index))))
        _name_rows(ax, arms)
        ax.axvline(0, color="black", linewidth=1)
        ax.xaxis.set_major_formatter(_percent)
        if len(parts) > 1:
            ax.set_title(f"compared with {reference}")
    against = "the reference" if len(parts) > 1 else reference
    ax.set_xlabel(f"difference from {against}, percentage points")
    return fig, panels


@plt.rc_context(STYLE)
def paired_differences(table: pd.DataFrame, alpha: float = 0.05) -> Figure:
    """Draw the difference of each arm from its reference, sorted by effect.

    `table`: arm, named, channel, reference, difference, difference_low, difference_high, p_holm (a
    point is filled below `alpha`), mde (half-width of the grey band).
    """
    fig, panels = _difference_panels(table, 0.3)
    for ax, part in panels:
        ax.barh(part["y"], 2 * part["mde"], left=-part["mde"], color="0.88", zorder=0)
        _estimates(ax, part, "difference", "difference_low", "difference_high",
                   filled=part["p_holm"] < alpha)
    filled = Line2D([], [], linestyle="none", marker="o", color="0.3")
    hollow = Line2D([], [], linestyle="none", marker="o", color="0.3", markerfacecolor="white")
    fig.legend([filled, hollow, Patch(color="0.88")],
               [f"filled: p < {alpha:g} after Holm", "hollow: not significant",
                "grey: too small for these seeds to find"], loc="outside upper center", ncols=3)
    return fig


@plt.rc_context(STYLE)
def by_difficulty(table: pd.DataFrame) -> Figure:
    """Draw the difference of each arm from its reference at every difficulty, easy above hard.

    `table`: arm, named, reference, difficulty, difference, low, high. A chain that leans to the
    left loses more on hard problems.
    """
    names = sorted(table["difficulty"].unique())
    offsets = dict(zip(names, np.linspace(-0.32, 0.32, len(names)), strict=True))
    shades = dict(zip(names, sns.color_palette("crest", len(names)), strict=True))
    fig, panels = _difference_panels(table, 0.5)
    for ax, part in panels:
        part = part.assign(y=part["y"] + part["difficulty"].map(offsets)).sort_values("y")
        for _, chain in part.groupby("arm"):
            ax.plot(chain["difference"], chain["y"], color="0.45", linewidth=0.8)
        for name, rows in part.groupby("difficulty"):
            ax.hlines(rows["y"], rows["low"], rows["high"], color=shades[name], linewidth=1)
            ax.plot(rows["difference"], rows["y"], "o", color=shades[name], markersize=5,
                    label=str(name).replace("Level", "difficulty"))
    fig.legend(*ax.get_legend_handles_labels(), ncols=5, loc="outside upper center")
    return fig


@plt.rc_context(STYLE)
def beside_theory(table: pd.DataFrame) -> Figure:
    """Draw measured values over their predictions: a panel a quantity, a row an arm.

    `table`: arm, channel, quantity (a key of QUANTITIES), measured, predicted, se (standard error).
    Bars are 1.96 standard errors, often shorter than the point is wide.
    """
    arms = list(table["arm"].unique())
    table = table.assign(y=table["arm"].map(arms.index), low=table["measured"] - 1.96 * table["se"],
                         high=table["measured"] + 1.96 * table["se"])
    size = (8, 1.9 + _row_height(arms, 0.27) * len(arms))
    fig, axes = plt.subplots(1, len(QUANTITIES), figsize=size, sharey=True)
    for ax, (quantity, title) in zip(axes, QUANTITIES.items(), strict=True):
        part = table[table["quantity"] == quantity]
        _estimates(ax, part, "measured", "low", "high")
        ax.plot(part["predicted"], part["y"], **PREDICTED)
        ax.axvline(0, color="black", linewidth=0.8)
        ax.set_title(textwrap.fill(title, 16))
        ax.xaxis.set_major_locator(MaxNLocator(3))
        ax.margins(x=0.12)
        left, right = ax.get_xlim()
        ax.set_xlim(min(left, -0.005), max(right, 0.05))  # no zoom into differences of rounding
        _name_rows(ax, arms)
    fig.legend([Line2D([], [], color="0.3", marker="o"), Line2D([], [], **PREDICTED)],
               ["measured in the reward log", "predicted from true rewards and rates"],
               ncols=2, loc="outside upper center")
    return fig


@plt.rc_context(STYLE)
def training_curves(metrics: pd.DataFrame, arms: list[str] | None = None) -> Figure:
    """Draw clean and observed mean reward by step, a panel an arm; a band is the range of its runs.

    `metrics`: arm, run_id, step, clean_mean, observed_mean. Each run is smoothed over a twentieth
    of its logged steps.
    """
    metrics = metrics.dropna(subset="clean_mean")
    arms = list(metrics["arm"].unique() if arms is None else arms)
    window = max(1, metrics["step"].nunique() // 20)
    columns = min(3, len(arms))
    rows = -(-len(arms) // columns)  # rounded up
    fig, axes = plt.subplots(rows, columns, figsize=(8, max(3.2, 2.4 * rows)), squeeze=False,
                             sharex=True, sharey=True)
    for ax, arm in zip(axes.flat, arms, strict=False):
        part = metrics[metrics["arm"] == arm]
        for column, (label, colour, style) in REWARDS.items():
            runs = part.pivot(index="step", columns="run_id", values=column).sort_index()
            runs = runs.rolling(window, min_periods=1, center=True).mean()
            ax.plot(runs.mean(axis=1), color=colour, linestyle=style, label=label)
            ax.fill_between(runs.index, runs.min(axis=1), runs.max(axis=1), color=colour, alpha=0.2,
                            linewidth=0)
        n = part["run_id"].nunique()
        title = f"{arm}, {n} run{'s' * (n > 1)}"
        ax.set_title(textwrap.fill(title, 108 // columns), fontsize=SMALL)
    ax.set_ylim(-0.02, 1.02)  # of all panels, which share their axes
    ax.yaxis.set_major_formatter(_percent)
    for ax in axes.flat[len(arms):]:
        ax.set_visible(False)
    fig.supxlabel("training step", fontsize=11)
    fig.supylabel("mean reward, %" + ", smoothed" * (window > 1), fontsize=11)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return fig
