"""Figures of the training and analysis notebooks: tidy frame in, matplotlib Figure out, no file read.

One style for all: seaborn's colour-blind palette, a marker for each channel, 8 x 4.5 inches at 150 dpi.
Accuracies and differences are fractions in the frames and percent on the axes. A NaN bound draws no bar.
"""
import re
import textwrap
from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

plt.switch_backend(plt.get_backend())  # now: inside rc_context, a notebook would show the first figure only
SIZE, DPI = (8, 4.5), 150
STYLE = {"font.size": 11, "axes.titlesize": 12, "axes.titlelocation": "left", "legend.frameon": False,
         "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
         "figure.constrained_layout.use": True, "figure.dpi": DPI, "savefig.dpi": DPI}
COLOURS = sns.color_palette("colorblind")
CHANNELS = {"flip": (COLOURS[0], "o"), "mask": (COLOURS[1], "s"), "false positives": (COLOURS[2], "^"),
            "false negatives": (COLOURS[4], "v"), "abstain": (COLOURS[3], "D"), "clean": ("black", "o")}
CLEAN, BASE = "black", "0.45"
LEVEL_MARKERS = {"rollout": "o", "group": "P", "prompt": "X"}


def save(fig: Figure, path: str | Path) -> Path:
    """Write a PNG that has the same bytes for the same figure (no date, no software version); close it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, metadata={"Software": None})
    plt.close(fig)
    return path


def looks(channels) -> dict[str, tuple]:
    """(colour, marker) of each channel; channels without a fixed look share the remaining ones in turn."""
    spare = cycle(zip([COLOURS[9], COLOURS[5], COLOURS[7], COLOURS[6]], "PX*h", strict=True))
    return {c: CHANNELS[c] if c in CHANNELS else next(spare) for c in channels}


def kind_and_level(channel: str) -> tuple[str, str]:
    """A channel's name without its level, and the level: ("flip", "prompt"), or ("flip", "rollout") for "flip"."""
    found = re.fullmatch(r"(.*) \((group|prompt)\)", channel)
    return (found[1], found[2]) if found else (channel, "rollout")


def looks_by_level(channels) -> tuple[dict[str, tuple], list[Line2D]]:
    """(colour, marker) of each channel, and legend handles: colours for kinds, markers for levels if there are two."""
    named = {c: kind_and_level(c) for c in channels}
    kinds, levels = (list(dict.fromkeys(names)) for names in zip(*named.values(), strict=True))
    colours = {k: colour for k, (colour, _) in looks(kinds).items()}
    if len(levels) < 2:
        styles = {c: (colours[named[c][0]], marker) for c, (_, marker) in looks(channels).items()}
        return styles, [Line2D([], [], color=c, marker=m, label=n) for n, (c, m) in styles.items()]
    styles = {c: (colours[kind], LEVEL_MARKERS[level]) for c, (kind, level) in named.items()}
    handles = [Line2D([], [], color=colour, linewidth=3, label=k) for k, colour in colours.items()]
    return styles, handles + [Line2D([], [], color="0.3", marker=LEVEL_MARKERS[v], linestyle="none", label=f"{v} level")
                              for v in levels]


def _need(frame: pd.DataFrame, *columns: str):
    missing = [c for c in columns if c not in frame]
    if missing or frame.empty:
        raise ValueError(f"nothing to draw: the frame has {len(frame)} rows and lacks the columns {missing}")


def _points(ax, x, rows: pd.DataFrame, colour, marker="o", label=None):
    bars = np.abs(rows[["low", "high"]].to_numpy(float).T - rows["estimate"].to_numpy(float))
    ax.errorbar(x, rows["estimate"], bars, color=colour, marker=marker, label=label, capsize=3,
                elinewidth=1.5, markersize=6, linestyle="none")


def _channels(ax, table: pd.DataFrame, x: str, base: float | None):
    """A point an arm over column x, those of one value side by side; the clean point, the base policy, the legend."""
    clean, noisy = (table[(table["channel"] == "clean") == is_clean].round({x: 6}) for is_clean in (True, False))
    styles, handles = looks_by_level(noisy["channel"].unique()) if len(noisy) else ({}, [])
    at, values = noisy.groupby(x)["channel"].unique().map(list), np.unique(table[x].round(6))
    step = min(0.5 * np.diff(values).min(initial=1) / at.map(len).max(), 0.03 * np.ptp(values)) if len(at) else 0
    for channel, (colour, marker) in styles.items():
        rows = noisy[noisy["channel"] == channel].sort_values(x, ascending=x != "J")
        places = [v + step * (at[v].index(channel) - (len(at[v]) - 1) / 2) for v in rows[x]]
        if rows[x].nunique() > 1:  # a line to a lone point would show values that nobody ran
            ax.plot([*clean[x], *places], [*clean["estimate"], *rows["estimate"]], color=colour, linewidth=1.2)
        _points(ax, places, rows, colour, marker)
    if len(clean):
        _points(ax, clean[x], clean, CLEAN)
        handles = [*handles, Line2D([], [], color=CLEAN, marker="o", linestyle="none", label="clean")]
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if base is not None:
        handles = [*handles, ax.axhline(base, color=BASE, linestyle="--", label="base policy, before training")]
    ax.figure.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=10)


@plt.rc_context(STYLE)
def noise_curve(table: pd.DataFrame, base: float | None = None) -> Figure:
    """Accuracy against the noise rate, bars = intervals; a line a channel of several rates, from clean at rate 0.

    `table`: channel ("clean" or a channel's name), rate, estimate, low, high. `base`: the dashed line.
    """
    _need(table, "channel", "rate", "estimate", "low", "high")
    fig, ((ax,),) = plt.subplots(figsize=SIZE, squeeze=False)
    _channels(ax, table, "rate", base)
    ax.set(xlabel="noise rate", ylabel="accuracy")
    return fig


@plt.rc_context(STYLE)
def j_axis(table: pd.DataFrame, base: float | None = None) -> Figure:
    """Accuracy against J = 1 - a - b, the signal left in the reward; J falls to the right. Needs column J.

    If the kind of noise did not matter, all channels would fall on one line.
    """
    _need(table, "channel", "J", "estimate", "low", "high")
    fig, ((ax,),) = plt.subplots(figsize=SIZE, squeeze=False)
    _channels(ax, table, "J", base)
    values = np.unique(table["J"].round(6))
    if len(values) <= 10:  # points of one J stand side by side around its tick
        ax.set_xticks(values, [f"{v:.2g}" for v in values])
    ax.invert_xaxis()
    ax.set(xlabel="J = 1 − a − b (1: clean, 0: no signal, below 0: reversed)", ylabel="accuracy")
    return fig


@plt.rc_context(STYLE)
def arm_accuracies(table: pd.DataFrame, base: float | None = None) -> Figure:
    """Forest plot of accuracies, a block a reference with a line through it; the base policy is the dashed line.

    `table`: arm, reference, channel, estimate, low, high. An arm that is its own reference opens its block.
    """
    _need(table, "arm", "reference", "channel", "estimate", "low", "high")
    styles, _ = looks_by_level(table["channel"].unique())
    table, order = table.set_index("arm"), []
    for reference, block in table.groupby("reference", sort=False):
        arms = [reference, *block.index.drop(reference, errors="ignore")]
        order += [(arm, reference) for arm in arms if arm in table.index and len(arms) > 1]
    order += [(arm, arm) for arm in table.index if arm not in {a for a, _ in order}]
    fig, ((ax,),) = plt.subplots(figsize=(8, max(2.8, 1.2 + 0.3 * len(order))), squeeze=False)
    for y, (arm, reference) in enumerate(order):
        row, alone = table.loc[arm], arm == reference
        colour, marker = (CLEAN, "o") if alone else styles[row["channel"]]
        ax.errorbar(row["estimate"], y, xerr=[[row["estimate"] - row["low"]], [row["high"] - row["estimate"]]],
                    color=colour, marker=marker, capsize=3, markersize=6)
        if alone:
            rows = [i for i, (_, r) in enumerate(order) if r == reference]
            ax.vlines(row["estimate"], y, max(rows) + 0.4, color=CLEAN, linewidth=0.8, alpha=0.6)
    if base is not None:
        ax.axvline(base, color=BASE, linestyle="--", linewidth=1.2, label="base policy, before training")
        fig.legend(loc="outside upper center", fontsize=10)
    ax.set_yticks(range(len(order)), [arm for arm, _ in order], fontsize=9)
    for label, (arm, reference) in zip(ax.get_yticklabels(), order, strict=True):
        label.set_fontweight("bold" if arm == reference else "normal")
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.set_xlabel("accuracy")
    return fig


QUANTITIES = {"silent": "groups without signal", "spurious": "spurious groups",
              "energy": "mean squared advantage, E[A²]", "gap": "advantage gap"}


@plt.rc_context(STYLE)
def beside_theory(table: pd.DataFrame) -> Figure:
    """Measured against predicted, a panel a quantity, a point an arm, bars of 1.96 standard errors, the diagonal.

    `table`: channel, quantity (a key of QUANTITIES), measured, predicted, se.
    """
    _need(table, "channel", "quantity", "measured", "predicted", "se")
    styles, handles = looks_by_level(table["channel"].unique())
    fig, axes = plt.subplots(2, 2, figsize=(8, 6.5), squeeze=False)
    for ax, (quantity, title) in zip(axes.flat, QUANTITIES.items(), strict=True):
        part = table[table["quantity"] == quantity]
        for row in part.itertuples():
            colour, marker = styles[row.channel]
            ax.errorbar(row.predicted, row.measured, 1.96 * row.se, color=colour, marker=marker, capsize=2,
                        markersize=5, alpha=0.8)
        ax.axline((0, 0), slope=1, color=CLEAN, linewidth=0.8, zorder=0)
        ax.set_title(title)
    fig.supxlabel("predicted from the true rewards and the rates", fontsize=11)
    fig.supylabel("measured in the reward log", fontsize=11)
    fig.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=10)
    return fig


@plt.rc_context(STYLE)
def level_table(table: pd.DataFrame, arms: list[str]) -> Figure:
    """Accuracy by arm and difficulty level as a shaded table with numbers in percent: arm, level, estimate."""
    _need(table, "arm", "level", "estimate")
    grid = 100 * table.pivot(index="arm", columns="level", values="estimate").reindex(arms)
    grid.columns = [str(c).replace("Level ", "") for c in grid.columns]
    fig, ((ax,),) = plt.subplots(figsize=(8, 1.2 + 0.32 * len(grid)), squeeze=False)
    sns.heatmap(grid, annot=True, fmt=".0f", cmap="viridis", cbar=False, linewidths=0.5, ax=ax)
    ax.set(xlabel="level", ylabel="")
    return fig


@plt.rc_context(STYLE)
def training_curves(metrics: pd.DataFrame, arms: list[str] | None = None, window: int | None = None,
                    columns: int = 3) -> Figure:
    """Clean and observed mean reward by training step, a panel an arm; band = range over the runs of the arm.

    `metrics`: arm, run_id, step, clean_mean, observed_mean. Each run is smoothed over `window` logged steps
    (a twentieth of the run unless told).
    """
    _need(metrics, "arm", "run_id", "step", "clean_mean", "observed_mean")
    metrics = metrics.dropna(subset="clean_mean")
    arms = list(dict.fromkeys(metrics["arm"])) if arms is None else list(arms)
    window = window or max(1, metrics["step"].nunique() // 20)
    columns = min(columns, len(arms))
    rows = -(-len(arms) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(8, max(3.2, 2.4 * rows)), squeeze=False, sharex=True,
                             sharey=True)
    lines = (("clean_mean", "clean reward (what we want)", COLOURS[2], "-"),
             ("observed_mean", "observed reward (what GRPO sees)", COLOURS[3], "--"))
    for ax, arm in zip(axes.flat, arms, strict=False):
        part = metrics[metrics["arm"] == arm]
        for column, label, colour, style in lines:
            runs = part.pivot(index="step", columns="run_id", values=column).sort_index()
            runs = runs.rolling(window, min_periods=1, center=True).mean()
            ax.plot(runs.index, runs.mean(axis=1), color=colour, linestyle=style, label=label)
            ax.fill_between(runs.index, runs.min(axis=1), runs.max(axis=1), color=colour, alpha=0.2, lw=0)
        n = part["run_id"].nunique()
        ax.set_title(textwrap.fill(f"{arm}, {n} run{'s' * (n != 1)}", 96 // columns), fontsize=10)
        ax.set_ylim(-0.02, 1.02)
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for ax in list(axes.flat)[len(arms):]:
        ax.set_visible(False)
    fig.supxlabel("training step", fontsize=11)
    fig.supylabel("mean reward, smoothed" if window > 1 else "mean reward", fontsize=11)
    fig.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=10)
    return fig


@plt.rc_context(STYLE)
def by_level(table: pd.DataFrame) -> Figure:
    """Accuracy by difficulty level, a panel a channel, a shade a rate; clean in black in every panel.

    `table`: channel, rate, level, estimate, low, high.
    """
    _need(table, "channel", "rate", "level", "estimate", "low", "high")
    levels = sorted(table["level"].unique())
    clean = table[table["channel"] == "clean"]
    channels = [c for c in table["channel"].unique() if c != "clean"] or ["clean"]
    cols = min(len(channels), 3)
    rows = -(-len(channels) // cols)
    fig, axes = plt.subplots(rows, cols, figsize=(8, max(3.8, 3.4 * rows)), squeeze=False, sharey=True)
    for ax, channel in zip(axes.flat, channels, strict=False):
        part = table[table["channel"] == channel] if channel != "clean" else table.iloc[:0]
        rates = sorted(part["rate"].unique())
        shades = sns.color_palette("viridis_r", len(rates) + 1)[1:]
        drawn = [(clean, CLEAN, "clean")] + [(part[part["rate"] == r], c, f"{r:g}" if r else channel)
                                             for r, c in zip(rates, shades, strict=True)]
        for i, (one, colour, label) in enumerate(drawn):
            one = one.sort_values("level")
            x = [levels.index(v) + 0.5 * (i - (len(drawn) - 1) / 2) / len(drawn) for v in one["level"]]
            _points(ax, x, one, colour, "o", label)
        ax.set_title(channel)
        ax.set_xticks(range(len(levels)), [str(v).replace("Level ", "") for v in levels])
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.legend(title="rate", fontsize=9, title_fontsize=9, ncols=4, handlelength=1, columnspacing=1,
                  loc="upper center", bbox_to_anchor=(0.5, -0.18))
        ax.set_xlabel("level")
    for ax in list(axes.flat)[len(channels):]:
        ax.set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel("accuracy")
    return fig


@plt.rc_context(STYLE)
def paired_differences(table: pd.DataFrame, alpha: float = 0.05) -> Figure:
    """Forest plot of the differences from a reference. Filled: significant after Holm. Grey: too small to be found.

    Where references differ, each has a heading above its arms.

    `table`: arm, channel, reference ("clean" without it), difference, difference_low, difference_high, p_holm,
    mde (half-width of the band).
    """
    _need(table, "arm", "channel", "difference", "difference_low", "difference_high", "p_holm", "mde")
    against = table["reference"] if "reference" in table else pd.Series("clean", table.index)
    against = against.str.split(" | ", regex=False).str[0]  # the setting is in the arm's own name
    rows = []  # an arm, or the name of a reference
    for reference, block in table.groupby(against, sort=False):
        rows += [*([reference] if against.nunique() > 1 else []), *block.itertuples()]
    fig, ((ax,),) = plt.subplots(figsize=(8, max(2.8, 1.5 + 0.36 * len(rows))), squeeze=False)
    styles, _ = looks_by_level(table["channel"].unique())
    for y, row in enumerate(rows):
        if isinstance(row, str):
            continue
        colour, marker = styles[row.channel]
        if np.isfinite(row.mde):
            ax.barh(y, 2 * row.mde, left=-row.mde, height=0.8, color="0.85", zorder=0)
        bars = [[row.difference - row.difference_low], [row.difference_high - row.difference]]
        ax.errorbar(row.difference, y, xerr=bars, color=colour, marker=marker, capsize=3, markersize=7,
                    markerfacecolor=colour if row.p_holm < alpha else "white")
    ax.axvline(0, color=CLEAN, linewidth=1)
    one = against.nunique() == 1
    ax.set_yticks(range(len(rows)), [f"against {r}:" if isinstance(r, str) else r.arm for r in rows],
                  fontsize=11 if one else 9)
    for label, row in zip(ax.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if isinstance(row, str) else "normal")
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    ax.xaxis.set_major_formatter(lambda v, _: f"{100 * v:+.0f}" if abs(v) > 1e-9 else "0")
    ax.set_xlabel(f"difference from {against.iloc[0] if one else 'the reference'}, percentage points")
    dot = {"linestyle": "none", "marker": "o", "color": "0.3", "markersize": 7}
    fig.legend([Line2D([], [], **dot), Line2D([], [], **dot, markerfacecolor="white"), Patch(color="0.85")],
               [f"p < {alpha:g} after Holm", "not significant", "below the minimum detectable effect"],
               loc="outside upper center", ncols=3, fontsize=10)
    return fig
