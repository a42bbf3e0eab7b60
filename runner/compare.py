"""Two studies or two runs side by side: parameters that differ, results, and a figure.

    python -m runner compare flip flip-smol
    python -m runner compare clean-s0-367b7ffe flip-0.4-s0-f0c76836

A study is the name or path of its folder of tables, a run its id. What is read of a run are the
tables of a study that it belongs to, or its own (`python -m runner ID --report`).
"""

import argparse
import re
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from lib import plots, report, stats
from runner import OUTPUTS, ROOT, dataset
from runner.reading import nearest

STORES = tuple(dict.fromkeys((OUTPUTS, ROOT / "outputs")))  # own results before published ones
NO_PARAMETERS = report.ABOUT_A_RUN | {"setting"}
VALUES = ["estimate", "low", "high"]
LEAST_SPAN = 10  # points on the axis of accuracies, so that .1 point does not look like a gulf


class Side(NamedTuple):
    """One of the two that are compared."""

    name: str
    parameters: pd.DataFrame  # a row a run
    accuracies: dict[str, pd.DataFrame]  # what is compared -> (base_seed, seed) x questions
    metrics: pd.DataFrame | None  # step, clean_mean, ... of a run; None for a study


# --- finding --------------------------------------------------------------------------------------


def read_side(what: str) -> Side:
    """The study or run of this name. ValueError with the nearest names if there is none."""
    for folder in (ROOT / what, *(store / what for store in STORES)):
        if (folder / "runs.csv").exists():
            return read_study(folder)
    known = {table.parent.name for table in tables()}
    for table in tables():
        runs = set(pd.read_csv(table)["run_id"])
        if what in runs:
            return read_run(table.parent, what)
        known |= runs
    raise ValueError(f"there is no study and no evaluated run {what!r}{nearest(what, known)}: "
                     f"evaluate it with python -m runner {what} --report")


def tables() -> list[Path]:
    """The runs.csv of all studies that have been evaluated, own ones first."""
    return [path for store in STORES for path in sorted(store.glob("*/runs.csv"))
            if (path.parent / "eval.parquet").exists()]


# --- reading --------------------------------------------------------------------------------------


def read_study(folder: Path) -> Side:
    """The accuracies of all arms of a study."""
    if not (folder / "summary.csv").exists():
        raise ValueError(f"the study {folder.name} is not evaluated yet: python -m runner STUDY "
                         "--report does it")
    runs = pd.read_csv(folder / "runs.csv")
    summary = pd.read_csv(folder / "summary.csv")
    found = report.assemble(report.count_answers(folder / "eval.parquet"), runs, summary)
    return Side(folder.name, runs, found.matrices, None)


def read_run(folder: Path, run_id: str) -> Side:
    """A run that is in the tables of a study."""
    runs = pd.read_csv(folder / "runs.csv")
    answers = pd.read_parquet(folder / "eval.parquet", filters=[("run_id", "==", run_id)])
    metrics = pd.read_parquet(folder / "metrics.parquet", filters=[("run_id", "==", run_id)])
    return Side(run_id, runs[runs["run_id"] == run_id], accuracy_of_a_run(answers), metrics)


def accuracy_of_a_run(answers: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Sampled and greedy accuracy by question, exact grader: a table of one row each."""
    found = {}
    for decoding, rows in answers.groupby("decoding", observed=True, sort=False):
        by_question = rows.groupby("sample_id", observed=True)["exact"].mean()
        found[decoding] = by_question.to_frame().T.reset_index(drop=True)
    return found


# --- comparing ------------------------------------------------------------------------------------


def different_parameters(one: Side, other: Side) -> pd.DataFrame:
    """Parameters whose values are not the same on both sides, a column a side."""
    names = [name for name in (*one.parameters, *other.parameters) if name not in NO_PARAMETERS]
    rows = {}
    for name in dict.fromkeys(names):
        values = [values_of(side, name) for side in (one, other)]
        if values[0] != values[1]:
            rows[name] = values
    return pd.DataFrame.from_dict(rows, "index", columns=[one.name, other.name]).rename_axis(
        "parameter")


def values_of(side: Side, name: str) -> str:
    """The values of a parameter in words, such as "0, 0.1, 0.2"."""
    if name not in side.parameters:
        return ""
    values = side.parameters[name].dropna().unique()
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value)
                     for value in sorted(values, key=lambda value: (str(type(value)), value)))


def compared_results(one: Side, other: Side) -> pd.DataFrame:
    """A row for each arm (of studies) or way of decoding (of runs) that a side has.

    Columns: estimate, low and high of A, of B, and of B - A. The difference is paired on seed and
    question, and empty where the two sides have no seed or not the same questions in common.
    """
    is_run = one.metrics is not None
    rows = {}
    for what in dict.fromkeys((*one.accuracies, *other.accuracies)):
        sides = [side.accuracies.get(what) for side in (one, other)]
        parts = [over_seeds(sides[0], is_run), over_seeds(sides[1], is_run),
                 paired(*sides, is_run)]
        rows[what] = [value for part in parts for value in part]
    columns = [f"{side}_{value}" for side in ("A", "B", "difference") for value in VALUES]
    return pd.DataFrame.from_dict(rows, "index", columns=columns).rename_axis("compared")


def over_seeds(accuracies: pd.DataFrame | None, is_run: bool) -> tuple[float, float, float]:
    """Mean and 95 % interval: for new seeds and questions, or of a run for new questions."""
    if accuracies is None:
        return np.nan, np.nan, np.nan
    if is_run:
        estimate, low, high = over_questions(accuracies.to_numpy()[0])
    else:
        estimate, low, high, _ = stats.mean_interval(accuracies.to_numpy())
    return estimate, *np.clip([low, high], 0, 1)


def paired(one: pd.DataFrame | None, other: pd.DataFrame | None,
           is_run: bool) -> tuple[float, float, float]:
    """B - A with its interval, paired on question, and on the seed if there are several."""
    nothing = np.nan, np.nan, np.nan
    if one is None or other is None or set(one.columns) != set(other.columns):
        return nothing
    if is_run:
        return over_questions((other[one.columns] - one).to_numpy()[0])
    if one.index.intersection(other.index).empty:
        return nothing
    found = stats.paired_difference(one, other)
    return found.estimate, found.low, found.high


def over_questions(values: np.ndarray) -> tuple[float, float, float]:
    """Mean over questions and its 95 % interval."""
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    return values.mean(), values.mean() - half, values.mean() + half


# --- showing --------------------------------------------------------------------------------------


def figure_of_studies(one: Side, other: Side, table: pd.DataFrame):
    """A row an arm, a point a study with its interval."""
    with plt.rc_context(plots.STYLE):
        fig, ax = plt.subplots(figsize=(8, 1.4 + 0.4 * len(table)))
        rows = np.arange(len(table))
        for letter, side, shift, marker in (("A", one, -0.13, "o"), ("B", other, 0.13, "s")):
            estimate, low, high = (100 * table[f"{letter}_{value}"] for value in VALUES)
            points = ax.plot(estimate, rows + shift, marker, label=f"{letter}: {side.name}")
            ax.hlines(rows + shift, low, high, color=points[0].get_color(), linewidth=1.2)
        ax.set_yticks(rows, table.index)
        ax.invert_yaxis()
        left, right = ax.get_xlim()
        missing = max(0, LEAST_SPAN - (right - left))
        ax.set_xlim(left - missing / 2, right + missing / 2)
        has_interval = table.filter(like="_low").notna().to_numpy().any()
        ax.set_xlabel("accuracy, %" if has_interval else "accuracy, % (one seed: no intervals)")
        fig.legend(loc="outside upper center", ncols=2)
    return fig


def figure_of_runs(one: Side, other: Side):
    """The clean reward by step, smoothed over a twentieth of the logged steps."""
    with plt.rc_context(plots.STYLE):
        fig, ax = plt.subplots(figsize=(8, 4))
        for letter, side, style in (("A", one, "-"), ("B", other, "--")):
            logged = side.metrics.dropna(subset="clean_mean").set_index("step")["clean_mean"]
            window = max(1, len(logged) // 20)
            smooth = logged.rolling(window, min_periods=1, center=True).mean()
            ax.plot(100 * smooth, style, label=f"{letter}: {side.name}")
        ax.set(xlabel="training step", ylabel="clean reward, %, smoothed")
        fig.legend(loc="outside upper center", ncols=1)
    return fig


def print_table(title: str, table: pd.DataFrame, console: Console):
    """A frame of texts with its index."""
    shown = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in (table.index.name, *table.columns):
        shown.add_column(column, overflow="fold")
    for name, row in table.iterrows():
        shown.add_row(str(name), *row)
    console.print(shown)


def compare(first: str, second: str, console: Console) -> Path:
    """Print and save what differs between two studies or runs; returns the folder of it all."""
    one, other = read_side(first), read_side(second)
    is_study = one.metrics is None
    if is_study != (other.metrics is None):
        raise ValueError(f"one of {one.name} and {other.name} is a run and the other a study: give "
                         "two runs or two studies")
    parameters, table = different_parameters(one, other), compared_results(one, other)
    console.print(f"A: {one.name}\nB: {other.name}\n")
    if parameters.empty:
        console.print("No parameter differs. If results do, then base policies, versions of the "
                      "code or machines did: see provenance.")
    else:
        print_table("Parameters that differ", parameters, console)

    texts = pd.DataFrame(index=table.index)
    for side, sign in (("A", ""), ("B", ""), ("difference", "+")):
        columns = table[[f"{side}_{value}" for value in VALUES]].to_numpy()
        texts[side.replace("difference", "B - A")] = [report.between(*row, sign)
                                                      for row in columns]
    console.print()
    print_table("Accuracy in percent, with 95 % intervals", texts, console)
    if is_study:
        console.print("Intervals are for new seeds and questions, and not corrected for several "
                      "comparisons. B - A is empty where an arm is on one side only, or where the "
                      "sides have no seed or not the same questions in common.")
    else:
        console.print("Intervals are for new questions. What other seeds would do, two runs cannot "
                      "say.")

    name = "-and-".join(re.sub(r"[^\w.+-]+", "-", side.name) for side in (one, other))
    folder = OUTPUTS / "compare" / name
    folder.mkdir(parents=True, exist_ok=True)
    parameters.to_csv(folder / "parameters.csv")
    table.to_csv(folder / "results.csv", float_format="%.6g")
    fig = figure_of_studies(one, other, table) if is_study else figure_of_runs(one, other)
    plots.save(fig, folder / "comparison.png")
    return folder


def main(arguments: list[str]) -> int:
    """`python -m runner compare A B`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m runner compare", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    for letter in "AB":
        parser.add_argument(letter, help="a study's folder in outputs/, or a run's id")
    args = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 80, markup=False, highlight=False)
    try:
        folder = compare(args.A, args.B, console)
    except (ValueError, OSError) as e:
        print(e, file=sys.stderr)
        return 2
    console.print(f"\nSaved in {dataset.shown(folder)}: parameters.csv, results.csv, "
                  "comparison.png")
    return 0
