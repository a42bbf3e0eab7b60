"""Intervals, paired tests and minimum detectable effects for accuracies of shape (seeds, questions).

`acc[s, q]` is the mean over the k samples of question q in the run with training seed s, in [0, 1].
Every run answers the same test questions, so seeds and questions are *crossed*: both are resampled,
independently of each other (the pigeonhole bootstrap, Owen 2007, Annals of Applied Statistics 1:386).

Why not its plain percentile interval. With n seeds it sees (n-1)/n of the variance between seeds, takes
normal instead of t quantiles, and counts the seed x question variance three times instead of once.
What is used instead: split the bootstrap variance into a part from seeds and a part from questions,
remove those biases, and add the two t intervals in quadrature (Howe 1974, JASA 69:789):

    half-width^2 = (t_{n-1} * se_seed)^2 + (t_{Q-1} * se_question)^2

and never less than seeds that do not differ at all would give: two or three seeds can agree by luck. It is
exact where one part rules and slightly wide between. Measured coverage of the nominal 95 %, with 3 to 8 seeds:
94 to 98 % (`tests/test_stats.py`; helpers/statistics shows the percentile interval beside it). Tried and left
out: one t quantile with Satterthwaite degrees of freedom (down to 92 % where both parts matter), and a studentised
bootstrap (with 3 seeds one resample in nine repeats a single seed and has no variance).

With more than one base policy the replicate is the (base_seed, seed) pair. Runs of one base policy are
alike, so this interval is for new seeds of *these* base policies, not for new base policies.
"""
import os
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import optimize, special, stats
from statsmodels.stats.multitest import multipletests

BLOCK = 512  # bootstrap resamples at a time


class Answers(NamedTuple):
    """Graded answers counted by (decoding, run_id) and sample_id: four tables of one shape, and each question's level.

    `n` answers were given, `exact` and `symbolic` of them right; on `differ` of them the graders disagree.
    n = 0: the run was not asked that question.
    """
    n: pd.DataFrame
    exact: pd.DataFrame
    symbolic: pd.DataFrame
    differ: pd.DataFrame
    level: pd.Series


class Parts(NamedTuple):
    """Where the variance of an estimate comes from: contributions to its squared standard error.

    `rest` (seed x question and sampling) is inside `seed` already; it is the least that `seed` can be.
    """
    seed: float
    question: float
    rest: float
    seeds: int
    questions: int


class Interval(NamedTuple):
    """An estimate with its interval, and the variance parts that made it; NaN bounds where one seed says nothing."""
    estimate: float
    low: float
    high: float
    parts: Parts


class Difference(NamedTuple):
    """Noisy minus clean, as a fraction (0.1 = ten points). `dropped`: replicates without a partner."""
    estimate: float
    low: float
    high: float
    p: float
    mde: float
    parts: Parts
    dropped: int


# ---- from tables to arrays

def write_answers(path: Path, tables: Iterable[tuple[str, pd.DataFrame]], run_ids: Iterable[str], rows: int = 2**20):
    """Write eval.parquet from (run_id, table) pairs, of which about `rows` rows are held at a time: a row group.

    `run_ids`: all that will come. A table has a row an answer: sample_id, level, type, decoding, sample, exact,
    symbolic, method. The file appears when it is complete.
    """
    labels = dict.fromkeys(("sample_id", "level", "type", "decoding", "method"), "category")
    names = pd.CategoricalDtype(sorted(run_ids))  # known before the first row group fixes the file's types

    def groups() -> Iterator[pd.DataFrame]:
        held = []
        for run_id, table in tables:
            if held and sum(map(len, held)) + len(table) > rows:
                yield pd.concat(held, ignore_index=True)
                held = []
            held.append(table.assign(run_id=pd.Categorical([run_id], dtype=names).repeat(len(table))))
        yield pd.concat(held, ignore_index=True)

    part, writer = Path(path).with_suffix(".part"), None
    for group in groups():
        table = pa.Table.from_pandas(group.astype(labels | {"sample": "int8"}), preserve_index=False)
        writer = writer or pq.ParquetWriter(part, table.schema, compression="zstd")
        writer.write_table(table.cast(writer.schema))
    writer.close()
    os.replace(part, path)


def count_answers(path: Path, rows: int = 2**18) -> Answers:
    """Count the answers in eval.parquet, `rows` rows at a time: one pass for what is there, one for how often."""
    file, keys = pq.ParquetFile(path), ["decoding", "run_id", "sample_id"]

    def batches(*columns: str) -> Iterator[pd.DataFrame]:
        for batch in file.iter_batches(rows, columns=[*keys, *columns]):
            yield batch.to_pandas().astype(dict.fromkeys(keys, "category"))

    found, level = {key: set() for key in keys}, {}
    for batch in batches("level"):
        for key in keys:
            found[key].update(batch[key].unique())
        level |= batch.drop_duplicates("sample_id").set_index("sample_id")["level"].to_dict()
    axes = [pd.Index(sorted(found[key]), name=key) for key in keys]
    counts = np.zeros((4, *map(len, axes)), np.uint16)
    for batch in batches("exact", "symbolic"):
        labels = [batch[key].cat for key in keys]
        codes = [axis.get_indexer(of.categories)[of.codes] for axis, of in zip(axes, labels, strict=True)]
        cell = np.ravel_multi_index(codes, counts.shape[1:])
        exact, symbolic = batch["exact"].to_numpy(), batch["symbolic"].to_numpy()
        for table, hit in zip(counts, (slice(None), exact, symbolic, exact != symbolic), strict=True):
            np.add.at(table.reshape(-1), cell[hit], 1)
    who = pd.MultiIndex.from_product(axes[:2])
    return Answers(*(pd.DataFrame(t.reshape(len(who), -1), who, axes[2]) for t in counts),
                   pd.Series(level, name="level").rename_axis("sample_id").astype(str))


def accuracy_matrix(answers: Answers, runs: pd.DataFrame, arm: str, decoding: str = "sampled",
                    grader: str = "exact") -> pd.DataFrame:
    """Accuracies of one arm: a row a (base_seed, seed), a column a sample_id, mean over the k samples.

    `runs` is any table with run_id, arm, base_seed and seed (summary.csv).
    Raises ValueError for an unknown arm, grader or decoding, two runs with one seed, or uneven questions.
    """
    if grader not in ("exact", "symbolic"):
        raise ValueError(f"grader={grader!r}: expected 'exact' or 'symbolic'")
    chosen = runs[runs["arm"] == arm]
    if chosen.empty:
        raise ValueError(f"no run in arm {arm!r}; arms present: {sorted(runs['arm'].unique())}")
    twice = chosen[chosen.duplicated(["base_seed", "seed"], keep=False)]
    if len(twice):
        raise ValueError(f"arm {arm!r} has several runs with one (base_seed, seed): {list(twice['run_id'])}. "
                         "They differ in another parameter: keep one setting before comparing arms.")
    rows = pd.MultiIndex.from_product([[decoding], chosen["run_id"]])
    asked = answers.n.reindex(rows, fill_value=0).droplevel(0)
    missing = sorted(asked.index[~asked.any(axis=1)])
    if missing:
        raise ValueError(f"arm {arm!r}: no {decoding!r} rows in the eval table for {missing}; "
                         "run 03_eval again")
    asked = asked.loc[:, asked.any()]
    if not asked.all(axis=None):
        counts = (asked > 0).sum(axis=1).to_dict()
        raise ValueError(f"arm {arm!r}: runs answered different questions, (run: questions) {counts}; "
                         "evaluate every run on the same test split")
    table = getattr(answers, grader).loc[rows, asked.columns].droplevel(0) / asked
    table.index = pd.MultiIndex.from_frame(chosen[["base_seed", "seed"]])
    return table.sort_index()


def pair(clean: pd.DataFrame, noisy: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, int]:
    """Arrays over the (base_seed, seed) replicates that both arms have, and how many replicates were dropped.

    The questions must be the same: a partial evaluation is an error, a missing seed is only counted.
    """
    only = [] if clean.columns.equals(noisy.columns) else list(clean.columns.symmetric_difference(noisy.columns))
    if only:
        raise ValueError(f"the two arms answered different questions; {len(only)} in one arm only, "
                         f"such as {only[:3]}")
    both = clean.index.intersection(noisy.index)
    if both.empty:
        raise ValueError(f"no common seed: clean has {list(clean.index)}, the other arm {list(noisy.index)}")
    dropped = len(clean) + len(noisy) - 2 * len(both)
    return clean.loc[both].to_numpy(), noisy.loc[both, clean.columns].to_numpy(), dropped


# ---- variance: in closed form for a mean, by two-level bootstrap for other statistics

def variance_parts(acc: np.ndarray) -> Parts:
    """Parts for the mean of `acc` (seeds, questions): the limit of `bootstrap_parts` for many resamples.

    With mean squares of the two-way layout, seed = MS_seed/(nQ), rest = MS_rest/(nQ) and
    question = (MS_question - MS_rest)/(nQ), not below 0. The seed part is NaN with one seed: one run says
    nothing about other seeds.
    """
    acc = np.asarray(acc, dtype=float)
    if acc.ndim != 2 or acc.shape[1] < 2 or not np.isfinite(acc).all():
        raise ValueError(f"acc: expected a finite (seeds, questions) array with 2 questions or more, "
                         f"got shape {acc.shape}")
    n, q = acc.shape
    if n == 1:
        return Parts(np.nan, acc.var(ddof=1) / q, np.nan, 1, q)
    by_seed, by_question = acc.mean(axis=1), acc.mean(axis=0)
    rest = acc - by_seed[:, None] - by_question + acc.mean()
    rest_part = (rest**2).sum() / ((n - 1) * (q - 1) * n * q)
    return Parts(by_seed.var(ddof=1) / n, max(by_question.var(ddof=1) / q - rest_part, 0.0), rest_part, n, q)


@lru_cache(maxsize=4)
def resample_counts(seeds: int, questions: int, n_boot: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each seed (n_boot, seeds) and each question (n_boot, questions) is drawn, with replacement.

    Kept, because arms of one shape share their draws; 2 bytes a count.
    """
    rng = np.random.default_rng(seed)
    both = []
    for n in (seeds, questions):
        counts = np.empty((n_boot, n), np.min_scalar_type(n))
        for block in np.array_split(counts, -(-n_boot // BLOCK)):  # the draws of one call, without its 8 bytes a count
            block[:] = rng.multinomial(n, np.full(n, 1 / n), size=len(block))
        counts.flags.writeable = False
        both.append(counts)
    return tuple(both)


def resampled_shares(acc: np.ndarray, n_boot: int = 2000, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Shares of the distinct values of `acc` (seeds, questions) in two-level resamples, without making the resamples.

    Returns the V values, and for resampled seeds, questions, and both, the shares (n_boot, V), exact: V matrix
    products count how often each seed shows a value among the drawn questions.
    """
    values, codes = np.unique(acc, return_inverse=True)  # k samples allow k + 1 values only
    codes = codes.reshape(acc.shape)
    by_seed, by_question = resample_counts(*acc.shape, n_boot, seed)
    shares = np.empty((3, n_boot, len(values)))
    for v in range(len(values)):
        here = (codes == v).astype(np.float32)  # whole numbers, exact below 2^24 questions
        shares[0, :, v] = by_seed @ here.sum(axis=1, dtype=float)
        for start in range(0, n_boot, BLOCK):
            block = slice(start, start + BLOCK)
            count = (by_question[block].astype(np.float32) @ here.T).astype(float)
            shares[1, block, v] = count.sum(axis=1)
            shares[2, block, v] = np.einsum("bs,bs->b", count, by_seed[block])
    return values, *shares / acc.size


def bootstrap_parts(acc: np.ndarray, statistic: Callable, n_boot: int = 2000, seed: int = 0) -> Parts:
    """Parts of a statistic of the values in `acc` (seeds, questions), by two-level bootstrap.

    statistic(values (V,), shares (B, V)) -> (B,), such as `middle_mean`. Three runs of resamples (seeds only,
    questions only, both) separate the parts; n/(n-1) and Q/(Q-1) undo the bias of resampling few items.
    """
    acc = np.asarray(acc, dtype=float)
    seeds, questions = acc.shape
    if seeds < 2:
        return Parts(np.nan, np.nan, np.nan, seeds, questions)
    values, *shares = resampled_shares(acc, n_boot, seed)
    v_seed, v_question, v_both = (statistic(values, share).var() for share in shares)
    v_rest = max(v_both - v_seed - v_question, 0.0)
    f_seed, f_question = seeds / (seeds - 1), questions / (questions - 1)
    return Parts(f_seed * v_seed, max(f_question * (v_question - f_seed * v_rest), 0.0),
                 f_seed * f_question * v_rest, seeds, questions)


def middle_mean(values: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """The interquartile mean of a distribution: the mean of its middle half."""
    top = np.cumsum(shares, axis=1)
    inside = np.clip(top, 0.25, 0.75) - np.clip(top - shares, 0.25, 0.75)
    return inside @ values / 0.5


# ---- intervals, tests, effect sizes

def half_width(parts: Parts, level: float = 0.95) -> float:
    """Half-width of the interval, in units of the estimate (Howe 1974). NaN with one seed."""
    if parts.seeds < 2:
        return np.nan
    t_seed, t_question = stats.t.ppf((1 + level) / 2, [parts.seeds - 1, parts.questions - 1])
    from_seeds = max(t_seed**2 * parts.seed, t_question**2 * parts.rest)
    return float(np.sqrt(from_seeds + t_question**2 * parts.question))


def interval(estimate: float, parts: Parts, level: float = 0.95) -> Interval:
    """Estimate with its symmetric interval, not clipped to [0, 1]; bounds are NaN with one seed."""
    half = half_width(parts, level)
    return Interval(float(estimate), float(estimate - half), float(estimate + half), parts)


def mean_interval(acc: np.ndarray, level: float = 0.95) -> Interval:
    """Mean accuracy of `acc` (seeds, questions) with its interval for new seeds and new questions."""
    acc = np.asarray(acc, dtype=float)
    return interval(acc.mean(), variance_parts(acc), level)


def p_value(estimate: float, parts: Parts) -> float:
    """Two-sided p for "the true value is 0": below 1 - level exactly when the interval excludes 0."""
    if parts.seeds < 2:
        return np.nan
    if estimate == 0 or sum(parts[:3]) == 0:
        return float(estimate == 0)

    def excess(log_p: float) -> float:
        return half_width(parts, 1 - np.exp(log_p)) - abs(estimate)

    smallest = np.log(1e-12)
    return float(np.exp(optimize.brentq(excess, smallest, 0.0))) if excess(smallest) > 0 else 1e-12


def minimum_detectable_effect(parts: Parts, alpha: float = 0.05, power: float = 0.8,
                              seeds: int | None = None) -> float:
    """Smallest true difference that the two-sided test at `alpha` finds with probability `power`.

    From the noncentral t distribution with Satterthwaite degrees of freedom; `seeds` asks the same for
    another number of seeds. It rests on an estimated variance: with 3 seeds, read it as an order of size.
    """
    n = seeds or parts.seeds
    if parts.seeds < 2 or n < 2:
        return np.nan
    parts = Parts(max(parts.seed, parts.rest) * parts.seeds / n, parts.question, 0.0, n, parts.questions)
    total = parts.seed + parts.question
    if total == 0:
        return 0.0
    df = total**2 / (parts.seed**2 / (n - 1) + parts.question**2 / (parts.questions - 1))
    critical = half_width(parts, 1 - alpha) / np.sqrt(total)
    return float(special.nctdtrinc(df, 1 - power, critical) * np.sqrt(total))


def paired_difference(clean: pd.DataFrame, noisy: pd.DataFrame, level: float = 0.95) -> Difference:
    """Noisy minus clean accuracy, paired on (base_seed, seed) and question; both from `accuracy_matrix`.

    What a seed or a question does to both arms cancels before any variance is taken.
    """
    x, y, dropped = pair(clean, noisy)
    d = y - x
    parts = variance_parts(d)
    estimate, low, high, _ = interval(d.mean(), parts, level)
    return Difference(estimate, low, high, p_value(estimate, parts),
                      minimum_detectable_effect(parts, alpha=1 - level), parts, dropped)


def holm(p: np.ndarray) -> np.ndarray:
    """Holm-adjusted p values over one family of comparisons; NaN (an arm with one seed) stays NaN."""
    p = np.asarray(p, dtype=float)
    adjusted, known = np.full(p.shape, np.nan), ~np.isnan(p)
    if known.any():
        adjusted[known] = multipletests(p[known], method="holm")[1]
    return adjusted


def monotone_fall(arms: dict[float, pd.DataFrame], alpha: float = 0.05) -> tuple[bool, pd.DataFrame]:
    """(whether no later rate lies significantly above an earlier one, the rises); `arms`: rate -> `accuracy_matrix`.

    Every later rate is tested against every earlier one (paired, one-sided for a rise, Holm over all pairs).
    No significant rise is not proof of a fall: with few seeds a small rise stays unseen.
    """
    rates = sorted(arms)
    rows = []
    for i, early in enumerate(rates):
        for late in rates[i + 1:]:
            d = paired_difference(arms[early], arms[late])
            rows.append((early, late, d.estimate, d.p / 2 if d.estimate > 0 else 1 - d.p / 2))
    rises = pd.DataFrame(rows, columns=["earlier", "later", "rise", "p"])
    rises["p_holm"] = holm(rises["p"])
    return not (rises["p_holm"] < alpha).any(), rises[rises["rise"] > 0].reset_index(drop=True)


def binomial_interval(successes: int, trials: int, level: float = 0.95) -> tuple[float, float, float]:
    """(rate, low, high): exact Clopper-Pearson interval for a count of independent draws; (NaN, 0, 1) for no draw."""
    if trials == 0:
        return float("nan"), 0.0, 1.0
    low, high = stats.binomtest(int(successes), int(trials)).proportion_ci(level)
    return successes / trials, float(low), float(high)


# ---- aggregates of rliable (Agarwal et al. 2021, arXiv 2108.13264), with questions as tasks

def iqm(acc: np.ndarray, n_boot: int = 2000, level: float = 0.95, seed: int = 0) -> Interval:
    """Interquartile mean over all (seed, question) accuracies: the mean of the middle half."""
    acc = np.asarray(acc, dtype=float)
    parts = bootstrap_parts(acc, middle_mean, n_boot, seed)
    return interval(stats.trim_mean(acc, 0.25, axis=None), parts, level)


def probability_of_improvement(x: np.ndarray, y: np.ndarray, level: float = 0.95) -> Interval:
    """P(X > Y) + P(X = Y)/2 for a random run of each arm, averaged over questions; x (n, Q), y (m, Q).

    Runs of the two arms are taken as independent, which is wide when they share seeds. Degrees of freedom:
    min(n, m) - 1. The variance comes from the two sets of placements (DeLong et al. 1988). Bounds in [0, 1].
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must share their questions, got shapes {x.shape} and {y.shape}")
    ranks = stats.rankdata(np.concatenate([x, y]), axis=0)  # less the rank in its own arm: how many others lie below
    x_wins = (ranks[:len(x)] - stats.rankdata(x, axis=0)) / len(y)
    y_loses = 1 - (ranks[len(x):] - stats.rankdata(y, axis=0)) / len(x)
    of_x, of_y = variance_parts(x_wins), variance_parts(y_loses)
    parts = Parts(of_x.seed + of_y.seed, min(of_x.question, of_y.question), of_x.rest + of_y.rest,
                  min(len(x), len(y)), x.shape[1])
    found = interval(x_wins.mean(), parts, level)
    return found._replace(low=float(np.clip(found.low, 0, 1)), high=float(np.clip(found.high, 0, 1)))
