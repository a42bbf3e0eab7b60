"""What a study found: graded answers become a row a policy, then a row an arm, then sentences.

The folder of a study holds `runs.csv` (a row for each planned run), `eval.parquet` (a row for each
graded answer), `summary.csv` (a row for each evaluated policy) and `results.csv` (a row for each
arm). Runs of one *arm* differ in their seed only, or in the pair (base_seed, seed).
"""

from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.stats
from scipy.sparse.csgraph import connected_components

from lib import noise, stats

GRADED = pa.schema([
    *((name, pa.string()) for name in ("decoding", "run_id", "sample_id", "level")),
    ("exact", pa.bool_()), ("symbolic", pa.bool_())])
ABOUT_A_RUN = {"run_id", "arm", "channel", "rate", "reference", "named", "status", "J"}
ALPHA = 0.05
REPLICATE = {"seed", "base_seed", "noise_seed", "output_dir", "report_to"}  # vary within an arm
NOISE = list(noise.PARAMETERS)
OF_THE_REWARD = [*NOISE, "reward", "cue"]  # parameters that the noise names an arm after
OF_AN_ARM = ["channel", "rate", "J", "setting", "reference", "named", "prompt_template"]
OF_A_DIFFERENCE = ["difference", "difference_low", "difference_high", "p", "p_holm", "mde",
                   "pairs", "dropped"]


class Answers(NamedTuple):
    """Graded answers, counted: four tables with a row a (decoding, run_id), a column a sample_id.

    Of `n` answers `exact` and `symbolic` are right; on `differ` of them the two graders disagree.
    n = 0: the run was not asked that question. `difficulty`: sample_id -> "Level 3".
    """

    n: pd.DataFrame
    exact: pd.DataFrame
    symbolic: pd.DataFrame
    differ: pd.DataFrame
    difficulty: pd.Series


class Study(NamedTuple):
    """The tables of a study, joined. An arm's name is unique: it contains the arm's setting."""

    runs: pd.DataFrame  # every planned run, with its setting
    trained: pd.DataFrame  # evaluated runs, with their parameters
    bases: pd.DataFrame  # evaluated base policies
    arms: pd.DataFrame  # arm -> parameters of its first run
    answers: Answers
    matrices: dict[str, pd.DataFrame]  # arm -> accuracies, see `accuracy_matrix`
    results: pd.DataFrame  # results.csv


# ---- answers

def count_answers(path: Path) -> Answers:
    """Count the answers in eval.parquet, one row group at a time."""
    file = pq.ParquetFile(path)
    counted = [_count_row_group(file, i) for i in range(file.num_row_groups)]
    counts, difficulties = zip(*counted, strict=True)
    counts = pd.concat(counts).groupby(level=["decoding", "run_id"]).sum()
    counts = counts.sort_index(axis=1).astype("uint16")
    difficulty = pd.concat(difficulties).groupby(level="sample_id").first()
    return Answers(*(counts[name] for name in Answers._fields[:4]), difficulty)


def _count_row_group(file: pq.ParquetFile, i: int) -> tuple[pd.DataFrame, pd.Series]:
    """Counts, a row a (decoding, run_id), and the difficulty of each sample_id, in a row group."""
    answers = file.read_row_group(i, GRADED.names).select(GRADED.names).cast(GRADED).to_pandas()
    answers["differ"] = answers["exact"] != answers["symbolic"]
    grouped = answers.groupby(["decoding", "run_id", "sample_id"])
    counts = grouped[["exact", "symbolic", "differ"]].sum()
    counts.insert(0, "n", grouped.size())
    difficulty = answers.groupby("sample_id")["level"].first()
    return counts.astype("uint16").unstack("sample_id", fill_value=0), difficulty


def accuracy_matrix(answers: Answers, runs: pd.DataFrame, arm: str, decoding: str = "sampled",
                    grader: str = "exact") -> pd.DataFrame:
    """Accuracies of one arm: a row a (base_seed, seed), a column a sample_id, mean of the samples.

    `runs` is any table with run_id, arm, base_seed and seed (summary.csv). Raises ValueError for an
    unknown arm, grader or decoding, two runs with one seed, or runs that answered other questions.
    """
    if grader not in ("exact", "symbolic"):
        raise ValueError(f"grader={grader!r}: expected 'exact' or 'symbolic'")
    chosen = runs[runs["arm"] == arm]
    if chosen.empty:
        raise ValueError(f"no run in arm {arm!r}; arms present: {sorted(runs['arm'].unique())}")
    twice = chosen[chosen.duplicated(["base_seed", "seed"], keep=False)]
    if len(twice):
        raise ValueError(f"arm {arm!r} has several runs with one (base_seed, seed): "
                         f"{list(twice['run_id'])}. They differ in another parameter: keep one "
                         "setting before comparing arms.")
    rows = pd.MultiIndex.from_product([[decoding], chosen["run_id"]])
    asked = answers.n.reindex(rows, fill_value=0).droplevel(0)
    absent = sorted(asked.index[~asked.any(axis=1)])
    if absent:
        raise ValueError(f"arm {arm!r}: no {decoding!r} rows in the eval table for {absent}; "
                         "run 03_eval again")
    asked = asked.loc[:, asked.any()]
    if not asked.all(axis=None):
        questions = (asked > 0).sum(axis=1).to_dict()
        raise ValueError(f"arm {arm!r}: runs answered different questions, (run: questions) "
                         f"{questions}; evaluate every run on the same test split")
    right = getattr(answers, grader).loc[rows, asked.columns].droplevel(0)
    table = right / asked
    table.index = pd.MultiIndex.from_frame(chosen[["base_seed", "seed"]])
    return table.sort_index()


# ---- one row an arm

def parameters(runs: pd.DataFrame) -> list[str]:
    """The parameters in `runs` that neither name the noise nor tell apart the runs of one arm."""
    apart = ABOUT_A_RUN | REPLICATE | set(OF_THE_REWARD) | {"setting"}
    return [name for name in runs if name not in apart]


def with_settings(runs: pd.DataFrame) -> pd.DataFrame:
    """`runs` with a column `setting`: what else varies between arms that the noise alone names.

    Channels that a table is older than are off in all of its runs.
    """
    runs = _with_channels(runs)
    unnamed = runs[~runs["named"]]
    varied = [c for c in parameters(runs) if unnamed[c].nunique(dropna=False) > 1]
    texts = [", ".join(f"{c}={row[c]}" for c in varied) for _, row in runs.iterrows()]
    return runs.assign(setting=np.where(runs["named"], "", texts))


def _with_channels(runs: pd.DataFrame) -> pd.DataFrame:
    """`runs` with a column for each channel and the cue. They are off where a cell is empty."""
    off = {name: named.off for name, named in noise.NAMED.items()} | {"cue": ""}
    runs = runs.assign(**{name: value for name, value in off.items() if name not in runs})
    texts = [name for name, value in off.items() if value == ""]
    return runs.assign(**{name: runs[name].astype(object).fillna("") for name in texts})


def join_parameters(runs: pd.DataFrame, summary: pd.DataFrame) -> pd.DataFrame:
    """The evaluated runs with their parameters; arm and reference carry the setting in their name.

    J is empty where the reward is not the checker's verdict: a control has no channel on it.
    """
    known = [c for c in runs if c not in summary or c == "run_id"]
    trained = summary[summary["channel"] != "base"]
    trained = trained.merge(runs[known], on="run_id", how="left", validate="1:1")
    trained["setting"] = trained["setting"].fillna("not in runs.csv")
    trained["named"] = trained["named"].eq(True)
    suffix = (" | " + trained["setting"]).where(trained["setting"] != "", "")
    trained["arm"] += suffix
    trained["reference"] += suffix
    trained.loc[trained["reward"] != "accuracy", "J"] = np.nan
    return trained


def order_arms(trained: pd.DataFrame) -> pd.DataFrame:
    """One row an arm: named arms as the study lists them, others by setting, channel and rate."""
    keys = trained.assign(noisy=trained["channel"] != "clean",
                          place=trained.index.where(trained["named"], -1))
    keys = keys.drop_duplicates("arm")
    keys = keys.sort_values(["place", "setting", "noisy", "channel", "rate"])
    return keys.drop(columns=["place", "noisy"]).set_index("arm")


def compare(arms: pd.DataFrame, matrices: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The table results.csv: accuracies, and paired differences with Holm over all of them."""
    table = pd.DataFrame([_result(about, matrices) for _, about in arms.iterrows()])
    return table.assign(p_holm=stats.holm(table["p"]))


def _result(about: pd.Series, matrices: dict[str, pd.DataFrame]) -> dict:
    """One row of `compare`; no difference where the reference has no run of the same seeds."""
    arm, reference = about.name, about["reference"]
    own, other = matrices[arm], matrices.get(reference)
    found = stats.mean_interval(own)
    low, high = np.clip([found.low, found.high], 0, 1)
    row = {"arm": arm, **about[OF_AN_ARM], "seeds": found.parts.seeds, "estimate": found.estimate,
           "low": low, "high": high, **dict.fromkeys(OF_A_DIFFERENCE, np.nan)}
    if reference == arm or other is None or other.index.intersection(own.index).empty:
        return row
    d = stats.paired_difference(other, own)
    return row | {"difference": d.estimate, "difference_low": d.low, "difference_high": d.high,
                  "p": d.p, "mde": d.mde, "pairs": d.parts.seeds, "dropped": d.dropped}


def assemble(answers: Answers, runs: pd.DataFrame, summary: pd.DataFrame, grader: str = "exact",
             decoding: str = "sampled") -> Study:
    """Join the tables of a study and compute its results."""
    runs = with_settings(runs)
    trained = join_parameters(runs, summary)
    arms = order_arms(trained)
    matrices = {arm: accuracy_matrix(answers, trained, arm, decoding, grader) for arm in arms.index}
    bases = summary[summary["channel"] == "base"]
    return Study(runs, trained, bases, arms, answers, matrices, compare(arms, matrices))


def base_accuracy(study: Study, grader: str = "exact", decoding: str = "sampled") -> float:
    """Accuracy before training, weighted by how many runs started from each base; NaN without."""
    starts = study.trained.drop_duplicates(["base_seed", "seed"])["base_seed"].value_counts()
    before = study.bases.set_index("base_seed")[f"{decoding}_{grader}"]
    starts = starts.reindex(before.index).fillna(0)
    if not starts.sum():
        return np.nan
    return float(np.average(before, weights=starts))


# ---- arms that are one

def same_arms(study: Study, single_visits: set[str]) -> list[list[str]]:
    """Groups of arms that are one noise under several names; most arms are alone.

    Noise shared by a group or by a prompt is the same in runs that meet no prompt again, which are
    named in `single_visits`. A mask and a false positive shared by a group make the very same runs.
    """
    again = study.trained.loc[~study.trained["run_id"].isin(single_visits), "arm"]
    settings = study.arms[[*OF_THE_REWARD, *parameters(study.runs)]].astype(str)
    by_prompt = (settings["noise_level"] == "prompt") & ~settings.index.isin(again)
    settings.loc[by_prompt, "noise_level"] = "group"

    accuracies = [study.matrices[arm].to_numpy().tobytes() for arm in settings.index]
    codes = pd.factorize(settings.agg(tuple, axis=1))[0], pd.factorize(np.array(accuracies))[0]
    equal = np.any([np.equal.outer(code, code) for code in codes], axis=0)
    _, group = connected_components(equal)
    return [list(names) for names in settings.groupby(group, sort=False).groups.values()]


def mean_of_names(values: pd.DataFrame, groups: list[list[str]]) -> pd.DataFrame:
    """One row a group of `same_arms`, under its first name: the mean over those in `values`."""
    first = {arm: names[0] for names in groups for arm in names}
    return values.groupby(values.index.map(first), sort=False).mean()


def losses(study: Study) -> pd.DataFrame:
    """Accuracy minus that of the reference's run of the same seed: arm x (base_seed, seed)."""
    means = pd.DataFrame({arm: matrix.mean(axis=1) for arm, matrix in study.matrices.items()}).T
    reference = study.arms["reference"]
    compared = reference[reference.isin(means.index) & (reference != reference.index)]
    found = means.loc[compared.index] - means.loc[compared].to_numpy()
    return found.dropna(how="all").dropna(axis=1, how="all")


def by_difficulty(study: Study) -> pd.DataFrame:
    """The difference of each arm from its reference on the questions of each difficulty."""
    difficulty = study.answers.difficulty
    groups = difficulty.groupby(difficulty).groups
    several = {name: questions for name, questions in groups.items() if len(questions) > 1}
    rows = []
    for row in study.results.dropna(subset="difference").itertuples():
        reference, own = study.matrices[row.reference], study.matrices[row.arm]
        for name, questions in several.items():
            d = stats.paired_difference(reference[questions], own[questions])
            rows.append((row.arm, row.reference, row.named, row.channel, row.rate, name,
                         d.estimate, d.low, d.high))
    columns = ["arm", "reference", "named", "channel", "rate", "difficulty", "difference", "low",
               "high"]
    return pd.DataFrame(rows, columns=columns)


def base_success(study: Study, grader: str = "exact") -> pd.DataFrame:
    """Success rate q of the base policies, and the number of questions, by difficulty."""
    found = pd.DataFrame({"q": [], "questions": []})
    if len(study.bases):
        bases = study.bases.assign(seed=0)
        accuracy = accuracy_matrix(study.answers, bases, "base", "sampled", grader).mean()
        grouped = accuracy.groupby(study.answers.difficulty)
        found = pd.DataFrame({"q": grouped.mean(), "questions": grouped.size()})
    return found


def step_cosines(folder: Path) -> pd.Series:
    """The cosine of a step under each arm of a study, the mean over base policies; may be empty.

    notebooks/appendix/gradient measures it, and writes gradient*/cosines.csv beside the studies.
    """
    tables = [pd.read_csv(file) for file in sorted(folder.parent.glob("gradient*/cosines.csv"))]
    if not tables:
        return pd.Series(dtype=float)
    measured = pd.concat(tables)
    here = measured[measured["study"] == folder.name]
    return here.groupby("arm")["cosine"].mean()


def pairs_of_equal_J(study: Study, distinct: list[str]) -> pd.DataFrame:
    """Paired differences of arms that share their J and differ in channel or noise level alone."""
    arms = study.results.set_index("arm").loc[distinct]
    arms = arms.join(study.arms[["noise_level", "abstain_rate"]])
    arms = arms[arms["J"].notna() & (arms["channel"] != "clean")]
    kind = [c.removesuffix(f" ({level})") for c, level in zip(arms["channel"], arms["noise_level"],
                                                              strict=True)]
    left = (arms["J"] * (1 - arms["abstain_rate"])).round(6)
    arms = arms.assign(kind=kind, left=left)
    rows = []
    for (first, a), (second, b) in combinations(arms.iterrows(), 2):
        one, other = study.matrices[first], study.matrices[second]
        have_common_seeds = not one.index.intersection(other.index).empty
        if _differ_in_kind_alone(a, b) and have_common_seeds:
            d = stats.paired_difference(one, other)
            rows.append((a["left"], first, second, d.estimate, d.low, d.high, d.p))
    columns = ["J", "first", "second", "difference", "low", "high", "p"]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(p_holm=stats.holm(table["p"]))


def _differ_in_kind_alone(a: pd.Series, b: pd.Series) -> bool:
    """Whether two arms share J and reference, and differ in either channel or noise level."""
    if a["left"] != b["left"] or a["reference"] != b["reference"]:
        return False
    return (a["kind"] != b["kind"]) != (a["noise_level"] != b["noise_level"])


def missing_runs(study: Study) -> pd.DataFrame:
    """Planned runs that are in no number, with the reason."""
    absent = study.runs[~study.runs["run_id"].isin(study.trained["run_id"])]
    reason = absent["status"].replace("done", "done, not evaluated: run 03_eval again")
    return absent[["arm", "setting", "run_id", "base_seed", "seed"]].assign(state=reason)


# ---- in words

def percent(x: float, sign: str = "") -> str:
    """A fraction in percent with one digit and a proper minus, but without a minus zero."""
    return f"{round(100 * x, 1) + 0.0:{sign}.1f}".replace("-", "−")


def p_value(p: float) -> str:
    """A p value with three digits; a smaller one is said to be smaller."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def between(x: float, low: float, high: float, sign: str = "") -> str:
    """Fractions in percent, as "81.7 (77.3 to 86.0)"; sign "+": in signed points. "" for NaN."""
    if np.isnan(x):
        return ""
    if np.isnan(low):
        return percent(x, sign)
    return f"{percent(x, sign)} ({percent(low, sign)} to {percent(high, sign)})"


def over_runs(x: pd.Series) -> str:
    """Mean over runs with its Student t interval, in percent."""
    x = x.dropna()
    if len(x) < 2:
        return between(x.mean(), np.nan, np.nan)
    half = scipy.stats.t.ppf(0.975, len(x) - 1) * x.sem()
    return between(x.mean(), x.mean() - half, x.mean() + half)


def counted(n: int, noun: str) -> str:
    """A number with its noun: "1 run", "2,048 runs"."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def listed(names: Iterable[str]) -> str:
    """Join names in words: "a", "a and b", "a, b and c"."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else str(last)


def answer(study: Study, before: float, distinct: list[str]) -> list[str]:
    """What noise did in this study: two or three sentences that follow from its results by rules.

    `before`: accuracy of the base policy. `distinct`: the arms that count, see `same_arms`.
    """
    results = study.results[study.results["arm"].isin(distinct)]
    compared = results.dropna(subset="difference")
    if compared.empty:
        best = results.loc[results["estimate"].idxmax()]
        which = "" if len(results) == 1 else f" in the best of {len(results)} arms, {best['arm']}"
        goes = "falls" if best["estimate"] < before else "rises"
        change = f"{goes} from {percent(before)} % to {percent(best['estimate'])} %"
        return ["No noisy arm is compared with a clean one here, so nothing is said about noise.",
                f"Accuracy {change}{which}."]

    first, *others = compared["reference"].unique()
    if others:
        return [_judged(compared, "their reference"), _largest_loss(compared, np.nan)]
    reference = study.results.set_index("arm").loc[first]
    if reference["channel"] != "clean":
        return [_judged(compared, first), _largest_loss(compared, np.nan)]
    clean = reference["estimate"]
    return [f"Clean training lifts accuracy from {percent(before)} % to {percent(clean)} %.",
            _tolerated(compared) or _judged(compared, first),
            _largest_loss(compared, clean - before)]


def _tolerated(compared: pd.DataFrame) -> str:
    """Up to which rate channels show no significant loss; "" where no channel has several rates."""
    limits, lowest = [], 0.0
    for channel, rows in compared[~compared["named"]].groupby("channel", sort=False):
        rows = rows.sort_values("rate")
        harmed = (rows["p_holm"] < ALPHA) & (rows["difference"] < 0)
        safe = rows[~harmed.cummax()]
        if len(rows) > 1 and len(safe):
            limits.append(f"{channel} {safe['rate'].iloc[-1]:g}")
            lowest = min(lowest, safe["difference_low"].min())
    if not limits or compared["p_holm"].isna().all():
        return ""
    return (f"No loss is significant up to {listed(limits)}; losses of {percent(-lowest)} points "
            "remain possible there.")


def _judged(compared: pd.DataFrame, reference: str) -> str:
    """How many arms end significantly below and above their reference."""
    if compared["p_holm"].isna().all():
        return "No difference can be tested, because every arm has a single seed."
    sure = compared[compared["p_holm"] < ALPHA]
    above = list(sure.loc[sure["difference"] > 0, "arm"])
    below = len(sure) - len(above)
    of_all = f"{below} of {counted(len(compared), 'different arm')}"
    return (f"Significantly below {reference}: {of_all}. "
            f"Significantly above: {listed(above or ['none'])}.")


def _largest_loss(compared: pd.DataFrame, gain: float) -> str:
    """The noise that lost most, and which share of the clean `gain` (NaN: unknown) that is."""
    is_control = compared["channel"].str.startswith(tuple(noise.CONTROLS.values()))
    if is_control.all():
        return "Only controls are compared here, and no noise."
    noisy = compared[~is_control]
    worst = noisy.loc[noisy["difference"].idxmin()]
    name, loss = worst["arm"], -worst["difference"]
    sentence = f"{name[0].upper()}{name[1:]} loses most: {percent(loss)} points"
    if not gain > 0:
        return sentence + "."
    return f"{sentence}, {100 * loss / gain:.0f} % of the gain."
