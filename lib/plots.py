"""Figures of the training and analysis notebooks: tidy frame in, matplotlib Figure out, no file read.

One style for all: seaborn's colour-blind palette, a marker for each channel, 8 x 4.5 inches at 150 dpi.
Accuracies and differences are fractions in the frames and percent on the axes. A NaN bound draws no bar.
"""
from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

SIZE, DPI = (8, 4.5), 150
STYLE = {"font.size": 11, "axes.titlesize": 12, "axes.titlelocation": "left", "legend.frameon": False,
         "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
         "figure.constrained_layout.use": True, "figure.dpi": DPI, "savefig.dpi": DPI}
COLOURS = sns.color_palette("colorblind")
CHANNELS = {"flip": (COLOURS[0], "o"), "mask": (COLOURS[1], "s"), "false positives": (COLOURS[2], "^"),
            "false negatives": (COLOURS[4], "v"), "abstain": (COLOURS[8], "D")}
CLEAN, BASE = "black", "0.45"


def save(fig: Figure, path: str | Path) -> Path:
    """Write a PNG that has the same bytes for the same figure (no date, no software version); close it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, metadata={"Software": None})
    plt.close(fig)
    return path


def looks(channels) -> dict[str, tuple]:
    """(colour, marker) of each channel; channels without a fixed look share the remaining ones in turn."""
    spare = cycle(zip([COLOURS[3], COLOURS[5], COLOURS[7], COLOURS[9]], "PX*h", strict=True))
    return {c: CHANNELS[c] if c in CHANNELS else next(spare) for c in channels}


def _need(frame: pd.DataFrame, *columns: str):
    missing = [c for c in columns if c not in frame]
    if missing or frame.empty:
        raise ValueError(f"nothing to draw: the frame has {len(frame)} rows and lacks the columns {missing}")


def _axes(rows: int = 1, cols: int = 1, size=SIZE, **kwargs) -> tuple[Figure, np.ndarray]:
    with plt.rc_context(STYLE):
        return plt.subplots(rows, cols, figsize=size, squeeze=False, **kwargs)


def _points(ax, x, rows: pd.DataFrame, colour, marker="o", label=None, line=False):
    bars = np.abs(rows[["low", "high"]].to_numpy(float).T - rows["estimate"].to_numpy(float))
    ax.errorbar(x, rows["estimate"], bars, color=colour, marker=marker, label=label, capsize=3, elinewidth=1.5,
                markersize=6, linestyle="-" if line else "none", linewidth=1.2)


def _accuracy_axis(ax, base):
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if base is not None:
        ax.axhline(base, color=BASE, linestyle="--", linewidth=1.2, label="base policy, before training")


def noise_curve(table: pd.DataFrame, base: float | None = None) -> Figure:
    """Accuracy against the noise rate, a line a channel from the clean point at rate 0, bars = intervals.

    `table`: channel ("clean" or a channel's name), rate, estimate, low, high. `base`: the dashed line.
    """
    _need(table, "channel", "rate", "estimate", "low", "high")
    clean, noisy = table[table["channel"] == "clean"], table[table["channel"] != "clean"]
    fig, ((ax,),) = _axes()
    styles = looks(noisy["channel"].unique())
    for i, (channel, (colour, marker)) in enumerate(styles.items()):
        rows = noisy[noisy["channel"] == channel].sort_values("rate")
        shift = 0.004 * (i - (len(styles) - 1) / 2)  # bars at one rate stay apart
        start = clean[["rate", "estimate"]]
        line = pd.concat([start, rows[["rate", "estimate"]].assign(rate=rows["rate"] + shift)])
        ax.plot(line["rate"], line["estimate"], color=colour, linewidth=1.2)
        _points(ax, rows["rate"] + shift, rows, colour, marker, channel)
    if len(clean):
        _points(ax, clean["rate"], clean, CLEAN, "o", "clean")
    _accuracy_axis(ax, base)
    ax.set(xlabel="noise rate", ylabel="accuracy")
    ax.legend(loc="best")
    return fig


def j_axis(table: pd.DataFrame, base: float | None = None) -> Figure:
    """Accuracy against J = 1 - a - b, the signal left in the reward; J falls to the right. Needs column J too.

    If the kind of noise did not matter, all channels would fall on one line.
    """
    _need(table, "channel", "J", "estimate", "low", "high")
    fig, ((ax,),) = _axes()
    noisy = table[table["channel"] != "clean"]
    for channel, (colour, marker) in looks(noisy["channel"].unique()).items():
        rows = noisy[noisy["channel"] == channel].sort_values("J")
        _points(ax, rows["J"], rows, colour, marker, channel, line=True)
    clean = table[table["channel"] == "clean"]
    if len(clean):
        _points(ax, clean["J"], clean, CLEAN, "o", "clean")
    _accuracy_axis(ax, base)
    ax.invert_xaxis()
    ax.set(xlabel="J = 1 − a − b (1: clean, 0: no signal, below 0: reversed)", ylabel="accuracy")
    ax.legend(loc="best")
    return fig


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
    fig, axes = _axes(rows, columns, (8, max(3.2, 2.4 * rows)), sharex=True, sharey=True)
    lines = (("clean_mean", "clean reward (what we want)", COLOURS[2], "-"),
             ("observed_mean", "observed reward (what GRPO sees)", COLOURS[3], "--"))
    for ax, arm in zip(axes.flat, arms, strict=False):
        part = metrics[metrics["arm"] == arm]
        for column, label, colour, style in lines:
            runs = part.pivot(index="step", columns="run_id", values=column).sort_index()
            runs = runs.rolling(window, min_periods=1, center=True).mean()
            ax.plot(runs.index, runs.mean(axis=1), color=colour, linestyle=style, label=label)
            ax.fill_between(runs.index, runs.min(axis=1), runs.max(axis=1), color=colour, alpha=0.2, linewidth=0)
        n = part["run_id"].nunique()
        ax.set_title(f"{arm}, {n} run{'s' * (n != 1)}", fontsize=10)
        ax.set_ylim(-0.02, 1.02)
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for ax in list(axes.flat)[len(arms):]:
        ax.set_visible(False)
    fig.supxlabel("training step", fontsize=11)
    fig.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=10)
    return fig


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
    fig, axes = _axes(rows, cols, (8, max(3.6, 3.0 * rows)), sharex=True, sharey=True)
    for ax, channel in zip(axes.flat, channels, strict=False):
        part = table[table["channel"] == channel] if channel != "clean" else table.iloc[:0]
        rates = sorted(part["rate"].unique())
        shades = sns.color_palette("viridis_r", len(rates) + 1)[1:]
        drawn = [(clean, CLEAN, "clean")] + [(part[part["rate"] == r], c, f"{r:g}")
                                             for r, c in zip(rates, shades, strict=True)]
        for i, (one, colour, label) in enumerate(drawn):
            one = one.sort_values("level")
            x = [levels.index(v) + 0.5 * (i - (len(drawn) - 1) / 2) / len(drawn) for v in one["level"]]
            _points(ax, x, one, colour, "o", label)
        ax.set_title(channel)
        ax.set_xticks(range(len(levels)), [str(v).replace("Level ", "") for v in levels])
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.legend(title="rate", fontsize=9, title_fontsize=9, ncols=2, handlelength=1)
    for ax in list(axes.flat)[len(channels):]:
        ax.set_visible(False)
    fig.supxlabel("level", fontsize=11)
    return fig


def paired_differences(table: pd.DataFrame, alpha: float = 0.05) -> Figure:
    """Forest plot of the differences from clean. Filled: significant after Holm. Grey: too small to be found.

    `table`: arm, channel, difference, difference_low, difference_high, p_holm, mde (half-width of the grey band).
    """
    _need(table, "arm", "channel", "difference", "difference_low", "difference_high", "p_holm", "mde")
    fig, ((ax,),) = _axes(size=(8, max(2.8, 1.2 + 0.38 * len(table))))
    styles = looks(table["channel"].unique())
    for y, row in enumerate(table.itertuples()):
        colour, marker = styles[row.channel]
        if np.isfinite(row.mde):
            ax.barh(y, 2 * row.mde, left=-row.mde, height=0.8, color="0.85", zorder=0)
        bars = [[row.difference - row.difference_low], [row.difference_high - row.difference]]
        ax.errorbar(row.difference, y, xerr=bars, color=colour, marker=marker, capsize=3, markersize=7,
                    markerfacecolor=colour if row.p_holm < alpha else "white")
    ax.axvline(0, color=CLEAN, linewidth=1)
    ax.set_yticks(range(len(table)), table["arm"])
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.xaxis.set_major_formatter(lambda v, _: f"{100 * v:+.0f}" if abs(v) > 1e-9 else "0")
    ax.set_xlabel("difference from clean, percentage points")
    return fig
