"""lib.noise: draws are pure functions of their key, nest across rates, are uniform and independent; replay proves."""
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lib.noise import (
    LEVELS,
    NAMED,
    PARAMETERS,
    Channel,
    channel,
    describe,
    observe,
    one_spelling,
    rates_by_difficulty,
    replay,
    uniforms,
)

levels = st.sampled_from(LEVELS)
rates = st.floats(0, 1)
seeds = st.integers(0, 2**63)
rows = st.lists(
    st.tuples(st.integers(0, 2**40), st.text(max_size=12), st.integers(0, 63), st.integers(0, 1)), min_size=1,
    max_size=30, unique_by=lambda r: r[:3])


def columns(table):
    """(step, sample_id, rollout, true reward) of a list of rows."""
    step, ids, rollout, t = zip(*table, strict=True)
    return np.array(step), list(ids), np.array(rollout), np.array(t)


def grid(steps=40, prompts=50, rollouts=8):
    """Keys of a run in which every prompt is visited at every step."""
    step, prompt, rollout = (a.ravel() for a in np.meshgrid(*map(np.arange, (steps, prompts, rollouts)), indexing="ij"))
    return step, [f"algebra/train:{i}" for i in prompt], rollout


def log_of(chan, noise_seed, true_share=0.4, **size):
    """A reward log as an honest run writes it."""
    step, ids, rollout = grid(**size)
    t = (np.random.default_rng(1).random(len(step)) < true_share).astype(np.int8)
    difficulty = np.array([int(name.split(":")[1]) % 4 for name in ids], np.int8)  # 0 to 3, and 0 is unknown
    r = observe(chan, t, noise_seed, step, ids, rollout, difficulty=difficulty).astype(np.float32)
    return pd.DataFrame({"step": step.astype(np.int32), "sample_id": ids, "rollout": rollout.astype(np.int16),
                         "true_reward": t, "observed_reward": r, "difficulty": difficulty})


# ---- a draw is a pure function of its key


@given(rows, seeds, levels, rates, rates, rates, rates)
def test_rewards_changed_at_a_low_rate_are_changed_at_every_higher_one(table, seed, level, a, b, more_a, more_b):
    step, ids, rollout, t = columns(table)
    low = observe(Channel(a, b, level), t, seed, step, ids, rollout)
    high = observe(Channel(max(a, more_a), max(b, more_b), level), t, seed, step, ids, rollout)
    assert not ((low != t) & (high == t)).any()


@given(rows, seeds, levels, rates, rates)
def test_withheld_rewards_nest_too(table, seed, level, p, q):
    step, ids, rollout, t = columns(table)
    few, many = (np.isnan(observe(Channel(noise_level=level, abstain_rate=x), t, seed, step, ids, rollout))
                 for x in sorted((p, q)))
    assert not (few & ~many).any()


@given(rows, seeds, levels, st.sampled_from(["change", "abstain"]), st.randoms())
def test_a_draw_does_not_depend_on_its_batch(table, seed, level, stream, random):
    step, ids, rollout, _ = columns(table)
    whole = uniforms(seed, level, step, ids, rollout, stream)
    order = random.sample(range(len(table)), len(table))
    permuted = uniforms(seed, level, step[order], [ids[i] for i in order], rollout[order], stream)
    alone = [uniforms(seed, level, step[i:i + 1], ids[i:i + 1], rollout[i:i + 1], stream)[0] for i in order]
    assert np.array_equal(whole[order], permuted) and np.array_equal(permuted, alone)
    assert ((0 <= whole) & (whole < 1)).all()


def test_another_process_draws_the_same():
    ids, keys = ["algebra/train:17", "Größe 7", "∫ 𝟘 🎲", ""], ([0, 1, 2**40, 3], [0, 1, 2, 7])
    code = ("import sys, json; from lib.noise import uniforms; ids, (step, rollout) = json.load(sys.stdin);"
            "print(json.dumps([uniforms(2**63, l, step, ids, rollout, s).tolist() "
            "for l in ('rollout', 'group', 'prompt') for s in ('change', 'abstain')]))")
    here = [uniforms(2**63, level, keys[0], ids, keys[1], stream).tolist()
            for level in LEVELS for stream in ("change", "abstain")]
    for hash_seed in ("0", "12345"):
        there = subprocess.run([sys.executable, "-c", code], input=json.dumps([ids, keys]), text=True, check=True,
                               capture_output=True, env=os.environ | {"PYTHONHASHSEED": hash_seed}).stdout
        assert json.loads(there) == here


def test_draws_are_those_of_the_first_release():
    """A change of the hash would make every stored log unprovable, so the numbers themselves are fixed here."""
    ids, step, rollout = ["algebra/train:17"] * 2, [3, 3], [0, 1]
    drawn = [uniforms(5, level, step, ids, rollout)[1] for level in LEVELS]
    assert drawn == [0.8774413879537769, 0.17574241092830512, 0.8836893192590882]
    assert uniforms(5, "rollout", step, ids, rollout, "abstain")[1] == 0.5034520224679799


@given(seeds, st.text(max_size=20), st.integers(0, 2**62), st.integers(0, 1000))
def test_extreme_keys_give_finite_draws_that_differ(seed, sample_id, step, rollout):
    u = uniforms(seed, "rollout", [step, step + 1, step], [sample_id] * 3, [rollout, rollout, rollout + 1])
    assert len(set(u)) == 3 and ((0 <= u) & (u < 1)).all()
    assert uniforms(seed + 1, "rollout", [step], [sample_id], [rollout])[0] != u[0]


def test_the_same_draw_for_pandas_numpy_and_lists():
    log = log_of(Channel(0.3, 0.3), 7, steps=2, prompts=3).sample(frac=1, random_state=0)  # a shuffled index
    a = uniforms(7, "rollout", log.step, log.sample_id.tolist(), log.rollout)
    b = uniforms(np.int64(7), "rollout", log.step.tolist(), tuple(log.sample_id), log.rollout.to_numpy(np.int8))
    assert np.array_equal(a, b)


def test_an_empty_batch_has_no_draws():
    assert observe(Channel(0.5, 0.5, abstain_rate=0.5), [], 0, [], [], []).shape == (0,)


# ---- who shares a draw


@given(seeds, st.sampled_from(["change", "abstain"]))
@settings(max_examples=30)
def test_levels_share_exactly_the_draws_they_should(seed, stream):
    step, ids, rollout = grid(steps=3, prompts=4, rollouts=5)
    keys = pd.DataFrame({"step": step, "sample_id": ids, "rollout": rollout})
    for level, shared in {"rollout": [*keys], "group": ["step", "sample_id"], "prompt": ["sample_id"]}.items():
        u = keys.assign(u=uniforms(seed, level, step, ids, rollout, stream))
        assert (u.groupby(shared).u.nunique() == 1).all()
        assert u.u.nunique() == len(keys[shared].drop_duplicates())


@pytest.mark.parametrize("level", LEVELS)
def test_levels_streams_and_seeds_are_independent_of_each_other(level):
    step, ids, rollout = grid(steps=50, prompts=400, rollouts=1) if level != "prompt" else grid(1, 20000, 1)
    u = uniforms(0, level, step, ids, rollout)
    others = [uniforms(0, level, step, ids, rollout, "abstain"), uniforms(1, level, step, ids, rollout),
              *(uniforms(0, other, step, ids, rollout) for other in LEVELS if other != level)]
    for other in others:
        assert abs(np.corrcoef(u, other)[0, 1]) < 5 / np.sqrt(len(u))


# ---- the distribution: keys are fixed, so these tests give the same verdict every time


@pytest.mark.parametrize("stream", ["change", "abstain"])
@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63])
def test_draws_are_uniform(seed, stream):
    u = uniforms(seed, "rollout", *grid(), stream)
    assert stats.kstest(u, "uniform").pvalue > 1e-4
    low_bits = (u * 2**53).astype(np.uint64) % np.uint64(256)
    assert stats.chisquare(np.bincount(low_bits.astype(int), minlength=256)).pvalue > 1e-4


@pytest.mark.parametrize("axis", ["step", "prompt", "rollout"])
def test_neighbours_are_uncorrelated(axis):
    u = uniforms(0, "rollout", *grid()).reshape(40, 50, 8)
    axis = ["step", "prompt", "rollout"].index(axis)
    a, b = np.delete(u, 0, axis).ravel(), np.delete(u, -1, axis).ravel()
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(len(a))
    assert abs(np.corrcoef(a < 0.1, b < 0.1)[0, 1]) < 5 / np.sqrt(len(a))  # rare changes do not cluster


def test_neighbouring_seeds_are_uncorrelated():
    u = np.array([uniforms(seed, "rollout", *grid(10, 20, 8)) for seed in range(40)])
    off = np.corrcoef(u)[np.triu_indices(40, 1)]
    assert np.abs(off).max() < 5 / np.sqrt(u.shape[1])


@pytest.mark.parametrize("chan", [
    channel(), channel(label_flip_rate=0.1), channel(label_flip_rate=0.5), channel(mask_rate=0.3),
    channel(false_positive_rate=0.2), channel(false_positive_rate=0.05, false_negative_rate=0.4),
    channel(label_flip_rate=0.2, abstain_rate=0.3), channel(label_flip_rate=0.3, noise_level="group"),
    channel(label_flip_rate=0.3, noise_level="prompt")], ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_realised_rates_are_binomial(chan, seed):
    log = log_of(chan, seed, **({"steps": 1, "prompts": 4000, "rollouts": 2} if chan.noise_level == "prompt" else {}))
    shared = {"rollout": ["rollout", "step", "sample_id"], "group": ["step", "sample_id"], "prompt": ["sample_id"]}
    for t, rate in ((0, chan.false_positive_rate), (1, chan.false_negative_rate)):
        kept = log[(log.true_reward == t) & log.observed_reward.notna()]
        first = kept.drop_duplicates(shared[chan.noise_level])  # one row a draw
        sigma = np.sqrt(rate * (1 - rate) / len(first))
        assert abs((first.observed_reward != t).mean() - rate) <= 5 * sigma
    draws = log.drop_duplicates(shared[chan.noise_level])
    sigma = np.sqrt(chan.abstain_rate * (1 - chan.abstain_rate) / len(draws))
    assert abs(draws.observed_reward.isna().mean() - chan.abstain_rate) <= 5 * sigma


# ---- channels


@given(rows, seeds, levels, rates)
def test_what_each_channel_can_and_cannot_do(table, seed, level, p):
    step, ids, rollout, t = columns(table)

    def seen(**named):
        return observe(channel(**named, noise_level=level), t, seed, step, ids, rollout)

    assert np.array_equal(seen(), t)
    assert (seen(mask_rate=p) <= t).all()  # a mask never rewards a wrong answer
    assert (seen(false_positive_rate=p) >= t).all()
    assert np.array_equal(seen(mask_rate=1), np.zeros(len(t)))
    assert np.array_equal(seen(label_flip_rate=1), 1 - t)
    assert np.array_equal(seen(mask_rate=p), seen(false_negative_rate=p))
    assert np.array_equal(seen(label_flip_rate=p), seen(false_positive_rate=p, false_negative_rate=p))
    assert np.isnan(seen(abstain_rate=1)).all()


@given(rows, seeds, levels, rates, rates)
def test_a_reward_changes_exactly_where_its_draw_is_below_its_rate(table, seed, level, a, b):
    step, ids, rollout, t = columns(table)
    u = uniforms(seed, level, step, ids, rollout)
    expected = [1 - x if v < (b if x else a) else x for x, v in zip(t, u, strict=True)]
    assert observe(Channel(a, b, level), t, seed, step, ids, rollout).tolist() == expected


@given(rows, seeds, levels, rates, rates)
def test_withholding_a_reward_does_not_redraw_the_others(table, seed, level, p, m):
    step, ids, rollout, t = columns(table)
    r = observe(channel(label_flip_rate=p, noise_level=level), t, seed, step, ids, rollout)
    some = observe(channel(label_flip_rate=p, abstain_rate=m, noise_level=level), t, seed, step, ids, rollout)
    alone = observe(channel(abstain_rate=m, noise_level=level), t, seed, step, ids, rollout)
    assert np.array_equal(np.isnan(some), np.isnan(alone))
    assert np.array_equal(some[~np.isnan(some)], r[~np.isnan(some)])


@pytest.mark.parametrize("named, a, b, J", [
    ({"label_flip_rate": 0.2}, 0.2, 0.2, 0.6), ({"mask_rate": 0.3}, 0, 0.3, 0.7),
    ({"label_flip_rate": 0.5}, 0.5, 0.5, 0),
    ({"false_positive_rate": 0.1, "false_negative_rate": 0.4}, 0.1, 0.4, 0.5), ({"label_flip_rate": 1.0}, 1, 1, -1)])
def test_the_rates_that_a_name_stands_for(named, a, b, J):
    chan = channel(**named)
    assert (chan.false_positive_rate, chan.false_negative_rate, chan.J) == (a, b, pytest.approx(J))


@pytest.mark.parametrize("named, message", [
    ({"label_flip_rate": 0.1, "mask_rate": 0.1}, "label_flip_rate and mask_rate are both set"),
    ({"mask_rate": 0.1, "false_positive_rate": 0.1}, "mask_rate and false_positive_rate are both"),
    ({"label_flip_rate": 0.1, "false_negative_rate": 0.1}, "give the combined channel as false_positive_rate and"),
    ({"label_flip_rate": 1.5}, "label_flip_rate=1.5 is not a probability"), ({"mask_rate": -0.1}, "mask_rate=-0.1"),
    ({"false_positive_rate": 2}, "false_positive_rate=2 is not"), ({"abstain_rate": -1}, "abstain_rate=-1 is not"),
    ({"false_negative_rate": float("nan")}, "false_negative_rate=nan is not"),
    ({"mask_rate": float("nan")}, "mask_rate=nan is not"),
    ({"noise_level": "token"}, "noise_level='token' is unknown: choose one of rollout, group, prompt"),
    ({"mask_rate": 0.1, "mask_rate_by_difficulty": "0.1"}, "mask_rate and mask_rate_by_difficulty are both set"),
    ({"mask_rate_by_difficulty": "0.1,1.2"}, "mask_rate_by_difficulty=1.2 is not a probability"),
    ({"mask_rate_by_difficulty": "0.1,nan"}, "mask_rate_by_difficulty=nan is not a probability"),
    ({"mask_rate_by_difficulty": "0.1,"}, "mask_rate_by_difficulty='0.1,' is no list of rates: give one for each"),
    ({"mask_rate_by_difficulty": "1:0.1"}, "such as '0.24,0.3,0.35'")])
def test_a_channel_that_makes_no_sense_is_refused(named, message):
    with pytest.raises(ValueError, match=message):
        channel(**named)


def test_a_parameter_that_names_no_channel_is_refused():
    with pytest.raises(ValueError, match="'flip_rate' names no channel: choose from label_flip_rate, mask_rate"):
        channel(flip_rate=0.1)


@pytest.mark.parametrize("parameters, arm, kind, rate", [
    ({}, "clean", "clean", 0), ({"noise_level": "group"}, "clean", "clean", 0),
    ({"label_flip_rate": 0.2}, "flip 0.2", "flip", 0.2), ({"mask_rate": 0.25}, "mask 0.25", "mask", 0.25),
    ({"false_positive_rate": 0.1}, "false positives 0.1", "false positives", 0.1),
    ({"false_negative_rate": 0.4, "noise_level": "prompt"}, "false negatives 0.4 (prompt)", "false negatives (prompt)",
     0.4),
    ({"false_positive_rate": 0.1, "false_negative_rate": 0.45}, "asymmetric (b=0.45) 0.1", "asymmetric (b=0.45)", 0.1),
    ({"label_flip_rate": 0.2, "abstain_rate": 0.5, "noise_level": "group"}, "flip 0.2 + abstain 0.5 (group)",
     "flip + abstain (group)", 0.5),
    ({"reward": "format"}, "format only", "format only", 0),
    ({"reward": "format", "noise_level": "group"}, "format only", "format only (group)", 0),
    ({"reward": "majority", "mask_rate": 0.3, "noise_level": "group"}, "majority vote + mask 0.3 (group)",
     "majority vote + mask (group)", 0.3),
    ({"reward": "integer"}, "whole numbers only", "whole numbers only", 0),
    ({"reward": "cue", "cue": "Hence"}, "cue (Hence)", "cue (Hence)", 0),
    ({"mask_rate_by_difficulty": "0.2,0.4"}, "mask by difficulty (0.2,0.4)", "mask by difficulty (0.2,0.4)", 0),
    ({"mask_rate_by_difficulty": "0.2,0.4", "noise_level": "prompt"}, "mask by difficulty (0.2,0.4) (prompt)",
     "mask by difficulty (0.2,0.4) (prompt)", 0)])
def test_the_name_of_an_arm(parameters, arm, kind, rate):
    """Folders of published runs are named after their arms, so these names are fixed."""
    off = {name: named.off for name, named in NAMED.items()}
    whole = off | {"noise_level": "rollout", "reward": "accuracy"}
    assert describe(whole | parameters) == (arm, kind, rate)


def test_every_named_channel_can_be_made_and_has_a_name_of_its_own():
    assert PARAMETERS == (*NAMED, "noise_level")
    arms = set()
    for name, named in NAMED.items():
        value = "0.25" if named.by_difficulty else 0.25
        arm, kind, rate = describe({"reward": "accuracy", "noise_level": "rollout", name: value})
        assert "0.25" in arm and channel(**{name: value}) != Channel() == channel(**{name: named.off})
        assert ("0.25" in kind, rate) == ((True, 0) if named.by_difficulty else (False, 0.25))
        arms.add(arm)
    assert len(arms) == len(NAMED)


@pytest.mark.parametrize("t, message", [([0, 1, 0.5], "0.5 in row 2"), ([np.nan, 1, 1], "nan in row 0"),
                                        ([0, -1, 1], "-1 in row 1")])
def test_a_true_reward_that_is_no_verdict_is_refused(t, message):
    with pytest.raises(ValueError, match=f"must be 0 or 1, got {message}"):
        observe(Channel(0.1, 0.1), t, 0, [0] * 3, ["a"] * 3, range(3))


# ---- rates by difficulty

rate_lists = st.lists(rates, min_size=1, max_size=5).map(tuple)


@given(rows, seeds, levels, rate_lists, st.randoms())
def test_a_mask_by_difficulty_is_the_mask_of_each_difficulty(table, seed, level, masks, random):
    """On the problems of one difficulty it changes what a mask of that rate changes; unknown ones it leaves alone."""
    step, ids, rollout, t = columns(table)
    difficulty = np.array([random.randint(0, len(masks)) for _ in ids])
    chan = Channel(false_negative_rate=masks, noise_level=level)
    seen = observe(chan, t, seed, step, ids, rollout, difficulty=difficulty)
    for number, m in enumerate((0.0, *masks)):
        alone = observe(channel(mask_rate=m, noise_level=level), t, seed, step, ids, rollout)
        assert np.array_equal(seen[difficulty == number], alone[difficulty == number])


@given(rate_lists)
def test_rates_by_difficulty_have_one_spelling(masks):
    text = ", ".join(f"{m:.20g}" for m in masks)
    once = one_spelling(text)
    assert one_spelling(once) == once and rates_by_difficulty(once) == pytest.approx(masks)
    assert channel(mask_rate_by_difficulty=text).by_difficulty


def test_zeros_and_blanks_do_not_make_another_spelling():
    assert one_spelling(" .30, 0.250,1,-0") == "0.3,0.25,1,0"


def test_a_mask_by_difficulty_has_the_rates_it_was_given_and_no_J():
    masks = (0.1, 0.4, 0.8)
    chan = channel(mask_rate_by_difficulty="0.1,0.4,0.8")
    log = log_of(chan, 0, true_share=1.0)
    for number, m in enumerate((0.0, *masks)):
        of = log[log.difficulty == number]
        sigma = np.sqrt(m * (1 - m) / len(of))
        assert abs((of.observed_reward == 0).mean() - m) <= 5 * sigma
    assert np.isnan(chan.J) and "b = 0.1,0.4,0.8 for difficulties 1, 2, ..." in str(chan)
    assert "b = 0.2, J = 0.8, one decision a rollout" in str(channel(mask_rate=0.2))


def test_a_difficulty_without_a_rate_is_refused():
    with pytest.raises(ValueError, match="a problem has difficulty 3, and rates are given for difficulties 1 to 2"):
        observe(channel(mask_rate_by_difficulty="0.1,0.2"), [1, 1, 0], 0, [0] * 3, ["a"] * 3, range(3),
                difficulty=[1, 3, 0])


def test_a_log_without_difficulties_proves_no_mask_by_difficulty():
    log = log_of(Channel(), 0, steps=2, prompts=4)
    with pytest.raises(ValueError, match=r"lacks the columns \['difficulty'\]"):
        replay(log.drop(columns="difficulty"), channel(mask_rate_by_difficulty="0.1,0.2,0.3"), 0)
    assert replay(log.drop(columns="difficulty"), Channel(), 0).empty  # as logs from before it have none


# ---- replay

BY_DIFFICULTY = channel(mask_rate_by_difficulty="0.2,0.5,0.9")
NOISY = {"flip": channel(label_flip_rate=0.2), "mask": channel(mask_rate=0.3),
         "group": channel(label_flip_rate=0.2, noise_level="group"),
         "withheld": channel(mask_rate=0.2, abstain_rate=0.3),
         "prompt": channel(false_positive_rate=0.1, false_negative_rate=0.4, noise_level="prompt"),
         "difficulty": BY_DIFFICULTY}


@pytest.mark.parametrize("name", NOISY)
def test_replay_proves_an_honest_log_in_any_order(name):
    log = log_of(NOISY[name], 3)
    assert replay(log, NOISY[name], 3).empty
    assert replay(log.sample(frac=1, random_state=0), NOISY[name], 3).empty
    assert replay(log.astype({"sample_id": "category"}), NOISY[name], 3).empty


@given(st.sampled_from(sorted(NOISY)), st.integers(0, 959), st.sampled_from(["observed", "true", "withheld"]))
@settings(max_examples=50)
def test_replay_finds_the_one_tampered_row(name, row, what):
    log = log_of(NOISY[name], 3, steps=6, prompts=20)
    seen = log.observed_reward[row]
    if what == "withheld":
        log.loc[row, "observed_reward"] = 1.0 if np.isnan(seen) else np.nan
    elif what == "observed":
        log.loc[row, "observed_reward"] = 0.0 if np.isnan(seen) else 1 - seen
    else:
        log.loc[row, "true_reward"] = 1 - log.true_reward[row]
    found = replay(log, NOISY[name], 3)
    drawn = observe(NOISY[name], log.true_reward, 3, log.step, log.sample_id.tolist(), log.rollout,
                    difficulty=log.difficulty)[row]
    honest = drawn == log.observed_reward[row] or (np.isnan(drawn) and np.isnan(log.observed_reward[row]))
    assert found.index.tolist() == ([] if honest else [row])
    assert not honest or what == "true"  # another verdict may lead to the same observed reward, never the reverse


def test_replay_refutes_other_rates_by_difficulty():
    log = log_of(BY_DIFFICULTY, 3)
    others = [channel(mask_rate_by_difficulty="0.2,0.6,0.9"), channel(mask_rate=0.5), Channel(),
              channel(mask_rate_by_difficulty="0.2,0.5,0.9", noise_level="prompt")]
    for other, seed in [(BY_DIFFICULTY, 4), *((other, 3) for other in others)]:
        assert len(replay(log, other, seed)) > len(log) / 200


@pytest.mark.parametrize("name", sorted(NOISY.keys() - {"difficulty"}))
def test_replay_refutes_a_wrong_seed_level_or_rate(name):
    chan, log = NOISY[name], log_of(NOISY[name], 3)
    a, b = chan.false_positive_rate, chan.false_negative_rate
    wrong = [(chan, 4), (Channel(a, b + 0.05, chan.noise_level, chan.abstain_rate), 3),
             (Channel(a + 0.05, b, chan.noise_level, chan.abstain_rate), 3), (Channel(), 3),
             (Channel(a, b, chan.noise_level, chan.abstain_rate + 0.1), 3),
             *((Channel(a, b, level, chan.abstain_rate), 3) for level in LEVELS if level != chan.noise_level)]
    for other, seed in wrong:
        assert len(replay(log, other, seed)) > len(log) / 200


def test_replay_refuses_a_log_that_is_none():
    log = log_of(Channel(), 0, steps=2, prompts=2)
    with pytest.raises(ValueError, match=r"lacks the columns \['observed_reward', 'step'\]"):
        replay(log.drop(columns=["step", "observed_reward"]), Channel(), 0)
    with pytest.raises(ValueError, match="3 completions are logged twice"):
        replay(pd.concat([log, log.head(3)], ignore_index=True), Channel(), 0)
    with pytest.raises(ValueError, match="must be 0 or 1, got nan in row 5"):
        replay(log.astype({"true_reward": float}).assign(true_reward=lambda x: x.true_reward.where(x.index != 5)),
               Channel(), 0)
