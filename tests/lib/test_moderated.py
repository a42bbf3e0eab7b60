"""lib.stats: variances of few seeds that learn from each other, and tests for no effect."""

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given, settings

from lib import stats


def drawn(seeds, contrasts, rng, sd=1.0, mean=0.0):
    """Differences (seeds, contrasts) from a normal distribution."""
    return pd.DataFrame(rng.normal(mean, sd, (seeds, contrasts)), columns=[f"c{i}" for i in range(contrasts)])


def test_one_in_twenty_true_nulls_is_rejected_whether_variances_agree_or_not():
    rng = np.random.default_rng(0)
    for spread in (None, 4):  # of the true variances: none, or chi-squared with four degrees of freedom
        rejected = []
        for _ in range(200):
            sd = 1.0 if spread is None else np.sqrt(spread / rng.chisquare(spread, 20))
            rejected.append((stats.moderated(drawn(5, 20, rng, sd))["p"] < 0.05).mean())
        assert 0.04 < np.mean(rejected) < 0.06


def test_it_finds_more_than_the_test_of_each_contrast_alone():
    rng = np.random.default_rng(1)
    ours, alone = [], []
    for _ in range(60):
        table = drawn(5, 8, rng, mean=1.2)
        ours.append((stats.moderated(table)["p"] < 0.05).mean())
        alone.append((scipy.stats.ttest_1samp(table, 0).pvalue < 0.05).mean())
    assert np.mean(ours) > np.mean(alone) + 0.1


def test_the_prior_of_made_up_variances_is_found():
    rng = np.random.default_rng(2)
    true = 3.0 * 10 / rng.chisquare(10, 20000)  # prior variance 3, worth 10 degrees of freedom
    seen = true * rng.chisquare(4, 20000) / 4
    prior = stats.variance_prior(seen, np.full(20000, 4.0))
    assert prior.variance == pytest.approx(3, rel=0.03) and prior.degrees == pytest.approx(10, rel=0.1)


@given(st.integers(2, 8), st.integers(2, 9), st.floats(0.01, 100), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_units_do_not_matter_and_each_variance_is_drawn_towards_the_prior(seeds, contrasts, unit, seed):
    table = drawn(seeds, contrasts, np.random.default_rng(seed))
    found, scaled = stats.moderated(table), stats.moderated(unit * table)
    pd.testing.assert_series_equal(found["p"], scaled["p"])
    pd.testing.assert_frame_equal(unit * found[["estimate", "low", "high"]], scaled[["estimate", "low", "high"]])
    variances = table.var(ddof=1)
    prior = stats.variance_prior(variances.to_numpy(), np.full(contrasts, seeds - 1.0)).variance
    moderated = seeds * found["standard_error"] ** 2
    between = (moderated - variances) * (moderated - prior)
    assert (between <= 1e-9).all()
    assert (found["degrees"] <= contrasts * (seeds - 1)).all()


def test_a_contrast_with_missing_runs_counts_what_it_has():
    table = drawn(5, 6, np.random.default_rng(3))
    table.loc[2:, "c0"] = np.nan
    found = stats.moderated(table)
    assert found.loc["c0", "estimate"] == pytest.approx(table["c0"].iloc[:2].mean())
    assert found.loc["c0", "standard_error"] > found.loc["c1", "standard_error"]


def test_one_contrast_has_no_others_to_learn_from():
    with pytest.raises(ValueError, match="1 contrasts have a variance"):
        stats.moderated(drawn(5, 1, np.random.default_rng(4)))


def test_no_effect_is_claimed_for_small_differences_only():
    rng = np.random.default_rng(5)
    table = drawn(8, 6, rng, sd=0.3)
    table["large"] = table["c0"] - table["c0"].mean() + 1.1
    p = stats.equivalence_p(stats.moderated(table), margin=1.0)
    assert (p.drop("large") < 0.01).all() and p["large"] > 0.3


def test_at_the_edge_of_the_margin_no_effect_is_claimed_in_one_of_twenty_cases():
    rng = np.random.default_rng(6)
    claimed = [(stats.equivalence_p(stats.moderated(drawn(5, 20, rng, 0.2, mean=1.0)), 1.0) < 0.05).mean()
               for _ in range(150)]
    assert 0.04 < np.mean(claimed) < 0.06
