"""What noise in a binary reward does to GRPO's advantages: exact formulas for one group.

The setting of every function: G completions of one prompt have independent true rewards t_i, each
1 with probability q. The channel shows r_i, with false-positive rate a = P(r=1 | t=0) and
false-negative rate b = P(r=0 | t=1). J = 1-a-b is Youden's index, and s = a + J q is P(r=1).

With ``std`` the advantage is A_i = (r_i - mean r) / sd r, with the Bessel-corrected sd of the group
(GRPO, arXiv 2402.03300). TRL adds 1e-4 to the sd, which shrinks advantages by a share of less than
1e-4 sqrt(G). Without ``std`` A_i = r_i - mean r (Dr. GRPO, arXiv 2503.20783).

``noise_level`` says who shares a draw u. At "rollout" each completion has its own. At "group" all
completions of a prompt visit share one: t=0 changes if u < a, and t=1 if u < b. "prompt" is like
"group", with the same u on every visit. ``abstain`` = m withholds a reward with probability m, at
the same noise level: that completion gets advantage 0, and mean and sd come from the others.

Arguments are scalars or arrays and broadcast together. q, a, b, abstain: probabilities. G: whole
number >= 2. Results are float64 of the broadcast shape. A ValueError names a bad argument.
notebooks/helpers/theory.ipynb derives the formulas and checks them by simulation.
"""

from typing import NamedTuple

import numpy as np
from numpy import ndarray
from numpy.typing import ArrayLike as Array
from scipy.special import gammaln, xlog1py, xlogy

from lib.noise import LEVELS

EPSILON = 1e-4  # what TRL adds to the standard deviation of a group


def group_size(G: Array) -> ndarray:
    """G as a float array; ValueError if it is no group size."""
    size = np.asarray(G, dtype=float)
    if not np.all((size >= 2) & (size == np.floor(size)) & np.isfinite(size)):
        raise ValueError(f"G is the group size: whole numbers of at least 2, not {G!r}.")
    return size


def _rate(name: str, value: Array) -> ndarray:
    rate = np.asarray(value, dtype=float)
    if not np.all((rate >= 0) & (rate <= 1)):
        raise ValueError(f"{name} is a probability: give values from 0 to 1, not {value!r}.")
    return rate


def _inputs(q, a, b, G, abstain=0.0, noise_level="rollout") -> list[ndarray]:
    """Check the arguments; return all but noise_level as float arrays, not yet broadcast."""
    if noise_level not in LEVELS:
        raise ValueError(f"noise_level is {noise_level!r}: choose one of {', '.join(LEVELS)}.")
    return [_rate("q", q), _rate("a", a), _rate("b", b), group_size(G), _rate("abstain", abstain)]


def youden(a: Array, b: Array) -> ndarray:
    """Youden's index J = 1 - a - b: 1 without noise, 0 if r says nothing of t, else it misleads."""
    return 1.0 - (_rate("a", a) + _rate("b", b))  # in this order J is exactly 0 when a + b is 1


def observed_rate(q: Array, a: Array, b: Array) -> ndarray:
    """P(r = 1) = s = a + J q."""
    q, a, b = _rate("q", q), _rate("a", a), _rate("b", b)
    return np.clip(a * (1 - q) + (1 - b) * q, 0.0, 1.0)


class Sums(NamedTuple):
    """Expectations over the rewards that a group can show, each divided by s (1-s).

    Of n rewards shown, k are 1 with advantage A+, the others 0 with advantage A-. All moments are
    made of the expectations of B = k A+ / G, B^2, k (A+/G)^2 and (n-k) (A-/G)^2, in this order.
    """

    pull: ndarray
    pull_squared: ndarray
    ones: ndarray
    zeros: ndarray


def _sums(s, G, m, std: bool) -> Sums:
    """`Sums` for success rates s, group sizes G and withheld shares m, broadcast."""
    s, G, m = np.broadcast_arrays(s, G, m)
    sums = np.zeros((4, *s.shape))
    for size in np.unique(G):
        here = G == size
        sums[:, here] = _sums_of_one_size(s[here], m[here], int(size), std)
    return Sums(*sums)


def _sums_of_one_size(s, m, G: int, std: bool) -> ndarray:
    """The four sums over n rewards shown, of which k are 1; shape (4, number of s).

    The factor 1/(s (1-s)) goes into the binomial probability, C(n,k) s^(k-1) (1-s)^(n-k-1), so that
    s = 0 and s = 1 do not give 0/0.
    """
    sums = np.zeros((4, len(s)))
    fewest = 2 if m.any() else G  # all rewards are shown if none is withheld
    for n in range(fewest, G + 1):
        log_shown = _log_binomial(G, n) + xlogy(G - n, m) + xlog1py(n, -m)
        for k in range(1, n):
            log_ones = _log_binomial(n, k) + xlogy(k - 1, s) + xlog1py(n - k - 1, -s)
            sums += np.exp(log_shown + log_ones) * _terms(k, n, G, std)[:, None]
    return sums


def _terms(k: int, n: int, G: int, std: bool) -> ndarray:
    """What `Sums` averages, for a group of G with n rewards shown, of which k are 1."""
    scale = np.sqrt(k * (n - k) / (n * (n - 1))) if std else 1.0
    of_one, of_zero = (1 - k / n) / scale / G, k / n / scale / G  # A+ / G and -A- / G
    pull = k * of_one
    return np.array([pull, pull**2, k * of_one**2, (n - k) * of_zero**2])


def _log_binomial(n: int, k: int) -> float:
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)


def _shared_sign(a, b, m) -> tuple[ndarray, ndarray]:
    """Mean and mean square of c: noise shared by a group turns its clean advantages A into c A.

    u < min(a, b) changes every reward: c = -1. Between a and b all become equal: c = 0. Else c = 1.
    """
    return (1 - m) * youden(a, b), (1 - m) * (1 - np.abs(a - b))


def advantage_gap(q: Array, a: Array, b: Array, G: Array, *, std: bool = True,
                  noise_level: str = "rollout", abstain: Array = 0.0) -> ndarray:
    """Delta = E[A | t=1] - E[A | t=0], in units of the advantage: what a right answer is worth.

    Without std it is J (G-1)/G. With std it is J Phi / (s (1-s)), and J / sqrt(s (1-s)) as G grows.
    Its sign is J's. At q = 0 (1) it is the limit: what a lone right (wrong) completion would get.
    """
    q, a, b, G, m = _inputs(q, a, b, G, abstain, noise_level)
    if noise_level == "rollout":
        factor, sums = youden(a, b), _sums(observed_rate(q, a, b), G, m, std)
    else:
        (factor, _), sums = _shared_sign(a, b, m), _sums(q, G, 0.0, std)
    return factor * sums.pull


def update_energy(q: Array, a: Array, b: Array, G: Array, *, std: bool = True,
                  noise_level: str = "rollout", abstain: Array = 0.0) -> ndarray:
    """E[A^2], the mean squared advantage of a completion: how hard the update pushes, also wrongly.

    Rollout level: (G-1)/G (1-P0) with std, s (1-s) (G-1)/G without.
    """
    q, a, b, G, m = _inputs(q, a, b, G, abstain, noise_level)
    if noise_level == "rollout":
        return _energy(observed_rate(q, a, b), G, m, std)
    _, squared_sign = _shared_sign(a, b, m)
    return squared_sign * _energy(q, G, 0.0, std)


def _energy(s, G, m, std: bool) -> ndarray:
    """E[A^2] where rewards are 1 with probability s and each is withheld with probability m."""
    sums = _sums(s, G, m, std)
    return G * s * (1 - s) * (sums.ones + sums.zeros)


def _silent(s, G, m) -> ndarray:
    """P(all rewards shown are equal, or none is shown); one reward alone counts as equal."""
    no_zero, no_one = (m + (1 - m) * s) ** G, (m + (1 - m) * (1 - s)) ** G
    return np.clip(no_zero + no_one - m**G, 0.0, 1.0)


def groups_without_signal(q: Array, a: Array, b: Array, G: Array, *, noise_level: str = "rollout",
                          abstain: Array = 0.0) -> ndarray:
    """P0 = P(every advantage of a group is 0). Rollout level: s^G + (1-s)^G.

    TRL logs it as ``frac_reward_zero_std``, but leaves out groups with fewer than two rewards
    shown: their sd is NaN, not 0.
    """
    q, a, b, G, m = _inputs(q, a, b, G, abstain, noise_level)
    if noise_level == "rollout":
        return _silent(observed_rate(q, a, b), G, m)
    _, squared_sign = _shared_sign(a, b, m)
    return 1 - squared_sign * (1 - _silent(q, G, 0.0))


def unanimous_twice(q: Array, a: Array, b: Array, G: Array, *, noise_level: str = "rollout",
                    abstain: Array = 0.0) -> ndarray:
    """U = P(true rewards unanimous, and no signal observed).

    Rollout level: q^G [(1-b)^G + b^G] + (1-q)^G [a^G + (1-a)^G]. Shared noise changes none of them.
    """
    q, a, b, G, m = _inputs(q, a, b, G, abstain, noise_level)
    if noise_level != "rollout":
        a, b, m = 0 * a, 0 * b, 0 * m
    return q**G * _silent(1 - b, G, m) + (1 - q) ** G * _silent(a, G, m)


def spurious_groups(q: Array, a: Array, b: Array, G: Array, *, noise_level: str = "rollout",
                    abstain: Array = 0.0) -> ndarray:
    """P(true rewards unanimous, observed mixed) = q^G + (1-q)^G - U: updates on noise alone."""
    kept = unanimous_twice(q, a, b, G, noise_level=noise_level, abstain=abstain)
    return np.maximum(unanimous_twice(q, 0.0, 0.0, G) - kept, 0.0)


def lost_groups(q: Array, a: Array, b: Array, G: Array, *, noise_level: str = "rollout",
                abstain: Array = 0.0) -> ndarray:
    """P(true rewards mixed, no signal observed) = P0 - U: information that the noise hides."""
    silent = groups_without_signal(q, a, b, G, noise_level=noise_level, abstain=abstain)
    kept = unanimous_twice(q, a, b, G, noise_level=noise_level, abstain=abstain)
    return np.maximum(silent - kept, 0.0)


def _x_moments(q, a, b, G, m, std: bool) -> tuple[ndarray, ndarray]:
    """Mean and variance of X = (1/G) sum_i A_i t_i under rollout-level noise.

    Given r the t_i are independent: P(t=1 | r=1) = q (1-b)/s and P(t=1 | r=0) = q b/(1-s). The
    variance is that of E[X | r] = J q (1-q) B / (s (1-s)) plus the mean of Var[X | r].
    """
    s = observed_rate(q, a, b)
    observed_variance, sums = s * (1 - s), _sums(s, G, m, std)
    varies = observed_variance > 0
    divisor = np.where(varies, observed_variance, 1.0)

    signal = youden(a, b) * q * (1 - q)
    mean = signal * np.where(varies, sums.pull, 0.0)

    of_ones = (1 - b) * a * (1 - s) ** 2 * sums.ones
    of_zeros = b * (1 - a) * s**2 * sums.zeros
    given_rewards = q * (1 - q) * (of_ones + of_zeros) / divisor
    variance = given_rewards + signal**2 * sums.pull_squared / divisor - mean**2
    return mean, np.where(varies, np.maximum(variance, 0.0), 0.0)


def signal_to_noise(q: Array, a: Array, b: Array, G: Array, *, std: bool = True,
                    noise_level: str = "rollout", abstain: Array = 0.0,
                    visits: Array = 1.0) -> ndarray:
    """E[X] / sd(X) of X = (1/G) sum_i A_i (t_i - q), averaged over ``visits`` groups of one prompt.

    X is the group's policy-gradient estimate for the log-odds of success, where the score of a
    completion is t - q. The A_i sum to 0, so X = (1/G) sum_i A_i t_i, and E[X] = q (1-q) Delta.

    Visits cure rollout and group noise as sqrt(visits), but a prompt keeps its sign. As G grows,
    group noise leaves J / sqrt(1 - |a-b| - J^2) a visit: J / sqrt(1 - J^2) for flips. 0 where
    E[X] = 0 (J = 0, or q is 0 or 1).
    """
    q, a, b, G, m = _inputs(q, a, b, G, abstain, noise_level)
    visits = np.asarray(visits, dtype=float)
    if not np.all(visits >= 1):
        raise ValueError(f"visits is a number of groups: at least 1, not {visits.tolist()}.")
    if noise_level == "rollout":
        mean, variance = _x_moments(q, a, b, G, m, std)
        variance = variance / visits
    else:  # X is c times the clean X
        clean_mean, clean_variance = _x_moments(q, 0.0, 0.0, G, 0.0, std)
        c, c_squared = _shared_sign(a, b, m)
        mean = c * clean_mean
        from_sign = np.maximum(c_squared - c * c, 0.0) * clean_mean**2
        draws = 1.0 if noise_level == "prompt" else visits
        variance = c_squared * clean_variance / visits + from_sign / draws
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(mean == 0, 0.0, mean / np.sqrt(variance))[()]


def prompt_budget(q: Array, a: Array, b: Array, G: Array, *, std: bool = True,
                  noise_level: str = "rollout", abstain: Array = 0.0,
                  visits: Array = 1.0) -> ndarray:
    """How many times more prompts make up for the noise: (SNR clean / SNR noisy)^2.

    Infinite where J <= 0; nan where q is 0 or 1.
    """
    scale = {"std": std, "visits": visits}
    clean = signal_to_noise(q, 0.0, 0.0, G, **scale)
    noisy = signal_to_noise(q, a, b, G, noise_level=noise_level, abstain=abstain, **scale)
    hopeless = (clean > 0) & (noisy <= 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(hopeless, np.inf, (clean / noisy) ** 2)[()]


def advantages(rewards: Array, *, std: bool = True, eps: float = EPSILON) -> ndarray:
    """TRL's advantages of groups, shape (..., G) in and out. NaN: reward withheld, advantage 0."""
    r = np.asarray(rewards, dtype=float)
    shown = ~np.isnan(r)
    n = shown.sum(-1, keepdims=True)
    mean = np.where(shown, r, 0.0).sum(-1, keepdims=True) / np.maximum(n, 1)
    centred = np.where(shown, r - mean, 0.0)
    if not std:
        return centred
    sd = np.sqrt((centred**2).sum(-1, keepdims=True) / np.maximum(n - 1, 1))
    return np.divide(centred, sd + eps, out=np.zeros_like(centred), where=sd > 0)
