"""lib.audit: predictions from a log's true rewards are unbiased, their errors right; a run is proven row by row."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom
from test_theory import SEED, by_theory

from lib import audit, rewards, theory
from lib.noise import LEVELS, Channel, channel, observe


@pytest.fixture
def rng(request):
    print(f"repeat this draw with THEORY_SEED={SEED}")
    return np.random.default_rng([SEED, *request.node.name.encode()])


# ---- a group with k right completions

@pytest.mark.parametrize("level", LEVELS)
def test_given_the_right_completions_averages_to_the_formulas(rng, level):
    """Averaged over k ~ Bin(G, q), every quantity given k is the formula that knows q only."""
    for std, m, G in itertools.product((True, False), (0.0, 0.37, 1.0), (2, 5, 8, 13)):
        q, a, b = rng.uniform(0.05, 0.95, size=3)
        weight = binom.pmf(np.arange(G + 1), G, q)
        found = audit.given_true(np.arange(G + 1), G, Channel(a, b, level, m), std=std)
        expected = by_theory(q, a, b, G, m, std, level)
        for name in ("silent", "spurious", "lost"):
            assert weight @ getattr(found, name) == pytest.approx(expected[name], abs=1e-10), name
        epsilon = theory.EPSILON * math.sqrt(G) if std else 1e-9  # the share that TRL's epsilon takes
        assert weight @ found.energy == pytest.approx(expected["energy"], rel=2 * epsilon, abs=1e-10)
        gap = weight @ found.right / (G * q * (1 - q))
        assert gap == pytest.approx(expected["gap"], rel=2 * epsilon, abs=1e-9), (q, a, b, G, m, std, level)


def test_given_the_right_completions_in_the_limits():
    k = np.arange(9)
    clean = audit.given_true(k, 8, Channel())
    assert clean.silent.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 1]
    assert not clean.spurious.any() and not clean.lost.any()
    by_hand = [theory.advantages(np.arange(8) < n) for n in k]
    assert clean.energy == pytest.approx([(A**2).mean() for A in by_hand])
    assert clean.right == pytest.approx([A[:n].sum() for n, A in zip(k, by_hand, strict=True)])
    coin = audit.given_true([[0, 4], [6, 8]], 8, Channel(0.5, 0.5))
    assert coin.right == pytest.approx(np.zeros((2, 2)), abs=1e-12)
    assert coin.silent == pytest.approx(np.full((2, 2), 2 / 2**8))
    flipped = audit.given_true(k, 8, Channel(1, 1, "group"))
    assert flipped.right == pytest.approx(-clean.right) and flipped.energy == pytest.approx(clean.energy)
    assert audit.given_true(3, 8, Channel(0.2, 0.2, abstain_rate=1)).silent == pytest.approx(1)


@pytest.mark.parametrize("level", LEVELS)
def test_beside_measurement_is_unbiased_and_its_standard_error_right(rng, level):
    """400 logs of prompts that differ in q: z scores have mean 0 and variance 1 (five standard errors)."""
    a, b, m = rng.uniform(0.05, 0.4, size=3)
    G, prompts, visits, z = 6, 40, 3, []
    q = rng.beta(0.7, 0.7, size=(prompts, 1, 1))
    prompt = np.repeat(np.arange(prompts), visits)
    width = {"rollout": (prompts, visits, G), "group": (prompts, visits, 1), "prompt": (prompts, 1, 1)}[level]
    for _ in range(400):
        t = (rng.random((prompts, visits, G)) < q).astype(float)
        u, withheld = rng.random(width), np.broadcast_to(rng.random(width) < m, t.shape)
        r = np.where(withheld, np.nan, np.where(t == 1, u >= b, u < a))
        found = audit.beside_measurement(t.reshape(-1, G), r.reshape(-1, G), prompt, Channel(a, b, level, m))
        z.append([(c.measured - c.predicted) / c.se if c.se else 0.0 for c in found.values()])
    z = np.array(z)
    assert np.abs(z.mean(0)).max() < 5 / math.sqrt(400)
    spread = z.std(0)[z.std(0) > 0]  # shared noise makes no spurious group: nothing to be uncertain about
    assert len(spread) == (4 if level == "rollout" else 3)
    assert np.abs(spread - 1).max() < 5 * 1.5 / math.sqrt(800), spread


def test_beside_measurement_measures_what_it_says(rng):
    t = np.array([[1, 1, 1, 1], [0, 0, 0, 1], [1, 1, 0, 0]])
    r = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
    found = audit.beside_measurement(t, r, ["x", "y", "z"], Channel(0.1, 0.2))
    A = theory.advantages(r)
    assert found["silent"].measured == pytest.approx(1 / 3) and found["spurious"].measured == pytest.approx(1 / 3)
    assert found["energy"].measured == pytest.approx((A**2).mean())
    assert found["gap"].measured == pytest.approx(A[t == 1].mean() - A[t == 0].mean())
    expected = audit.given_true([4, 1, 2], 4, Channel(0.1, 0.2))
    assert found["energy"].predicted == pytest.approx(expected.energy.mean())
    assert found["gap"].predicted == pytest.approx(expected.right.sum() * (1 / 7 + 1 / 5))
    assert math.isnan(audit.beside_measurement(t[:1], r[:1], ["x"], Channel(0.1, 0.2))["gap"].measured)


@pytest.mark.parametrize(("call", "says"), [
    (lambda: audit.given_true(9, 8, Channel(0.1, 0.1)), "k counts the right completions .* from 0 to 8"),
    (lambda: audit.given_true(1.5, 8, Channel(0.1, 0.1)), "whole numbers from 0 to 8"),
    (lambda: audit.given_true(1, 1, Channel(0.1, 0.1)), "G is the group size"),
    (lambda: audit.beside_measurement([[1]], [[1]], ["x"], Channel()), "G is the group size"),
])
def test_bad_arguments_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


# ---- the log of a run

def reward_log(chan, seed=0, steps=30, prompts=8, G=8):
    """A reward log of prompts that differ in difficulty, with the channel's own draws, and their levels."""
    rng = np.random.default_rng(seed)
    ids = np.array([f"p{i}" for i in range(steps * prompts)])
    q = rng.beta(0.7, 0.7, len(ids))
    log = pd.DataFrame({"step": np.repeat(np.arange(steps), prompts * G), "sample_id": np.repeat(ids, G),
                        "rollout": np.tile(np.arange(G), len(ids))})
    log["true_reward"] = (rng.random(len(log)) < np.repeat(q, G)).astype(int)
    log["observed_reward"] = observe(chan, log["true_reward"], seed, log["step"], log["sample_id"].tolist(),
                                           log["rollout"])
    return log, pd.Series(np.where(q > 0.5, "Level 1", "Level 2"), index=ids)


def test_signal_table_agrees_with_the_channel_and_finds_a_wrong_one():
    chan = Channel(0.3, 0.3)
    log, difficulty_of = reward_log(chan)
    table = audit.signal_table(log.sample(frac=1, random_state=0), difficulty_of, 8, chan)  # any order of rows
    z = (table["measured"] - table["predicted"]) / table["se"]
    assert len(table) == 4 * (1 + 3 + 2) and (z.abs() < 4.5).all()
    whole = table[(table["level"] == "all") & (table["third"] == "all")].set_index("quantity")
    assert (whole["groups"] == 240).all() and (whole["q"] == log["true_reward"].mean()).all()
    by_level = table[table["level"] != "all"].groupby("quantity")["groups"].sum()
    assert (by_level == 240).all() and (whole["revisits"] == 0).all()
    wrong = audit.signal_table(log, difficulty_of, 8, Channel(0.1, 0.1)).iloc[:4]
    assert ((wrong["measured"] - wrong["predicted"]).abs() > 4 * wrong["se"]).all()


# ---- realised rates

def counted_by_hand(log, here, t):
    """(completions, errors) of the rows `here` with this true reward, one row at a time."""
    rows = [(true, seen) for true, seen, is_here in zip(log["true_reward"], log["observed_reward"], here, strict=True)
            if is_here and true == t and not np.isnan(seen)]
    return len(rows), sum(seen != true for true, seen in rows)


@pytest.mark.parametrize("chan", [Channel(0.2, 0.4), Channel(0.3, 0.1, "group", 0.2), Channel()], ids=str)
def test_rates_by_part_are_counts_of_the_log(chan):
    log, difficulty_of = reward_log(chan, steps=25)
    table = audit.rates_by_part(log.sample(frac=1, random_state=0), difficulty_of)
    assert len(table) == 2 * (1 + 2 + 10) and table.columns.tolist() == audit.RATES
    parts = {("all", "all"): np.full(len(log), True)}
    levels = difficulty_of[log["sample_id"]].to_numpy()
    parts |= {("difficulty", name): levels == name for name in ("Level 1", "Level 2")}
    parts |= {("tenth", str(i + 1)): (log["step"] // 2.5 == i).to_numpy() for i in range(10)}
    for row in table.itertuples():
        expected = counted_by_hand(log, parts[row.by, row.part], int(row.rate == "false negatives"))
        assert (row.completions, row.errors) == expected
        assert row.low <= row.realised == row.errors / row.completions <= row.high
    assert table.loc[table["by"] == "tenth", "part"].drop_duplicates().tolist() == [str(i) for i in range(1, 11)]


def test_rates_of_a_mask_by_difficulty_and_of_two_runs_together():
    chan, tables = channel(mask_rate_by_difficulty="0.1,0.6"), []
    for seed in range(2):
        log, difficulty_of = reward_log(Channel(), seed)
        difficulty = rewards.difficulties(difficulty_of[log["sample_id"]])
        log["observed_reward"] = observe(chan, log["true_reward"], seed, log["step"], log["sample_id"].tolist(),
                                         log["rollout"], difficulty=difficulty)
        tables.append(audit.rates_by_part(log, difficulty_of))
    pooled = audit.pooled_rates(pd.concat(tables).assign(arm="mask"))
    of = pooled.set_index(["by", "rate", "part"]).sort_index()
    assert (of.loc[("all", "false positives"), "errors"] == 0).all()
    for part, rate in (("Level 1", 0.1), ("Level 2", 0.6)):
        found = of.loc[("difficulty", "false negatives", part)]
        assert found["low"] < rate < found["high"] and found["high"] - found["low"] < 0.12
    one, other = (table.set_index(["by", "rate", "part"])["errors"] for table in tables)
    assert of["errors"].equals((one + other).reindex(of.index))


def test_a_run_whose_rewards_are_all_withheld_has_no_rates():
    log, difficulty_of = reward_log(Channel(abstain_rate=1.0), steps=10)
    assert audit.rates_by_part(log, difficulty_of).empty


def test_signal_table_of_a_clean_run_is_exact():
    log, difficulty_of = reward_log(Channel())
    table = audit.signal_table(log, difficulty_of, 8, Channel(), std=False)
    np.testing.assert_allclose(table["measured"], table["predicted"], atol=1e-12)
    assert (table["se"] < 1e-9).all()


def test_signal_table_refuses_a_log_of_other_groups():
    log, difficulty_of = reward_log(Channel())
    with pytest.raises(ValueError, match="no whole groups of 16"):
        audit.signal_table(log, difficulty_of, 16, Channel())


# ---- a run, drawn again


@pytest.mark.parametrize("mitigation", ["none", "backward", "forward", "sgrpo"])
@pytest.mark.parametrize("chan", [Channel(0.3, 0.3), Channel(0.1, 0.1, "group", 0.3)], ids=["flip", "group"])
def test_an_honest_run_is_proven_and_one_changed_row_found(chan, mitigation):
    log, _ = reward_log(chan, seed=4, steps=6)
    correct = rewards.estimator(mitigation, 0.1, 0.1)
    returned = [correct(s.observed_reward.to_numpy(), s.sample_id) for _, s in log.groupby("step")]
    log["returned"] = np.concatenate(returned).astype(np.float32)
    log = log.sample(frac=1, random_state=0)  # any order of rows, here with an index that is no range
    assert audit.replay_run(log, chan, 4, correct).empty

    row = log.index[log.observed_reward.notna()][7]
    other_reward = log.assign(returned=log.returned.where(log.index != row, log.returned + 0.01))
    assert audit.replay_run(other_reward, chan, 4, correct).index.tolist() == [row]
    other_noise = log.assign(true_reward=log.true_reward.where(log.index != row, 1 - log.true_reward),
                             observed_reward=log.observed_reward.where(log.index != row, 1 - log.observed_reward))
    assert row in audit.replay_run(other_noise, chan, 4, correct).index
    assert len(audit.replay_run(log, chan, 5, correct)) > len(log) / 20  # another seed
