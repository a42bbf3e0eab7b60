"""Intervals, paired tests and minimum detectable effects for accuracies (seeds, questions).

`acc[s, q]` is the mean over the samples of question q in the run with training seed s, in [0, 1].
All runs answer the same questions, so seeds and questions are *crossed*, and both are resampled,
independently of each other (pigeonhole bootstrap: Owen 2007, Annals of Applied Statistics 1:386).

Its plain percentile interval is biased with few seeds: n seeds show (n-1)/n of their variance,
normal quantiles stand in for t quantiles, and the seed x question variance counts three times. So
we split the variance into a part from seeds and a part from questions, remove those biases, and
add the two t intervals in quadrature (Howe 1974, JASA 69:789):

    half-width^2 = (t_{n-1} * se_seed)^2 + (t_{Q-1} * se_question)^2

It is never narrower than if seeds did not differ at all: two or three seeds can agree by luck. The
nominal 95 % cover 94 to 98 % if seeds scatter like a Gaussian, but 77 to 86 % if one run in ten
collapses and the others agree (helpers/statistics measures both): look at the single runs too.

With several base policies the replicate is the pair (base_seed, seed), and the interval is for new
seeds of *these* base policies, not for new base policies.
"""

from collections.abc import Callable
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import optimize, special, stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

CONFIDENCE = 0.95
SMALLEST_P = 1e-12


class Parts(NamedTuple):
    """Where the variance of an estimate comes from: contributions to its squared standard error.

    `rest` (seed x question, and sampling) is contained in `seed`; it is the least `seed` can be.
    """

    seed: float
    question: float
    rest: float
    seeds: int
    questions: int


class Interval(NamedTuple):
    """An estimate, its interval and variance parts; the bounds of a single seed are NaN."""

    estimate: float
    low: float
    high: float
    parts: Parts


class Difference(NamedTuple):
    """Noisy minus clean, as a fraction (0.1 = ten points). `dropped`: runs without a partner."""

    estimate: float
    low: float
    high: float
    p: float
    mde: float
    parts: Parts
    dropped: int


# ---- variance: in closed form for a mean, by two-level bootstrap for other statistics

def variance_parts(acc: np.ndarray) -> Parts:
    """Split the variance of the mean of `acc` (seeds, questions): the limit of `bootstrap_parts`.

    From the mean squares MS of the two-way layout: seed = MS_seed/(nQ), rest = MS_rest/(nQ) and
    question = (MS_question - MS_rest)/(nQ), not below 0. One run says nothing about other seeds, so
    its seed part is NaN.
    """
    acc = np.asarray(acc, dtype=float)
    if acc.ndim != 2 or acc.shape[1] < 2 or not np.isfinite(acc).all():
        raise ValueError("acc: expected a finite (seeds, questions) array with 2 questions or "
                         f"more, got shape {acc.shape}")
    n, q = acc.shape
    if n == 1:
        return Parts(np.nan, acc.var(ddof=1) / q, np.nan, 1, q)

    by_seed, by_question = acc.mean(axis=1), acc.mean(axis=0)
    residual = acc - by_seed[:, None] - by_question + acc.mean()
    rest = (residual**2).sum() / ((n - 1) * (q - 1) * n * q)
    question = max(by_question.var(ddof=1) / q - rest, 0.0)
    return Parts(by_seed.var(ddof=1) / n, question, rest, n, q)


def bootstrap_parts(acc: np.ndarray, statistic: Callable[[np.ndarray], float], n_boot: int = 2000,
                    seed: int = 0) -> Parts:
    """Split the variance of a statistic of `acc` (seeds, questions) by two-level bootstrap.

    Resampling seeds only, questions only and both separates the parts; n/(n-1) undoes the bias of
    resampling n items.
    """
    acc = np.asarray(acc, dtype=float)
    seeds, questions = acc.shape
    if seeds < 2:
        return Parts(np.nan, np.nan, np.nan, seeds, questions)
    rng = np.random.default_rng(seed)
    drawn = np.empty((n_boot, 3))
    for row in drawn:
        some_seeds = rng.integers(seeds, size=seeds)
        some_questions = rng.integers(questions, size=questions)
        other_runs = acc[some_seeds]
        row[:] = [statistic(other_runs), statistic(acc[:, some_questions]),
                  statistic(other_runs[:, some_questions])]
    v_seed, v_question, v_both = drawn.var(axis=0)
    v_rest = max(v_both - v_seed - v_question, 0.0)

    unbias_seed, unbias_question = seeds / (seeds - 1), questions / (questions - 1)
    question = max(unbias_question * (v_question - unbias_seed * v_rest), 0.0)
    rest = unbias_seed * unbias_question * v_rest
    return Parts(unbias_seed * v_seed, question, rest, seeds, questions)


def middle_mean(acc: np.ndarray) -> float:
    """Interquartile mean: the mean of the middle half of all values (scipy's trim_mean, faster)."""
    cut = acc.size // 4
    return np.sort(acc, axis=None)[cut:acc.size - cut].mean()


# ---- intervals, tests, effect sizes

def half_width(parts: Parts, confidence: float = CONFIDENCE) -> float:
    """Half-width of the interval, in units of the estimate (Howe 1974). NaN with one seed."""
    if parts.seeds < 2:
        return np.nan
    degrees = [parts.seeds - 1, parts.questions - 1]
    t_seed, t_question = special.stdtrit(degrees, (1 + confidence) / 2)  # of Student's t
    from_seeds = max(t_seed**2 * parts.seed, t_question**2 * parts.rest)
    return float(np.sqrt(from_seeds + t_question**2 * parts.question))


def interval(estimate: float, parts: Parts, confidence: float = CONFIDENCE) -> Interval:
    """Symmetric interval around an estimate, not clipped to [0, 1]; NaN bounds with one seed."""
    half = half_width(parts, confidence)
    return Interval(float(estimate), float(estimate - half), float(estimate + half), parts)


def mean_interval(acc: np.ndarray) -> Interval:
    """Mean accuracy of `acc` (seeds, questions) with its interval for new seeds and questions."""
    acc = np.asarray(acc, dtype=float)
    return interval(acc.mean(), variance_parts(acc))


def p_value(estimate: float, parts: Parts) -> float:
    """Two-sided p for "the true value is 0": below .05 where the 95 % interval excludes 0."""
    if parts.seeds < 2:
        return np.nan
    if estimate == 0 or sum(parts[:3]) == 0:
        return float(estimate == 0)

    def excess(log_p: float) -> float:
        """How far the interval of confidence 1 - p reaches beyond 0."""
        return half_width(parts, 1 - np.exp(log_p)) - abs(estimate)

    smallest = np.log(SMALLEST_P)
    if excess(smallest) <= 0:
        return SMALLEST_P
    return float(np.exp(optimize.brentq(excess, smallest, 0.0)))


def minimum_detectable_effect(parts: Parts, alpha: float = 0.05, power: float = 0.8,
                              seeds: int | None = None) -> float:
    """Smallest true difference that the two-sided test at `alpha` finds with probability `power`.

    From the noncentral t distribution with Satterthwaite degrees of freedom. `seeds` asks the same
    for another number of seeds. The variance is itself an estimate: read it as an order of size.
    """
    n = seeds or parts.seeds
    if parts.seeds < 2 or n < 2:
        return np.nan
    from_seeds = max(parts.seed, parts.rest) * parts.seeds / n
    total = from_seeds + parts.question
    if total == 0:
        return 0.0
    degrees = total**2 / (from_seeds**2 / (n - 1) + parts.question**2 / (parts.questions - 1))
    planned = Parts(from_seeds, parts.question, 0.0, n, parts.questions)
    critical = half_width(planned, 1 - alpha) / np.sqrt(total)
    return float(special.nctdtrinc(degrees, 1 - power, critical) * np.sqrt(total))


def pair(clean: pd.DataFrame, noisy: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, int]:
    """Accuracies of the replicates (index) that both arms have, and how many runs that drops.

    The questions (columns) must be the same; a missing seed is only counted.
    """
    if not clean.columns.equals(noisy.columns):
        only = list(clean.columns.symmetric_difference(noisy.columns))
        if only:
            raise ValueError(f"the two arms answered different questions; {len(only)} in one arm "
                             f"only, such as {only[:3]}")
    both = clean.index.intersection(noisy.index)
    if both.empty:
        raise ValueError(f"no common seed: clean has {list(clean.index)}, the other arm "
                         f"{list(noisy.index)}")
    dropped = len(clean) + len(noisy) - 2 * len(both)
    return clean.loc[both].to_numpy(), noisy.loc[both, clean.columns].to_numpy(), dropped


def paired_difference(clean: pd.DataFrame, noisy: pd.DataFrame,
                      confidence: float = CONFIDENCE) -> Difference:
    """Noisy minus clean accuracy, paired on replicate and question (`report.accuracy_matrix`).

    What a seed or a question does to both arms cancels before any variance is taken.
    """
    x, y, dropped = pair(clean, noisy)
    parts = variance_parts(y - x)
    estimate, low, high, _ = interval((y - x).mean(), parts, confidence)
    mde = minimum_detectable_effect(parts, alpha=1 - confidence)
    return Difference(estimate, low, high, p_value(estimate, parts), mde, parts, dropped)


def holm(p: np.ndarray) -> np.ndarray:
    """Holm-adjusted p values of one family of comparisons; NaN (an arm with one seed) stays NaN."""
    p = np.asarray(p, dtype=float)
    known = ~np.isnan(p)
    adjusted = np.full(p.shape, np.nan)
    if known.any():
        adjusted[known] = multipletests(p[known], method="holm")[1]
    return adjusted


def binomial_interval(successes: int, trials: int) -> tuple[float, float, float]:
    """Rate of independent draws with its exact Clopper-Pearson bounds; (NaN, 0, 1) for no draw."""
    if trials == 0:
        return float("nan"), 0.0, 1.0
    low, high = proportion_confint(successes, trials, 1 - CONFIDENCE, method="beta")
    return successes / trials, float(low), float(high)


# ---- few seeds, many arms: variances that learn from each other

class Prior(NamedTuple):
    """What the variances of all contrasts have in common, worth `degrees` degrees of freedom."""

    variance: float
    degrees: float


def variance_prior(variances: np.ndarray, degrees: np.ndarray) -> Prior:
    """The prior of several variances, each estimated with its own degrees of freedom.

    The moments of their logarithms (Smyth 2004, Statistical Applications in Genetics and Molecular
    Biology 3:3, section 6.2). Variances that scatter no more than chance lets them are taken as one
    and the same: infinite degrees of freedom. ValueError if there are fewer than two above 0.
    """
    known = (variances > 0) & (degrees > 0)
    if known.sum() < 2:
        raise ValueError(f"{known.sum()} contrasts have a variance, and a prior needs two: give "
                         "each at least two seeds")
    half = degrees[known] / 2
    logs = np.log(variances[known]) - special.digamma(half) + np.log(half)
    spread = logs.var(ddof=1) - special.polygamma(1, half).mean()
    if spread <= 0:
        return Prior(float(np.exp(logs.mean())), np.inf)
    d0 = 2 * optimize.brentq(lambda x: special.polygamma(1, x) - spread, 1e-8, 1e8)
    variance = np.exp(logs.mean() + special.digamma(d0 / 2) - np.log(d0 / 2))
    return Prior(float(variance), float(d0))


def moderated(differences: pd.DataFrame) -> pd.DataFrame:
    """Mean of each contrast, its interval and p value, with a moderated variance.

    differences: seeds x contrasts, such as noisy minus clean accuracy of each seed; NaN where a run
    is missing. With five seeds a variance is a guess, and a small one makes a difference look
    certain. So each is drawn towards what all contrasts have in common, `variance_prior`, and its
    degrees of freedom grow by those of the prior (Smyth 2004, section 3). The intervals are for new
    seeds on the same questions. Columns: estimate, low, high, p, standard_error, degrees.
    """
    n = differences.notna().sum()
    degrees, variances = n - 1, differences.var(ddof=1)
    prior = variance_prior(variances.to_numpy(float), degrees.to_numpy(float))
    own = (degrees * variances).where(degrees > 0, 0.0)
    if np.isinf(prior.degrees):
        pooled = pd.Series(prior.variance, index=differences.columns)
    else:
        pooled = (prior.degrees * prior.variance + own) / (prior.degrees + degrees.clip(lower=0))
    # No more degrees of freedom than all seeds together have.
    total = (prior.degrees + degrees).clip(upper=degrees.clip(lower=0).sum())
    error = np.sqrt(pooled / n)
    estimate = differences.mean()
    half = stats.t.ppf((1 + CONFIDENCE) / 2, total) * error
    return pd.DataFrame({
        "estimate": estimate, "low": estimate - half, "high": estimate + half,
        "p": 2 * stats.t.sf((estimate / error).abs(), total),
        "standard_error": error, "degrees": total})


def equivalence_p(table: pd.DataFrame, margin: float) -> pd.Series:
    """p values of "the difference lies within ± margin", by two one-sided tests (Schuirmann 1987).

    table: what `moderated` returns. A small p value is evidence for no effect of that size, which a
    difference that is "not significant" is not.
    """
    above = stats.t.sf((table["estimate"] + margin) / table["standard_error"], table["degrees"])
    below = stats.t.sf((margin - table["estimate"]) / table["standard_error"], table["degrees"])
    return pd.Series(np.maximum(above, below), index=table.index)


# ---- which prediction orders the arms best

def rank_correlations(predicted: pd.DataFrame, measured: pd.DataFrame, n_boot: int = 2000,
                      seed: int = 0) -> pd.DataFrame:
    """Spearman's correlation of each predictor with the measured means, and their differences.

    `predicted`: arm x predictor. `measured`: the same arms x replicate, NaN where a run is missing.
    Returns estimate, low and high by predictor and by pair "a − b". The percentile intervals come
    from resampling arms *and* replicates. Arms that are the same runs must count once.
    """
    names = list(predicted)
    predicted = predicted.loc[measured.index].round(6).to_numpy()  # 1 - .3 - .3 must equal 1 - .6
    values = measured.to_numpy(float)

    def compare(arms: np.ndarray, replicates: np.ndarray) -> list[float]:
        means = np.nanmean(values[arms][:, replicates], axis=1, keepdims=True)
        ranks = stats.rankdata(np.hstack([predicted[arms], means]), axis=0)
        of_each = np.corrcoef(ranks.T)[-1, :-1]
        return [*of_each, *(a - b for a, b in combinations(of_each, 2))]

    rng = np.random.default_rng(seed)
    n, r = values.shape
    with np.errstate(invalid="ignore"):  # a resample of one arm only has no order
        drawn = [compare(rng.integers(n, size=n), rng.integers(r, size=r)) for _ in range(n_boot)]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(drawn, [tail, 1 - tail], axis=0)
    pairs = [f"{a} − {b}" for a, b in combinations(names, 2)]
    return pd.DataFrame({"estimate": compare(np.arange(n), np.arange(r)), "low": low, "high": high},
                        index=[*names, *pairs])


# ---- aggregates of rliable (Agarwal et al. 2021, arXiv 2108.13264), with questions as tasks

def iqm(acc: np.ndarray, n_boot: int = 2000, seed: int = 0) -> Interval:
    """Interquartile mean over all (seed, question) accuracies: the mean of the middle half."""
    acc = np.asarray(acc, dtype=float)
    return interval(middle_mean(acc), bootstrap_parts(acc, middle_mean, n_boot, seed))


def probability_of_improvement(x: np.ndarray, y: np.ndarray) -> Interval:
    """P(X > Y) + P(X = Y)/2 for a random run of each arm, mean over questions; x (n, Q), y (m, Q).

    Runs of the two arms count as independent, which is wide when they share seeds. The variance
    comes from the two sets of placements (DeLong et al. 1988); min(n, m) - 1 degrees of freedom.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must share their questions, got shapes {x.shape} and {y.shape}")
    ranks = stats.rankdata(np.concatenate([x, y]), axis=0)
    below_x = ranks[:len(x)] - stats.rankdata(x, axis=0)  # runs of y below each run of x
    below_y = ranks[len(x):] - stats.rankdata(y, axis=0)
    x_wins, y_loses = below_x / len(y), 1 - below_y / len(x)

    of_x, of_y = variance_parts(x_wins), variance_parts(y_loses)
    parts = Parts(of_x.seed + of_y.seed, min(of_x.question, of_y.question), of_x.rest + of_y.rest,
                  min(len(x), len(y)), x.shape[1])
    estimate, low, high, _ = interval(x_wins.mean(), parts)
    return Interval(estimate, float(np.clip(low, 0, 1)), float(np.clip(high, 0, 1)), parts)
