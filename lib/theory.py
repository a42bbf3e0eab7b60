"""What noise in a binary reward does to GRPO's advantages: exact formulas for one group of completions.

The setting of every function: G completions of one prompt have independent true rewards t_i, Bernoulli(q).
The channel shows r_i, with false-positive rate a = P(r=1 | t=0) and false-negative rate b = P(r=0 | t=1).
J = 1-a-b is Youden's index and s = a + J q the observed success rate. With ``std`` the advantage is
A_i = (r_i - mean r) / (sd r + eps) (GRPO, arXiv 2402.03300; TRL takes the Bessel-corrected sd of the group
and eps = 1e-4), without it A_i = r_i - mean r (Dr. GRPO, arXiv 2503.20783). ``eps`` is 0 by default: TRL's
value shrinks advantages by a fraction below 1e-4 sqrt(G).

``level`` says what one noise draw covers: "rollout" (each completion), "group" (all completions of a prompt
visit share u: t=0 changes if u < a, t=1 if u < b) or "prompt" (as "group", with the same u on every visit).
``abstain`` = m withholds a reward with probability m, at the same level: that completion gets advantage 0,
and mean and sd come from the others.

Arguments are scalars or arrays and broadcast together. q, a, b, abstain: probabilities. G: whole number >= 2,
or np.inf for the limit. Results are float64 of the broadcast shape. A ValueError names a bad argument.
notebooks/helpers/theory.ipynb derives the formulas and checks them against simulation.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike as Array
from scipy.special import gammaln
from scipy.stats import multinomial

EPSILON = 1e-4  # what TRL adds to the standard deviation of a group
LEVELS = ("rollout", "group", "prompt")


def _rate(name: str, value: Array) -> np.ndarray:
    x = np.asarray(value, dtype=float)
    if not np.all((x >= 0) & (x <= 1)):
        raise ValueError(f"{name} is a probability: give values from 0 to 1, not {value!r}.")
    return x


def _inputs(q, a, b, G, abstain=0.0, level="rollout") -> list[np.ndarray]:
    """Check the arguments; return all but level as float arrays, not yet broadcast."""
    size = np.asarray(G, dtype=float)
    if not np.all((size >= 2) & (size == np.floor(size))):
        raise ValueError(f"G is the group size: give whole numbers of at least 2, or np.inf, not {G!r}.")
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}: choose one of {', '.join(map(repr, LEVELS))}.")
    return [_rate("q", q), _rate("a", a), _rate("b", b), size, _rate("abstain", abstain)]


def youden(a: Array, b: Array) -> np.ndarray:
    """Youden's index J = 1 - a - b: 1 without noise, 0 if r says nothing of t, negative if it misleads."""
    return 1.0 - (_rate("a", a) + _rate("b", b))  # in this order J is exactly 0 when a + b is 1


def observed_rate(q: Array, a: Array, b: Array) -> np.ndarray:
    """P(r = 1) = s = a + J q."""
    q, a, b = _rate("q", q), _rate("a", a), _rate("b", b)
    return np.clip(a * (1 - q) + (1 - b) * q, 0.0, 1.0)


def _log_comb(n: int, k: int) -> float:
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)


def _sums(s, G, m, std: bool, eps: float) -> np.ndarray:
    """The four sums over possible groups that all moments are made of; shape (4, ...broadcast).

    With n rewards shown, k of them 1, and sd = sqrt(k (n-k) / (n (n-1))) (1 without std), the advantages are
    A+ = (1 - k/n) / sd and A- = -(k/n) / sd; let B = k A+ / G. Returned: the expectations of B, B^2,
    k (A+/G)^2 and (n-k) (A-/G)^2, each divided by s (1-s). Dividing inside the binomial probability,
    C(n,k) s^(k-1) (1-s)^(n-k-1), keeps s = 0 and s = 1 free of 0/0.
    """
    s, G, m = np.broadcast_arrays(s, G, m)
    out = np.empty((4, *s.shape))
    for size in np.unique(G):
        here = G == size
        p, drop, total = s[here], m[here], np.zeros((4, here.sum()))
        if np.isinf(size):  # k/n -> s and n/G -> 1-m: nothing varies from group to group
            with np.errstate(divide="ignore"):
                total[0] = (1 - drop) / (np.sqrt(p * (1 - p)) + eps if std else 1.0)
            out[:, here] = total
            continue
        size, tiny = int(size), np.finfo(float).tiny  # tiny: log(0) times 0 must be 0
        log_p, log_1p = np.log(np.maximum(p, tiny)), np.log(np.maximum(1 - p, tiny))
        for n in range(2, size + 1) if drop.any() else (size,):
            log_n = _log_comb(size, n) + n * np.log(np.maximum(1 - drop, tiny)) if drop.any() else 0.0
            shown = drop ** (size - n)
            for k in range(1, n):
                sd = np.sqrt(k * (n - k) / (n * (n - 1))) + eps if std else 1.0
                weight = shown * np.exp(log_n + _log_comb(n, k) + (k - 1) * log_p + (n - k - 1) * log_1p)
                up, down = (1 - k / n) / sd / size, k / n / sd / size
                for row, value in enumerate((k * up, (k * up) ** 2, k * up**2, (n - k) * down**2)):
                    total[row] += weight * value
        out[:, here] = total
    return out


def _shared_sign(a, b, m) -> tuple[np.ndarray, np.ndarray]:
    """Mean and mean square of c, where noise shared by a group turns its clean advantages A into c A.

    u < min(a, b) changes every reward: c = -1. u between a and b makes them all equal: c = 0. Else c = 1.
    """
    return (1 - m) * youden(a, b), (1 - m) * (1 - np.abs(a - b))


def advantage_gap(q: Array, a: Array, b: Array, G: Array, *, std: bool = True, level: str = "rollout",
                  abstain: Array = 0.0, eps: float = 0.0) -> np.ndarray:
    """Delta = E[A | t=1] - E[A | t=0], in units of the advantage: what a right answer is worth.

    Without std it is J (G-1)/G; with std J Phi / (s (1-s)), which tends to J / sqrt(s (1-s)) as G grows.
    Its sign is J's. At q = 0 and q = 1 it is the limit: what a lone right (wrong) completion would get.
    """
    q, a, b, G, m = _inputs(q, a, b, G, abstain, level)
    if level == "rollout":
        base, factor = _sums(observed_rate(q, a, b), G, m, std, eps)[0], youden(a, b)
    else:
        base, factor = _sums(q, G, 0.0, std, eps)[0], _shared_sign(a, b, m)[0]
    return factor * np.where(factor == 0, 0.0, base)  # base is infinite for G = inf at s = 0 or 1


def update_energy(q: Array, a: Array, b: Array, G: Array, *, std: bool = True, level: str = "rollout",
                  abstain: Array = 0.0, eps: float = 0.0) -> np.ndarray:
    """E[A^2], the mean squared advantage of a completion: how hard the update pushes, rightly or wrongly.

    Rollout level: (G-1)/G (1-P0) with std, s (1-s) (G-1)/G without.
    """
    q, a, b, G, m = _inputs(q, a, b, G, abstain, level)
    if level == "rollout":
        s, factor = observed_rate(q, a, b), 1.0
    else:
        s, factor, m = q, _shared_sign(a, b, m)[1], 0.0
    _, _, plus, minus = _sums(s, G, m, std, eps)
    v = s * (1 - s)
    with np.errstate(invalid="ignore"):  # 0/0 and inf * 0, both on the side that np.where drops
        limit = (1 - m) * np.where(v > 0, v / (np.sqrt(v) + eps) ** 2, 0.0) if std else (1 - m) * v
        return (factor * np.where(np.isinf(G), limit, G * v * (plus + minus)))[()]


def _silent(s, G, m) -> np.ndarray:
    """P(all rewards shown are equal, or none is shown); one reward alone counts as equal."""
    return np.clip((m + (1 - m) * s) ** G + (m + (1 - m) * (1 - s)) ** G - m**G, 0.0, 1.0)


def groups_without_signal(q: Array, a: Array, b: Array, G: Array, *, level: str = "rollout",
                          abstain: Array = 0.0) -> np.ndarray:
    """P0 = P(every advantage of a group is 0). Rollout level: s^G + (1-s)^G.

    TRL logs it as ``frac_reward_zero_std``, but leaves out groups with fewer than two rewards shown: their sd
    is NaN, not 0.
    """
    q, a, b, G, m = _inputs(q, a, b, G, abstain, level)
    if level == "rollout":
        return _silent(observed_rate(q, a, b), G, m)
    return 1 - _shared_sign(a, b, m)[1] * (1 - _silent(q, G, 0.0))


def unanimous_twice(q: Array, a: Array, b: Array, G: Array, *, level: str = "rollout",
                    abstain: Array = 0.0) -> np.ndarray:
    """U = P(true rewards unanimous, and no signal observed).

    Rollout level: q^G [(1-b)^G + b^G] + (1-q)^G [a^G + (1-a)^G]. Shared noise keeps unanimous groups so.
    """
    q, a, b, G, m = _inputs(q, a, b, G, abstain, level)
    if level != "rollout":
        a, b, m = 0 * a, 0 * b, 0 * m
    return q**G * _silent(1 - b, G, m) + (1 - q) ** G * _silent(a, G, m)


def spurious_groups(q: Array, a: Array, b: Array, G: Array, *, level: str = "rollout",
                    abstain: Array = 0.0) -> np.ndarray:
    """P(true rewards unanimous, observed mixed) = q^G + (1-q)^G - U: groups that update on noise alone."""
    kept = unanimous_twice(q, a, b, G, level=level, abstain=abstain)
    return np.maximum(unanimous_twice(q, 0.0, 0.0, G) - kept, 0.0)


def lost_groups(q: Array, a: Array, b: Array, G: Array, *, level: str = "rollout",
                abstain: Array = 0.0) -> np.ndarray:
    """P(true rewards mixed, no signal observed) = P0 - U: groups whose information the noise hides."""
    silent = groups_without_signal(q, a, b, G, level=level, abstain=abstain)
    return np.maximum(silent - unanimous_twice(q, a, b, G, level=level, abstain=abstain), 0.0)


def _x_moments(q, a, b, G, m, std: bool, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of X = (1/G) sum_i A_i t_i under rollout-level noise.

    Given r the t_i are independent: P(t=1 | r=1) = q (1-b)/s and P(t=1 | r=0) = q b/(1-s).
    """
    s, signal = observed_rate(q, a, b), youden(a, b) * q * (1 - q)
    v, (b1, b2, plus, minus) = s * (1 - s), _sums(s, G, m, std, eps)
    mean, safe = signal * np.where(v > 0, b1, 0.0), np.where(v > 0, v, 1.0)
    within = q * (1 - q) * ((1 - b) * a * (1 - s) ** 2 * plus + b * (1 - a) * s**2 * minus) / safe
    variance = within + signal**2 * b2 / safe - mean**2
    return mean, np.where((v > 0) & np.isfinite(G), np.maximum(variance, 0.0), 0.0)


def signal_to_noise(q: Array, a: Array, b: Array, G: Array, *, std: bool = True, level: str = "rollout",
                    abstain: Array = 0.0, eps: float = 0.0, visits: Array = 1.0) -> np.ndarray:
    """E[X] / sd(X) of X = (1/G) sum_i A_i (t_i - q), averaged over ``visits`` groups of one prompt.

    X is the group's policy-gradient estimate for the log-odds of success, where the score of a completion
    is t - q. The A_i sum to 0, so X = (1/G) sum_i A_i t_i, and E[X] = q (1-q) Delta. Visits cure rollout and
    group noise as sqrt(visits); a prompt keeps its sign, so they do not cure prompt noise. As G grows, group
    noise leaves J / sqrt(1 - |a-b| - J^2) a visit: J / sqrt(1 - J^2) for flips. 0 where E[X] = 0 (J = 0, or
    q is 0 or 1); infinite where X does not vary (G = inf and no shared noise).
    """
    q, a, b, G, m = _inputs(q, a, b, G, abstain, level)
    visits = np.asarray(visits, dtype=float)
    if not np.all(visits >= 1):
        raise ValueError(f"visits is a number of groups: give values of at least 1, not {visits.tolist()}.")
    if level == "rollout":
        mean, var = _x_moments(q, a, b, G, m, std, eps)
        var = var / visits
    else:
        clean, spread = _x_moments(q, 0.0, 0.0, G, 0.0, std, eps)
        c, c2 = _shared_sign(a, b, m)
        shared = np.maximum(c2 - c * c, 0.0) * clean**2
        mean, var = c * clean, c2 * spread / visits + (shared if level == "prompt" else shared / visits)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(mean == 0, 0.0, mean / np.sqrt(var))[()]


def prompt_budget(q: Array, a: Array, b: Array, G: Array, *, std: bool = True, level: str = "rollout",
                  abstain: Array = 0.0, eps: float = 0.0, visits: Array = 1.0) -> np.ndarray:
    """How many times more prompts give the signal-to-noise ratio of a clean run: (SNR clean / SNR noisy)^2.

    Infinite where no number does (J <= 0); nan where the clean group has no signal (q is 0 or 1), or where
    both ratios are infinite (G = inf at rollout level).
    """
    clean = signal_to_noise(q, 0.0, 0.0, G, std=std, eps=eps, visits=visits)
    noisy = signal_to_noise(q, a, b, G, std=std, level=level, abstain=abstain, eps=eps, visits=visits)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((clean > 0) & (noisy <= 0), np.inf, (clean / noisy) ** 2)[()]


def advantages(rewards: Array, *, std: bool = True, eps: float = EPSILON) -> np.ndarray:
    """TRL's advantages of groups, shape (..., G) in and out. NaN: reward withheld, advantage 0."""
    r = np.asarray(rewards, dtype=float)
    shown = ~np.isnan(r)
    n = shown.sum(-1, keepdims=True)
    centred = np.where(shown, r - np.where(shown, r, 0.0).sum(-1, keepdims=True) / np.maximum(n, 1), 0.0)
    if not std:
        return centred
    sd = np.sqrt((centred**2).sum(-1, keepdims=True) / np.maximum(n - 1, 1))
    return np.divide(centred, sd + eps, out=np.zeros_like(centred), where=sd > 0)


# --- beside a reward log: groups of which the number of right completions is known ------------------------------

class GivenTrue(NamedTuple):
    """Expectations for a group with k right completions; the first three are probabilities.

    ``energy`` is E[A^2] of a completion. ``right`` is E[sum of A over the right completions]; over the wrong
    ones it is -right, because advantages sum to 0.
    """

    silent: np.ndarray
    spurious: np.ndarray
    lost: np.ndarray
    energy: np.ndarray
    right: np.ndarray


class Comparison(NamedTuple):
    """A measured mean, its prediction, and the standard error of measured minus predicted."""

    measured: float
    predicted: float
    se: float


def _counts(n: int, one: float, m: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ones, zeros, probability): all that n completions can show, each shown with 1-m, then 1 with ``one``."""
    ones, zeros = np.indices((n + 1, n + 1)).reshape(2, -1)
    shares = [(1 - m) * one, (1 - m) * (1 - one), m]
    ones, zeros = ones[ones + zeros <= n], zeros[ones + zeros <= n]
    p = multinomial.pmf(np.stack([ones, zeros, n - ones - zeros], axis=-1), n, shares)
    return ones[p > 0], zeros[p > 0], p[p > 0]


def _outcomes(k: int, G: int, a: float, b: float, m: float, std: bool, level: str, eps: float):
    """What the channel can make of a group: probabilities (n,) and the GivenTrue values (5, n) of each outcome.

    Shared noise has four outcomes, in one order for every k: all reversed, all made equal, as they are, withheld.
    """
    if level == "rollout":
        of_right, of_wrong = _counts(k, 1 - b, m), _counts(G - k, a, m)
        i, j = np.indices((len(of_right[0]), len(of_wrong[0]))).reshape(2, -1)
        (right_1, right_0, p), (wrong_1, wrong_0, p_wrong) = [x[i] for x in of_right], [x[j] for x in of_wrong]
        p = p * p_wrong
    else:
        p = np.array([min(a, b), abs(a - b), 1 - max(a, b), 0.0]) * (1 - m) + [0, 0, 0, m]
        right_1, right_0 = k * np.array([0, 0, 1, 0]), k * np.array([1, 1, 0, 0])
        wrong_1, wrong_0 = (G - k) * np.array([1, 0, 0, 0]), (G - k) * np.array([0, 1, 1, 0])
    ones, n = right_1 + wrong_1, right_1 + right_0 + wrong_1 + wrong_0
    mixed, mean = (ones > 0) & (ones < n), ones / np.maximum(n, 1)
    sd = np.sqrt(n * mean * (1 - mean) / np.maximum(n - 1, 1)) + eps if std else 1.0
    up, down = (np.where(mixed, x, 0.0) / np.where(mixed, sd, 1.0) for x in (1 - mean, mean))
    truly_mixed = 0 < k < G
    return p, np.stack([~mixed, mixed & (not truly_mixed), ~mixed & truly_mixed,
                        (ones * up**2 + (n - ones) * down**2) / G, right_1 * up - right_0 * down]).astype(float)


@lru_cache(maxsize=256)
def _table(G, a, b, m, std, level, eps) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For k = 0..G: means and variances (5, G+1); and, for shared noise, probabilities and values of outcomes."""
    found = [_outcomes(k, int(G), a, b, m, std, level, eps) for k in range(int(G) + 1)]
    mean = np.stack([v @ p for p, v in found], axis=1)
    square = np.stack([v**2 @ p for p, v in found], axis=1)
    p, values = (found[0][0], np.stack([v for _, v in found], axis=-1)) if level != "rollout" else (None, None)
    return mean, np.maximum(square - mean**2, 0.0), p, values


def given_true(k: Array, G: int, a: float, b: float, *, std: bool = True, level: str = "rollout",
               abstain: float = 0.0, eps: float = 0.0) -> GivenTrue:
    """What to expect of groups with k right completions of G; k whole numbers, any shape, the rest scalars.

    Exact, by enumeration of all rewards that the channel can show. Prompts differ in q, and a polynomial at the
    mean q is not the mean of the polynomial; averaged over the k of a log this needs no q at all. Averaged over
    k ~ Bin(G, q) it gives the functions above; the gap is then E[right] / (G q (1-q)).
    """
    _inputs(0.0, a, b, G, abstain, level)
    k = np.asarray(k)
    if not np.all((k >= 0) & (k <= G) & (k == np.floor(k))):
        raise ValueError(f"k counts the right completions of a group of {G}: give whole numbers from 0 to {G}.")
    return GivenTrue(*_table(G, a, b, abstain, std, level, eps)[0][:, k.astype(int)])


def beside_measurement(t: Array, r: Array, prompt: Array, a: float, b: float, *, std: bool = True,
                       level: str = "rollout", abstain: float = 0.0, eps: float = EPSILON) -> dict[str, Comparison]:
    """Measured groups beside the prediction from their true rewards: silent, spurious, energy and gap.

    t, r: true and observed rewards (groups, G), NaN withheld; prompt: what each group answers (groups,). Advantages
    are TRL's, of the observed rewards. The standard error is exact, not estimated: given the k, groups are
    independent at rollout and group level, and the visits of a prompt share one draw at prompt level. There the
    policy has been trained on a prompt's wrong label when it meets the prompt again, so that k and draw are no
    longer independent: agreement is certain for first visits only. Gap: NaN if all or no completions are right.
    """
    t, r = np.asarray(t, dtype=float), np.asarray(r, dtype=float)
    groups, G = t.shape
    _inputs(0.0, a, b, G, abstain, level)
    k, shown = t.sum(axis=1).astype(int), ~np.isnan(r)
    A, ones = advantages(r, std=std, eps=eps), np.nansum(r, axis=1)
    mixed, unanimous = (ones > 0) & (ones < shown.sum(axis=1)), (k == 0) | (k == G)
    found = np.stack([~mixed, mixed & unanimous, (A**2).mean(axis=1), (A * t).sum(axis=1)]).astype(float)
    right, wrong = k.sum(), groups * G - k.sum()
    per_right = 1 / right + 1 / wrong if right and wrong else np.nan  # the sum over wrong ones is minus this sum
    weight, rows = np.array([1 / groups, 1 / groups, 1 / groups, per_right]), [0, 1, 3, 4]
    mean, variance, p, values = _table(G, a, b, abstain, std, level, eps)
    if level == "prompt":
        which, visits = np.unique(np.asarray(prompt), return_inverse=True)
        sums = np.stack([[np.bincount(visits, v[k], len(which)) for v in values[row]] for row in rows])
        total = (np.einsum("rsp,s->rp", sums**2, p) - np.einsum("rsp,s->rp", sums, p) ** 2).sum(axis=1)
    else:
        total = variance[rows][:, k].sum(axis=1)
    columns = (found.sum(axis=1) * weight, mean[rows][:, k].sum(axis=1) * weight,
               np.sqrt(np.maximum(total, 0.0)) * weight)
    return {name: Comparison(*map(float, row)) for name, row in
            zip(("silent", "spurious", "energy", "gap"), zip(*columns, strict=True), strict=True)}
