"""lib.theory against exact enumeration (small groups), simulation (any group), limits and laws.

Settings are drawn anew on every run. A failure prints its seed: THEORY_SEED=<seed> repeats the draw.
"""

import itertools
import math
import os
import secrets
import time

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lib import rewards, theory
from lib.noise import LEVELS

SEED = int(os.environ.get("THEORY_SEED", secrets.randbelow(2**32)))
NAMES = ("gap", "energy", "silent", "unanimous_twice", "spurious", "lost", "snr")
rates = st.floats(0, 1, allow_subnormal=False)
inner = st.floats(0.01, 0.99)
sizes = st.integers(2, 40)
levels = st.sampled_from(LEVELS)


@pytest.fixture
def rng(request):
    print(f"repeat this draw with THEORY_SEED={SEED}")
    return np.random.default_rng([SEED, *request.node.name.encode()])


def by_theory(q, a, b, G, m, std, level) -> dict:
    noise = {"noise_level": level, "abstain": m}
    return {
        "gap": theory.advantage_gap(q, a, b, G, **noise, std=std),
        "energy": theory.update_energy(q, a, b, G, **noise, std=std),
        "silent": theory.groups_without_signal(q, a, b, G, **noise),
        "unanimous_twice": theory.unanimous_twice(q, a, b, G, **noise),
        "spurious": theory.spurious_groups(q, a, b, G, **noise),
        "lost": theory.lost_groups(q, a, b, G, **noise),
        "snr": theory.signal_to_noise(q, a, b, G, **noise, std=std),
    }


def advantages_by_hand(r, std):
    """Advantages of one group, written without the module under test. r: floats, NaN withheld."""
    shown = r[~np.isnan(r)]
    if len(shown) < 2:
        return np.zeros(len(r))
    A = r - shown.mean()
    if std:
        A = A / shown.std(ddof=1) if shown.std() > 1e-12 else 0 * A
    return np.nan_to_num(A)


def multinomial(counts, probabilities) -> float:
    ways = math.factorial(sum(counts)) / math.prod(math.factorial(c) for c in counts)
    return ways * math.prod(p**c for p, c in zip(probabilities, counts, strict=True))


def splits(n):
    """All ways to show n completions as (ones, zeros, withheld)."""
    return [(c, n - c - w, w) for w in range(n + 1) for c in range(n - w + 1)]


def every_group(q, a, b, G, m, level):
    """All distinguishable groups: (probability, true rewards, observed rewards), completions sorted."""
    for right in range(G + 1):
        p_right = multinomial((right, G - right), (q, 1 - q))
        t = np.repeat([1.0, 0.0], (right, G - right))
        if level == "rollout":
            for one, zero in itertools.product(splits(right), splits(G - right)):
                p = multinomial(one, ((1 - m) * (1 - b), (1 - m) * b, m))
                p *= multinomial(zero, ((1 - m) * a, (1 - m) * (1 - a), m))
                yield p_right * p, t, np.concatenate([np.repeat([1.0, 0.0, np.nan], c) for c in (one, zero)])
        else:
            yield p_right * m, t, np.full(G, np.nan)
            cuts = sorted({0.0, a, b, 1.0})
            for low, high in itertools.pairwise(cuts):
                u = (low + high) / 2
                r = np.where(t == 1, (u >= b) * 1.0, (u < a) * 1.0)
                yield p_right * (1 - m) * (high - low), t, r


def by_enumeration(q, a, b, G, m, std, level) -> dict:
    sums = np.zeros(8)
    for p, t, r in every_group(q, a, b, G, m, level):
        A = advantages_by_hand(r, std)
        silent, unanimous = not np.any(np.abs(A) > 1e-12), t.min() == t.max()
        x = (A * (t - q)).mean()
        gap = (A * t).mean() / q - (A * (1 - t)).mean() / (1 - q)
        sums += p * np.array([gap, (A**2).mean(), silent, silent and unanimous, unanimous and not silent,
                              silent and not unanimous, x, x * x])
    *values, x1, x2 = sums
    return dict(zip(NAMES, (*values, x1 / math.sqrt(x2 - x1 * x1)), strict=True))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize("m", [0.0, None])
def test_exact_enumeration(rng, level, std, m):
    for G in (2, 3, *rng.integers(4, 9, size=2)):
        q, a, b, withheld = rng.uniform(0.05, 0.95, size=4)
        setting = (q, a, b, int(G), withheld if m is None else m, std, level)
        expected, found = by_enumeration(*setting), by_theory(*setting)
        for name in NAMES:
            assert found[name] == pytest.approx(expected[name], abs=1e-10), (name, setting)


def simulate(rng, q, a, b, G, m, std, level, groups):
    """Per-batch estimates, shape (200, number of NAMES), from 200 batches of groups."""
    rows = []
    for _ in range(200):
        t = rng.random((groups // 200, G)) < q
        width = G if level == "rollout" else 1
        u = rng.random((len(t), width))
        r = np.where(t, u >= b, u < a).astype(float)
        r[np.broadcast_to(rng.random((len(t), width)) < m, r.shape)] = np.nan
        A = theory.advantages(r, std=std, eps=0.0)
        unanimous, silent = t.all(1) | ~t.any(1), ~(np.abs(A) > 1e-9).any(1)
        x = (A * t).mean(1)
        rows.append([A[t].mean() - A[~t].mean(), (A**2).mean(), silent.mean(), (silent & unanimous).mean(),
                     (unanimous & ~silent).mean(), (silent & ~unanimous).mean(), x.mean()])
    return np.array(rows)


@pytest.mark.parametrize("level", ["rollout", "group"])  # one visit at prompt level is one at group level
def test_simulation(rng, level):
    """Standard errors below 2e-3, most far below; a miss of five has probability 1e-6 a number."""
    for std, m in ((True, 0.0), (False, 0.0), (True, 0.3)):
        G = int(rng.integers(2, 33 if level == "rollout" else 7))
        q, a, b = rng.uniform(0.2, 0.8), *rng.uniform(0, 0.9, size=2)
        setting = (q, a, b, G, m, std, level)
        expected = by_theory(*setting)
        expected["snr"] = q * (1 - q) * expected["gap"]  # E[X]; enumeration tests its variance
        groups = max(16_000_000 // G, 400_000) if level == "rollout" else 4_000_000
        batches = simulate(rng, *setting, groups=groups)
        error = batches.std(0, ddof=1) / math.sqrt(len(batches))
        assert error.max() < 2e-3, (error, setting)
        for i, name in enumerate(NAMES):
            miss = abs(batches[:, i].mean() - expected[name])
            assert miss < 5 * error[i] + 2e-5, (name, miss, error[i], setting)


def test_visits_cure_group_noise_but_not_prompt_noise(rng):
    q, p, G, V, prompts = rng.uniform(0.2, 0.8), rng.uniform(0.1, 0.4), 4, 8, 40_000
    t = (rng.random((prompts, V, G)) < q).astype(float)
    for level, width in (("group", V), ("prompt", 1)):
        A = theory.advantages(np.where(rng.random((prompts, width, 1)) < p, 1 - t, t), eps=0.0)
        x = (A * t).mean(2).mean(1)
        expected = theory.signal_to_noise(q, p, p, G, noise_level=level, visits=V)
        # 5 standard errors of a ratio mean/sd, with room for a non-normal sd
        assert x.mean() / x.std() == pytest.approx(expected, abs=5 * math.sqrt((1 + expected**2) / prompts))
    endless = theory.signal_to_noise(q, p, p, G, noise_level="prompt", visits=np.inf)
    assert endless == pytest.approx((1 - 2 * p) / math.sqrt(1 - (1 - 2 * p) ** 2))
    assert theory.signal_to_noise(q, p, p, G, noise_level="group", visits=np.inf) == np.inf


def test_reference_values():
    """Numbers that the notebook quotes: gap ratios of flips and masks of equal J, SNR by group size."""
    q = np.array([0.1, 0.5, 0.9])
    clean = theory.advantage_gap(q, 0, 0, 8)
    assert theory.advantage_gap(q, 0.2, 0.2, 8) / clean == pytest.approx([0.519, 0.600, 0.519], abs=5e-4)
    assert theory.advantage_gap(q, 0, 0.4, 8) / clean == pytest.approx([0.629, 0.635, 0.479], abs=5e-4)
    G = [4, 8, 16, 32]
    assert theory.signal_to_noise(0.5, 0.4, 0.4, G) == pytest.approx([0.349, 0.537, 0.789, 1.136], abs=6e-4)
    shared = theory.signal_to_noise(0.5, 0.4, 0.4, G, noise_level="group")
    assert shared == pytest.approx([0.190, 0.202, 0.204, 0.204], abs=5e-4)


@given(q=inner, G=sizes, std=st.booleans(), level=levels)
def test_coin_flip_rewards_have_no_gap(q, G, std, level):
    assert theory.advantage_gap(q, 0.5, 0.5, G, std=std, noise_level=level) == 0
    assert theory.signal_to_noise(q, 0.5, 0.5, G, std=std, noise_level=level) == 0
    assert theory.prompt_budget(q, 0.5, 0.5, G, std=std, noise_level=level) == np.inf


@given(q=inner, G=sizes, std=st.booleans(), level=levels)
def test_no_noise(q, G, std, level):
    assert theory.spurious_groups(q, 0, 0, G, noise_level=level) == 0
    assert theory.lost_groups(q, 0, 0, G, noise_level=level) == pytest.approx(0, abs=1e-15)
    assert theory.groups_without_signal(q, 0, 0, G, noise_level=level) == pytest.approx(q**G + (1 - q) ** G)
    assert theory.prompt_budget(q, 0, 0, G, std=std, noise_level=level) == pytest.approx(1)
    assert theory.advantage_gap(q, 0, 0, G, std=False, noise_level=level) == pytest.approx((G - 1) / G)


@given(q=inner, a=rates, b=rates)
@settings(max_examples=10)
def test_large_groups_reach_the_limit(q, a, b):
    """Rollout level: sizes approach the limit like 1/G, where rewards vary enough."""
    s = theory.observed_rate(q, a, b)
    assume(0.05 < s < 0.95)
    exact = theory.youden(a, b) / np.sqrt(s * (1 - s))
    assert theory.advantage_gap(q, a, b, 1000) == pytest.approx(exact, abs=0.04)
    assert theory.update_energy(q, a, b, 1000) == pytest.approx(1, abs=4e-3)


def test_limit_in_group_size_of_shared_noise():
    for a, b in ((0.2, 0.2), (0.0, 0.4), (0.5, 0.1)):
        J = 1 - a - b
        limit = J / math.sqrt(1 - abs(a - b) - J**2)
        assert theory.signal_to_noise(0.3, a, b, 3000, noise_level="group") == pytest.approx(limit, rel=2e-3)


def test_edges_of_q_are_limits():
    """At q = 0 a lone right completion gets (1 - 1/G) sqrt(G), and no group has signal."""
    assert theory.advantage_gap(0, 0, 0, 8) == pytest.approx(7 / math.sqrt(8))
    assert theory.advantage_gap([0, 1], 0.2, 0.1, 8) == pytest.approx(
        theory.advantage_gap([1e-9, 1 - 1e-9], 0.2, 0.1, 8), rel=1e-6)
    assert np.all(theory.signal_to_noise([0, 1], 0.2, 0.1, 8) == 0)
    assert np.all(np.isnan(theory.prompt_budget([0, 1], 0.2, 0.1, 8)))
    assert theory.groups_without_signal([0, 1], 0, 0, [8, 9]) == pytest.approx([1, 1])
    assert theory.advantage_gap(0.5, 0, 0, 8, abstain=1) == 0
    assert theory.groups_without_signal(0.5, 0, 0, 8, abstain=1) == 1


@given(q=rates, a=rates, b=rates, m=rates, G=sizes, std=st.booleans(), level=levels)
def test_laws(q, a, b, m, G, std, level):
    noise = {"noise_level": level, "abstain": m}
    J = theory.youden(a, b)
    gap = theory.advantage_gap(q, a, b, G, std=std, **noise)
    if abs(J) > 1e-9 and m < 0.999:
        assert np.sign(gap) == np.sign(J)
    silent, twice = (f(q, a, b, G, **noise) for f in (theory.groups_without_signal, theory.unanimous_twice))
    spurious, lost = (f(q, a, b, G, **noise) for f in (theory.spurious_groups, theory.lost_groups))
    for share in (silent, twice, spurious, lost):
        assert 0 <= share <= 1 + 1e-12
    truly_unanimous = q**G + (1 - q) ** G
    assert spurious + twice == pytest.approx(truly_unanimous, abs=1e-12)
    assert lost + twice == pytest.approx(silent, abs=1e-12)
    assert spurious + lost <= 1 + 1e-12
    energy = theory.update_energy(q, a, b, G, std=std, **noise)
    assert 0 <= energy <= (1 if std else 0.25) * (G - 1) / G + 1e-12
    # the gap is one direction among others, so it cannot hold more than all of the energy
    assert q * (1 - q) * gap**2 <= energy + 1e-9


@given(q=rates, p=rates, G=sizes, std=st.booleans(), level=levels)
def test_flips_mirror_and_masks_never_reverse(q, p, G, std, level):
    gap = theory.advantage_gap(q, p, p, G, std=std, noise_level=level)
    assert gap == pytest.approx(-theory.advantage_gap(q, 1 - p, 1 - p, G, std=std, noise_level=level), abs=1e-9)
    assert theory.advantage_gap(q, 0, p, G, std=std, noise_level=level) >= 0
    assert theory.groups_without_signal(q, p, p, G) <= theory.groups_without_signal(q, 0, 0, G) + 1e-12


@given(q=inner, p=st.floats(0.01, 0.49), G=st.integers(4, 32))
def test_where_flips_and_masks_of_equal_J_part(q, p, G):
    """With std, a mask at 2p has the larger gap exactly where q < (1 + J) / (4 J), for every G >= 4."""
    J = 1 - 2 * p
    assume(abs(q - (1 + J) / (4 * J)) > 1e-3)
    mask, flip = theory.advantage_gap(q, 0, 2 * p, G), theory.advantage_gap(q, p, p, G)
    assert (mask > flip) == (q < (1 + J) / (4 * J))
    small = [theory.advantage_gap(q, a, b, [2, 3], std=True) for a, b in ((0, 2 * p), (p, p))]
    assert small[0] == pytest.approx(small[1])  # groups of 2 and 3 have one sd only: std changes nothing


def test_prompt_budget_is_the_ratio_of_squared_snr():
    clean, noisy = (theory.signal_to_noise(0.3, p, p, 8) for p in (0, 0.2))
    budget = theory.prompt_budget(0.3, 0.2, 0.2, 8)
    assert budget == pytest.approx((clean / noisy) ** 2) and budget > 1
    assert noisy * math.sqrt(budget) == pytest.approx(clean)  # n prompts: sqrt(n) times the SNR
    assert theory.prompt_budget(0.3, 0.7, 0.7, 8) == np.inf


def test_broadcasting_and_speed():
    q = np.linspace(0, 1, 100)[:, None, None]
    p = np.linspace(0, 1, 100)[:, None]
    G = np.unique(np.linspace(2, 64, 20).astype(int))
    for f in (theory.advantage_gap, theory.update_energy, theory.signal_to_noise, theory.prompt_budget,
              theory.groups_without_signal, theory.spurious_groups, theory.lost_groups):
        start = time.process_time()
        grid = f(q, p, p, G)
        assert time.process_time() - start < 1, f.__name__
        assert grid.shape == (100, 100, 20)
        one = f(q[40, 0, 0], p[7, 0], p[7, 0], G[11])
        assert np.ndim(one) == 0 and one == pytest.approx(grid[40, 7, 11], rel=1e-12)


@pytest.mark.parametrize("std", [True, False])
def test_advantages_are_trl_s(rng, std):
    torch = pytest.importorskip("torch")
    nanstd = pytest.importorskip("trl.trainer.utils").nanstd
    r = rng.integers(0, 2, size=(500, 8)).astype(float)
    r[rng.random(r.shape) < 0.6] = np.nan  # groups with none, one and several rewards shown
    rewards = torch.tensor(r)
    expected = rewards - rewards.nanmean(1, keepdim=True)
    if std:
        expected = expected / (nanstd(rewards, dim=1, keepdim=True) + 1e-4)
    # 1e-6, because TRL computes the factor n / (n-1) in float32
    assert theory.advantages(r, std=std) == pytest.approx(expected.nan_to_num(nan=0.0).numpy(), abs=1e-6)
    one_shown = rewards[(~rewards.isnan()).sum(1) == 1]
    assert len(one_shown) and nanstd(one_shown, dim=1).isnan().all()  # so not in frac_reward_zero_std


@given(a=rates, b=rates, k=st.integers(0, 8), data=st.data())
def test_affine_corrections(a, b, k, data):
    """Backward correction divides mean-only advantages by J; std advantages only take the sign of J."""
    J = theory.youden(a, b)
    assume(abs(J) > 1e-3)
    r = np.array(data.draw(st.permutations([1.0] * k + [0.0] * (8 - k))))
    back, forth = rewards.backward_correction(r, a, b), rewards.forward_correction(r, b)
    plain, mean_only = theory.advantages(r, eps=0.0), theory.advantages(r, std=False)
    if 0 < k < 8:  # rounding leaves unanimous groups an sd of about 1e-16 / J: harmless only with the epsilon
        assert theory.advantages(back, eps=0.0) == pytest.approx(np.sign(J) * plain, abs=1e-9)
        assert theory.advantages(forth, eps=0.0) == pytest.approx(plain, abs=1e-9)
    assert theory.advantages(back, std=False) == pytest.approx(mean_only / J, abs=1e-9)
    assert theory.advantages(forth, std=False) == pytest.approx(mean_only, abs=1e-9)
    with_eps = theory.advantages(back) - np.sign(J) * theory.advantages(r)
    assert np.abs(with_eps).max() <= theory.EPSILON * math.sqrt(8) * np.abs(plain).max() + 1e-9
    # E[correction | t] from the channel itself
    assert rewards.backward_correction([0, 1], a, b) @ [b, 1 - b] == pytest.approx(1, abs=1e-9)
    assert rewards.backward_correction([0, 1], a, b) @ [1 - a, a] == pytest.approx(0, abs=1e-9)
    assert rewards.forward_correction([0, 1], b) @ [b, 1 - b] == pytest.approx(0, abs=1e-9)
    assert rewards.forward_correction([0, 1], b) @ [1 - a, a] == pytest.approx(-J, abs=1e-9)


def test_sgrpo_weight():
    r, p = np.linspace(0, 1, 9), 0.2
    w = rewards.sgrpo_weight(r, p)
    assert np.all((w >= 0) & (w <= 1)) and np.all(w[(r <= p) | (r >= 1 - p)] == 0)
    assert rewards.sgrpo_weight(r[1:-1], 0.0) == pytest.approx(1)  # no noise: plain GRPO
    q = 0.3  # at the observed mean that flips of rate p make of q, w* is the correlation of r and t
    s = theory.observed_rate(q, p, p)
    covariance = (1 - p) * q - q * s
    assert rewards.sgrpo_weight(s, p) == pytest.approx(covariance / math.sqrt(q * (1 - q) * s * (1 - s)))


@pytest.mark.parametrize(("call", "says"), [
    (lambda: theory.advantage_gap(1.2, 0, 0, 8), "q is a probability"),
    (lambda: theory.advantage_gap(0.5, -0.1, 0, 8), "a is a probability"),
    (lambda: theory.update_energy(0.5, 0, [0.1, np.nan], 8), "b is a probability"),
    (lambda: theory.groups_without_signal(0.5, 0, 0, 8, abstain=2), "abstain is a probability"),
    (lambda: theory.lost_groups(0.5, 0, 0, 1), "G is the group size.*at least 2"),
    (lambda: theory.lost_groups(0.5, 0, 0, np.inf), "G is the group size.*whole numbers"),
    (lambda: theory.spurious_groups(0.5, 0, 0, 4.5), "G is the group size.*whole numbers"),
    (lambda: theory.signal_to_noise(0.5, 0, 0, 8, noise_level="token"), "level is 'token': choose one of"),
    (lambda: theory.signal_to_noise(0.5, 0, 0, 8, visits=0), "visits .* at least 1"),
    (lambda: theory.prompt_budget(0.5, 0, 1.1, 8), "b is a probability"),
    (lambda: rewards.backward_correction(1, 0.3, 0.7), "J = 1 - a - b.*choose"),
    (lambda: rewards.sgrpo_weight(0.5, 0.5), "choose p below 0.5"),
])
def test_bad_arguments_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
