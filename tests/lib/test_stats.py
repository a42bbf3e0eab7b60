"""lib.stats: coverage by simulation, algebraic properties, agreement with scipy, errors for people."""
import gc

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from lib.stats import (
    Parts,
    binomial_interval,
    bootstrap_parts,
    holm,
    iqm,
    mean_interval,
    minimum_detectable_effect,
    p_value,
    paired_difference,
    probability_of_improvement,
    rank_correlations,
    variance_parts,
)


@pytest.fixture(autouse=True, scope="module")
def cheap_collection():
    """statsmodels' multipletests calls gc.collect() each time: 50 ms with torch or pandas loaded."""
    gc.freeze()
    yield
    gc.unfreeze()


def as_table(acc, seeds=None):
    """An array in the form that accuracy_matrix returns."""
    seeds = range(len(acc)) if seeds is None else seeds
    index = pd.MultiIndex.from_tuples([(0, s) for s in seeds], names=["base_seed", "seed"])
    return pd.DataFrame(acc, index=index, columns=[f"q{i}" for i in range(acc.shape[1])])


def simulate(rng, seeds, questions, sd_seed, sd_question=1.5, k=4, logit=0.8):
    """Accuracies from a logistic model: question, seed and seed x question effects, then k samples."""
    effect = (rng.normal(0, sd_seed, (seeds, 1)) + rng.normal(0, sd_question, (1, questions))
              + rng.normal(0, 0.5, (seeds, questions)))
    return rng.binomial(k, special.expit(logit + effect)) / k


def true_mean(sd_seed, sd_question=1.5, logit=0.8):
    """The mean of `simulate`, by Gauss-Hermite quadrature."""
    x, w = np.polynomial.hermite_e.hermegauss(80)
    return (special.expit(logit + np.sqrt(sd_seed**2 + sd_question**2 + 0.25) * x) * w).sum() / w.sum()


# ---- coverage

@pytest.mark.parametrize("seeds", [3, 4, 5, 8])
@pytest.mark.parametrize("sd_seed", [0.05, 0.2, 0.5], ids=["questions rule", "mixed", "seeds rule"])
def test_interval_keeps_its_coverage(seeds, sd_seed):
    """Nominal 95 %. 800 replications have a standard error of 0.8 points: allow 93-98 +- 2 of them."""
    rng, truth = np.random.default_rng(seeds), true_mean(sd_seed)
    covered = []
    for _ in range(800):
        found = mean_interval(simulate(rng, seeds, 200, sd_seed))
        covered.append(found.low <= truth <= found.high)
    assert 0.914 <= np.mean(covered) <= 0.996


@pytest.mark.parametrize("seeds", [3, 5])
def test_coverage_falls_where_one_run_in_ten_collapses(seeds):
    """What lib.stats and helpers/statistics say: far below 95 % where rare runs fall far below the rest."""
    rng, truth = np.random.default_rng(seeds), 0.9 * true_mean(0.1) + 0.1 * true_mean(0.1, logit=-2.2)
    covered = []
    for _ in range(800):
        collapsed = rng.random((seeds, 1)) < 0.1
        found = mean_interval(simulate(rng, seeds, 100, 0.1, logit=np.where(collapsed, -2.2, 0.8)))
        covered.append(found.low <= truth <= found.high)
    assert 0.77 <= np.mean(covered) <= 0.9


def test_familywise_error_under_the_null():
    """Five arms against one clean arm, nothing differs: Holm rejects anything in at most 5 % of studies."""
    rng, studies, rejected = np.random.default_rng(1), 300, 0
    for _ in range(studies):
        question = rng.normal(0, 1.5, (1, 100))
        arms = [as_table(rng.binomial(4, special.expit(0.8 + question + rng.normal(0, 0.2, (4, 1)))
                                      * np.ones((4, 100))) / 4) for _ in range(6)]
        rejected += bool((holm([paired_difference(arms[0], a).p for a in arms[1:]]) < 0.05).any())
    slack = 2.5 * np.sqrt(0.05 * 0.95 / studies)
    assert rejected / studies <= 0.05 + slack


@pytest.mark.parametrize("seeds", [3, 5])
def test_power_at_the_minimum_detectable_effect(seeds):
    """Normal data with known variance: the test at the computed effect rejects in 80 % of the cases."""
    rng, q, sd, reps = np.random.default_rng(2), 100, 0.05, 600
    parts = Parts(sd**2 / seeds, 0.0, 0.0, seeds, q)
    delta = minimum_detectable_effect(parts)
    rejected = 0
    for _ in range(reps):
        d = delta + rng.normal(0, sd, (seeds, 1)) + rng.normal(0, 1e-4, (seeds, q))
        rejected += p_value(d.mean(), variance_parts(d)) < 0.05
    assert abs(rejected / reps - 0.8) < 3.5 * np.sqrt(0.16 / reps)


# ---- properties

calm = settings(max_examples=60)
shapes = st.tuples(st.integers(2, 6), st.integers(2, 12), st.integers(0, 2**32 - 1))


def random_acc(shape):
    n, q, seed = shape
    return np.random.default_rng(seed).integers(0, 5, (n, q)) / 4


@calm
@given(shapes)
def test_interval_contains_its_estimate(shape):
    found = mean_interval(random_acc(shape))
    assert found.low <= found.estimate <= found.high


@calm
@given(shapes, st.floats(-2, 2), st.floats(0.1, 10))
def test_shift_and_scale_equivariance(shape, shift, scale):
    acc = random_acc(shape)
    base, moved = mean_interval(acc), mean_interval(shift + scale * acc)
    np.testing.assert_allclose(np.array(moved[:3]), shift + scale * np.array(base[:3]), atol=1e-6)


@calm
@given(shapes)
def test_order_of_seeds_and_questions_does_not_matter(shape):
    acc, rng = random_acc(shape), np.random.default_rng(shape[2])
    shuffled = acc[rng.permutation(len(acc))][:, rng.permutation(acc.shape[1])]
    np.testing.assert_allclose(mean_interval(acc)[:3], mean_interval(shuffled)[:3], atol=1e-12)


@calm
@given(shapes, st.floats(-0.5, 0.5))
def test_p_value_agrees_with_the_interval(shape, shift):
    acc = random_acc(shape) - 0.5 + shift
    found = mean_interval(acc)
    edge = min(abs(found.low), abs(found.high))
    if edge > 1e-9:
        assert (p_value(found.estimate, found.parts) < 0.05) == (found.low > 0 or found.high < 0)


@calm
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_monotone_and_never_below_raw(p):
    p = np.array(p)
    adjusted = holm(p)
    assert (adjusted >= p - 1e-15).all() and (adjusted <= 1).all()
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= -1e-15).all()


def test_holm_by_hand_and_with_a_gap():
    np.testing.assert_allclose(holm([0.01, np.nan, 0.04, 0.03]), [0.03, np.nan, 0.06, 0.06])


@calm
@given(st.integers(1, 60), st.data())
def test_binomial_interval_is_clopper_pearson(trials, data):
    k = data.draw(st.integers(0, trials))
    rate, low, high = binomial_interval(k, trials)
    scipys = stats.binomtest(k, trials).proportion_ci(0.95, method="exact")
    assert rate == k / trials
    assert (low, high) == pytest.approx((scipys.low, scipys.high), abs=1e-9)


def test_binomial_interval_of_no_draw_says_nothing():
    rate, low, high = binomial_interval(0, 0)
    assert np.isnan(rate) and (low, high) == (0, 1)


# ---- the closed form is the bootstrap's limit

def test_closed_form_is_the_limit_of_the_two_level_bootstrap():
    acc = simulate(np.random.default_rng(3), 4, 150, 0.0)
    exact, resampled = variance_parts(acc), bootstrap_parts(acc, np.mean, n_boot=10_000)
    assert resampled.seed == pytest.approx(exact.seed, rel=0.05)
    assert resampled.question == pytest.approx(exact.question, rel=0.05)
    assert resampled.rest == pytest.approx(exact.rest, rel=0.2)


def test_seeds_that_agree_by_luck_do_not_make_a_tiny_interval():
    """Two runs with one mean but different answers: the interval is at least that of independent answers."""
    acc = np.array([[1.0, 0.0] * 20, [0.0, 1.0] * 20])
    found = mean_interval(acc)
    assert found.parts.seed == 0
    assert found.high - found.low > 2 * 1.96 * np.sqrt(0.25 / 80)


def test_one_seed_where_only_seeds_vary_is_a_t_test():
    """Questions that all agree leave the plain one-sample t test over seeds."""
    by_seed = np.array([0.1, 0.3, 0.2, 0.05])
    acc = np.tile(by_seed[:, None], (1, 50))
    found, test = mean_interval(acc), stats.ttest_1samp(by_seed, 0)
    assert p_value(found.estimate, found.parts) == pytest.approx(test.pvalue, rel=1e-6)
    np.testing.assert_allclose(found[1:3], test.confidence_interval(0.95), rtol=1e-9)


def test_one_run_has_no_interval():
    found = mean_interval(np.array([[0.0, 1.0, 0.5]]))
    assert found.estimate == 0.5 and np.isnan(found.low) and np.isnan(found.high)
    assert np.isnan(p_value(0.5, found.parts)) and np.isnan(minimum_detectable_effect(found.parts))


def test_identical_arms_have_p_one():
    acc = as_table(simulate(np.random.default_rng(4), 3, 20, 0.2))
    same = paired_difference(acc, acc)
    assert (same.estimate, same.p, same.mde) == (0.0, 1.0, 0.0)


def test_more_seeds_find_smaller_effects():
    parts = Parts(0.02**2, 0.003**2, 0.0, 4, 500)
    effects = [minimum_detectable_effect(parts, seeds=n) for n in (3, 4, 5, 8, 16)]
    assert effects == sorted(effects, reverse=True)
    assert minimum_detectable_effect(parts) == effects[1]


def test_pairing_narrows_the_interval():
    """Questions shared by both arms cancel in the paired difference."""
    rng = np.random.default_rng(5)
    question = rng.normal(0, 2, (1, 200))
    x, y = (rng.binomial(4, special.expit(question + shift) * np.ones((4, 200))) / 4 for shift in (1.0, 0.5))
    paired = paired_difference(as_table(x), as_table(y)).parts
    apart = [variance_parts(a) for a in (x, y)]
    assert paired.question < 0.5 * sum(p.question for p in apart)


# ---- aggregates

def test_iqm_by_hand():
    acc = np.array([[0.0, 0.25, 0.5, 0.75], [0.25, 0.5, 0.75, 1.0]])
    assert iqm(acc).estimate == stats.trim_mean(acc, 0.25, axis=None) == 0.5


def test_iqm_interval_close_to_the_mean_interval_for_symmetric_scores():
    acc = np.random.default_rng(6).normal(0.5, 0.1, (4, 40)).round(2)
    robust, mean = iqm(acc), mean_interval(acc)
    assert robust.low < mean.estimate < robust.high
    assert 0.3 < (robust.high - robust.low) / (mean.high - mean.low) < 3


def test_probability_of_improvement_by_hand():
    """Question 1: x wins 3 of 4 pairs and ties 1; question 2: all ties. (3.5/4 + 1/2)/2."""
    x, y = np.array([[1.0, 0.5], [0.5, 0.5]]), np.array([[0.5, 0.5], [0.0, 0.5]])
    found = probability_of_improvement(x, y)
    assert found.estimate == pytest.approx((3.5 / 4 + 0.5) / 2)
    assert 0 <= found.low <= found.estimate <= found.high <= 1
    assert probability_of_improvement(y, x).estimate == pytest.approx(1 - found.estimate)


@calm
@given(shapes, st.integers(1, 5))
def test_probability_of_improvement_is_that_of_all_pairs(shape, m):
    n, q, seed = shape
    x, y = (np.random.default_rng([seed, r]).integers(0, 5, (r, q)) / 4 for r in (n, m))
    wins = (np.sign(x[:, None] - y[None]) + 1) / 2
    found = probability_of_improvement(x, y)
    assert found.estimate == pytest.approx(wins.mean(), abs=1e-12)
    of_x, of_y = variance_parts(wins.mean(axis=1)), variance_parts(wins.mean(axis=0))
    np.testing.assert_allclose(found.parts.seed, of_x.seed + of_y.seed, atol=1e-12)
    np.testing.assert_allclose(found.parts.rest, of_x.rest + of_y.rest, atol=1e-12)


def test_an_array_without_numbers_or_questions_is_refused():
    with pytest.raises(ValueError, match=r"finite \(seeds, questions\) array"):
        mean_interval(np.array([[np.nan, 1.0]]))
    with pytest.raises(ValueError, match=r"with 2 questions or more, got shape \(3, 1\)"):
        mean_interval(np.ones((3, 1)))


# ---- which prediction orders the arms best

def arms_of(rng, n, noise):
    """Arms whose accuracy falls with a rate, over five replicates: predictors and measured."""
    arms, truth = [f"arm {i}" for i in range(n)], np.linspace(1, 0, n)
    measured = truth[:, None] + rng.normal(0, noise, (n, 5))
    predicted = pd.DataFrame({"right": truth, "chance": rng.permutation(truth)}, index=arms)
    return predicted, pd.DataFrame(measured, index=arms)


def test_the_better_prediction_is_told_from_chance():
    predicted, measured = arms_of(np.random.default_rng(0), 15, 0.02)
    found = rank_correlations(predicted, measured, n_boot=500)
    assert list(found.index) == ["right", "chance", "right − chance"]
    assert found.loc["right", "estimate"] == pytest.approx(1)
    chance = stats.spearmanr(predicted["chance"], measured.mean(axis=1)).statistic
    assert found.loc["chance", "estimate"] == pytest.approx(chance)
    assert found.loc["right − chance", "low"] > 0


def test_two_equal_predictions_are_not_told_apart():
    predicted, measured = arms_of(np.random.default_rng(1), 8, 0.3)
    noisy = predicted.assign(chance=predicted["right"] + np.random.default_rng(2).normal(0, 0.1, 8))
    found = rank_correlations(noisy, measured, n_boot=500)
    assert found.loc["right − chance", "low"] < 0 < found.loc["right − chance", "high"]


def test_predictions_that_differ_by_rounding_are_ties():
    """1 - .3 - .3 is not .4 in floats, but these arms have one J."""
    arms = list("abc")
    measured = pd.DataFrame([[0.5, 0.6], [0.7, 0.7], [0.9, 0.8]], index=arms)
    floats, exact = ([1 - 0.3 - 0.3, 0.4, 1.0], [0.4, 0.4, 1.0])
    assert floats[0] != exact[0]
    found = rank_correlations(pd.DataFrame({"floats": floats, "exact": exact}, index=arms), measured, 50)
    assert found.loc["floats", "estimate"] == found.loc["exact", "estimate"] < 1
    assert (found.loc["floats − exact"] == 0).all()


def test_a_missing_run_leaves_the_other_runs_of_its_arm():
    predicted, measured = arms_of(np.random.default_rng(3), 6, 0.01)
    measured.iloc[2, 1] = np.nan
    assert rank_correlations(predicted, measured, 50).loc["right", "estimate"] == pytest.approx(1)
