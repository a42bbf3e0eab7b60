"""What a terminal shows of data, of a run, and of the results of a study."""

import io
import subprocess
from pathlib import Path

import pandas as pd
from rich.table import Table

from runner import ROOT
from runner.dataset import shown
from runner.parameters import Params

MACHINES = "Another processor may build another base policy: see docs/reliability.md"

WARM_START = "papermill notebooks/01b_warm_start.ipynb out.ipynb --log-output"
AFTER_DATA = {"arithmetic": WARM_START, "operations": f"{WARM_START} -p profile smol"}


def end_of_data(folder: Path, counts: dict[str, int]) -> str:
    """What a terminal shows of data that have been made, and what is next.

    counts: file -> rows, of the manifest.
    """
    train, validation, test = (counts[name] for name in ("train_split", "validation_split", "test"))
    own = (f"papermill notebooks/02_train.ipynb out.ipynb -p data_dir {folder.name} -p model MODEL "
           "--log-output")
    return (f"{shown(folder)}: {train:,} problems for training, {validation:,} for validation, "
            f"{test:,} for the test\nnext: {AFTER_DATA.get(folder.name, own)}")


def end_of_run(params: Params, metrics: pd.DataFrame, log: pd.DataFrame) -> str:
    """What a terminal shows of a finished run: rewards, accuracy, what went wrong, what is next.

    metrics, log: the run's metrics.parquet and rewards.parquet.
    """
    tenth = max(1, len(metrics) // 10)
    clean = metrics["clean_mean"].dropna()
    lines = [f"{params.folder.name}: clean reward {clean.head(tenth).mean():.3f} at the beginning, "
             f"{clean.tail(tenth).mean():.3f} at the end",
             accuracy_on_validation(metrics)]
    cut = int((log["completion_tokens"] >= params.max_completion_length).sum())
    if cut:
        lines.append(f"{cut:,} of {len(log):,} completions reached the limit of "
                     f"{params.max_completion_length} tokens (max_completion_length)")
    boxless = int((~log["format_ok"].astype(bool)).sum())
    if boxless:
        lines.append(f"{boxless:,} of {len(log):,} completions have no answer in a box")
    folder = shown(params.folder)
    target = params.folder.name if params.output_dir == "outputs" else folder
    lines += [f"folder: {folder}", f"next: python -m runner {target} --report"]
    return "\n".join(lines)


def accuracy_on_validation(metrics: pd.DataFrame) -> str:
    """The last greedy accuracy on validation problems that a run has logged."""
    if "validation_greedy" not in metrics or metrics["validation_greedy"].isna().all():
        return "accuracy on validation: not looked at (eval_interval is 0)"
    seen = metrics.dropna(subset="validation_greedy").iloc[-1]
    return (f"accuracy on validation, greedy: {seen['validation_greedy']:.3f} after "
            f"{int(seen['step'])} steps")


def results_table(results: pd.DataFrame) -> Table:
    """A row an arm, in percent, at most 80 columns wide. results: the rows of results.csv."""
    usual = results.reference.mode()[0]
    differences = f"Differences are from {usual!r} or the arm in brackets."
    if results.difference.isna().all():
        differences = "No arm is compared with another."
    table = Table(box=None, pad_edge=False, caption_justify="left",
                  caption=f"In percent, with 95 % intervals. {differences}")
    table.add_column("arm", overflow="fold")
    for column in ("seeds", "accuracy", "difference", "Holm p"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in results.itertuples():
        table.add_row(*_cells(row, usual))
    return table


def _cells(row, usual: str) -> list[str]:
    """What the table shows of one arm; its reference only if that is not the usual one."""
    from lib import report  # here: it takes a second, and a mistake in a study is told before

    accuracy = report.between(row.estimate, row.low, row.high)
    difference = report.between(row.difference, row.difference_low, row.difference_high, "+")
    if pd.isna(row.difference_low):  # not compared, or of one seed
        return [row.arm, str(row.seeds), accuracy, difference, ""]
    arm = row.arm
    if row.reference != usual:
        arm += f" (from {row.reference})"
    return [arm, str(row.seeds), accuracy, difference, f"{row.p_holm:.2g}"]


def compare_with_published(file: Path) -> str:
    """One sentence: whether a results.csv is the one that git holds; "" if git holds none."""
    path = f"outputs/{file.parent.name}/{file.name}"
    shown = subprocess.run(["git", "-C", str(ROOT), "show", f"HEAD:{path}"],
                           capture_output=True, text=True)
    if shown.returncode:
        return ""
    if shown.stdout == file.read_text():
        return f"The published results ({path}) were reproduced exactly."
    published = pd.read_csv(io.StringIO(shown.stdout)).set_index("arm").estimate
    here = pd.read_csv(file).set_index("arm").estimate
    if set(here.index) != set(published.index):
        return f"The published results ({path}) are those of other arms."
    apart = 100 * (here - published).abs()
    return (f"The published results ({path}) were not reproduced exactly: accuracy differs by up "
            f"to {apart.max():.1f} points. {MACHINES}")
