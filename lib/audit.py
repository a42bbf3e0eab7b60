"""The reward log of a run beside theory, and beside what its channel draws.

Prompts differ in their success rate q, and a polynomial at the mean q is not the mean of the
polynomial. So the predictions here use no q. They take the number k of right completions of each
group from the log, and enumerate what the channel can make of it.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy import ndarray
from numpy.typing import ArrayLike as Array
from scipy.stats import multinomial

from lib import stats, theory
from lib.noise import Channel, replay

RATES = ["by", "part", "rate", "completions", "errors", "realised", "low", "high"]


class GivenTrue(NamedTuple):
    """Expectations for a group with k right completions; the first three are probabilities.

    ``energy`` is E[A^2] of a completion. ``right`` is E[sum of A over the right completions]; over
    the wrong ones it is -right, because advantages sum to 0.
    """

    silent: ndarray
    spurious: ndarray
    lost: ndarray
    energy: ndarray
    right: ndarray


class Comparison(NamedTuple):
    """A measured mean, its prediction, and the standard error of measured minus predicted."""

    measured: float
    predicted: float
    se: float


def _signals(t: ndarray, r: ndarray, std: bool) -> ndarray:
    """The five quantities of `GivenTrue` as groups (groups, G) show them; shape (5, groups)."""
    A = theory.advantages(r, std=std)
    mixed = (r == 1).any(axis=1) & (r == 0).any(axis=1)
    truly_mixed = (t == 1).any(axis=1) & (t == 0).any(axis=1)
    energy, right = (A**2).mean(axis=1), (A * t).sum(axis=1)
    return np.stack([~mixed, mixed & ~truly_mixed, ~mixed & truly_mixed, energy, right])


def _shown(n: int, one: float, withheld: float) -> tuple[ndarray, ndarray]:
    """All that n completions can show: probabilities (outcomes,) and rewards (outcomes, n).

    Their order does not matter, so ones come first, then zeros, then NaN for those withheld.
    """
    ones, zeros = np.indices((n + 1, n + 1)).reshape(2, -1)
    counts = np.stack([ones, zeros, n - ones - zeros], axis=1)[ones + zeros <= n]
    p = multinomial.pmf(counts, n, [(1 - withheld) * one, (1 - withheld) * (1 - one), withheld])
    rewards = [np.repeat([1.0, 0.0, np.nan], count) for count in counts[p > 0]]
    return p[p > 0], np.stack(rewards)


def outcomes(k: int, G: int, channel: Channel) -> tuple[ndarray, ndarray]:
    """All that a group can show whose first k completions are right: probabilities and rewards."""
    a, b, m = channel.false_positive_rate, channel.false_negative_rate, channel.abstain_rate
    if channel.noise_level == "rollout":
        p_right, of_right = _shown(k, 1 - b, m)
        p_wrong, of_wrong = _shown(G - k, a, m)
        i, j = np.indices((len(p_right), len(p_wrong))).reshape(2, -1)  # every pair of the two
        return p_right[i] * p_wrong[j], np.hstack([of_right[i], of_wrong[j]])
    # one draw for the group: all reversed, all made equal, as they are, all withheld
    t = (np.arange(G) < k).astype(float)
    equal = np.full(G, float(a > b))
    p = [(1 - m) * min(a, b), (1 - m) * abs(a - b), (1 - m) * (1 - max(a, b)), m]
    return np.array(p), np.stack([1 - t, equal, t, np.full(G, np.nan)])


@lru_cache(maxsize=256)
def _enumerated(G: int, channel: Channel, std: bool) -> list[tuple[ndarray, ndarray]]:
    """For k = 0..G right completions: probabilities (outcomes,) and signals (5, outcomes)."""
    found = []
    for k in range(G + 1):
        p, rewards = outcomes(k, G, channel)
        t = np.broadcast_to(np.arange(G) < k, rewards.shape)
        found.append((p, _signals(t, rewards, std)))
    return found


def given_true(k: Array, G: int, channel: Channel, *, std: bool = True) -> GivenTrue:
    """What to expect of groups with k right completions of G; k whole numbers, any shape.

    Exact, by enumeration of all rewards that the channel can show. Averaged over k ~ Bin(G, q) it
    gives the functions of lib.theory, but for TRL's epsilon. The gap is then E[right]/(G q (1-q)).
    """
    theory.group_size(G)
    k = np.asarray(k)
    if not np.all((k >= 0) & (k <= G) & (k == np.floor(k))):
        raise ValueError(f"k counts the right completions of a group: whole numbers from 0 to {G}.")
    means = [signals @ p for p, signals in _enumerated(int(G), channel, std)]
    return GivenTrue(*np.stack(means, axis=1)[:, k.astype(int)])


def beside_measurement(t: Array, r: Array, prompt: Array, channel: Channel, *,
                       std: bool = True) -> dict[str, Comparison]:
    """Measured groups beside the prediction from their true rewards: silent, spurious, energy, gap.

    t, r: true and observed rewards (groups, G), NaN withheld; prompt: what each group answers
    (groups,). Advantages are TRL's, of the observed rewards. Gap: NaN if no, or every, t is 1.

    The standard error is exact, not estimated: given the k, groups are independent at rollout and
    group level, and the visits of a prompt share one draw at prompt level. There the policy has
    been trained on a prompt's wrong label when it meets the prompt again, so that k and draw are no
    longer independent: agreement is certain for first visits only.
    """
    t, r = np.asarray(t, dtype=float), np.asarray(r, dtype=float)
    groups, G = t.shape
    k = t.sum(axis=1).astype(int)
    measured = _signals(t, r, std).sum(axis=1)
    predicted = np.sum(given_true(k, G, channel, std=std), axis=1)
    se = np.sqrt(_variances_of_sums(k, np.asarray(prompt), G, channel, std))

    # from sums to means; the sum of A over the wrong completions is minus that over the right ones
    right, wrong = k.sum(), groups * G - k.sum()
    per_right = 1 / right + 1 / wrong if right and wrong else np.nan
    weights = np.array([1 / groups, 1 / groups, 1 / groups, 1 / groups, per_right])
    means = np.transpose([measured, predicted, se] * weights).tolist()
    silent, spurious, _, energy, gap = (Comparison(*of_one) for of_one in means)
    return {"silent": silent, "spurious": spurious, "energy": energy, "gap": gap}


def _variances_of_sums(k, prompt, G: int, channel: Channel, std: bool) -> ndarray:
    """Variances (5,) of the signals' sums over all groups, given their k."""
    enumerated = _enumerated(G, channel, std)
    if channel.noise_level != "prompt":
        variances = [signals**2 @ p - (signals @ p) ** 2 for p, signals in enumerated]
        return np.maximum(np.stack(variances, axis=1), 0.0)[:, k].sum(axis=1)

    p, _ = enumerated[0]  # the same for every k, and one draw for all visits of a prompt
    by_k = np.stack([signals for _, signals in enumerated])  # (G+1, 5, outcomes)
    _, which = np.unique(prompt, return_inverse=True)
    visits = np.zeros((which.max() + 1, G + 1))  # how often each prompt had k right completions
    np.add.at(visits, (which, k), 1)
    sums = np.einsum("pk,kso->pso", visits, by_k)
    return np.maximum((sums**2 @ p - (sums @ p) ** 2).sum(axis=0), 0.0)


def signal_table(log: pd.DataFrame, difficulty_of: pd.Series, G: int, channel: Channel,
                 std: bool = True) -> pd.DataFrame:
    """Groups without signal, spurious groups, E[A^2] and advantage gap, measured and predicted.

    log: step, sample_id, rollout, true_reward and observed_reward of one run. difficulty_of: a
    problem's difficulty by sample_id. One row a (level, third, quantity): `level` is a difficulty,
    `third` a part of the training, and "all" stands for either. Columns: groups, revisits (groups
    of a prompt seen before), q (share of right completions), measured, predicted, and se, the
    standard error of their difference. ValueError if the log does not fall into whole groups of G.
    """
    log = log.sort_values(["step", "sample_id", "rollout"])
    place = np.arange(len(log)) % G
    if len(log) % G or (log["rollout"] % G != place).any():
        raise ValueError(f"the reward log is not that of this run: no whole groups of {G} rollouts")
    t, r = (log[c].to_numpy(float).reshape(-1, G) for c in ("true_reward", "observed_reward"))
    step, prompt = log["step"].to_numpy()[::G], log["sample_id"].to_numpy(str)[::G]
    revisit = pd.Series(prompt).duplicated().to_numpy()
    difficulty = difficulty_of.loc[prompt].to_numpy(str)
    third = 3 * step // (step.max() + 1) + 1

    parts = [("all", "all", np.full(len(t), True))]
    parts += [("all", str(i), third == i) for i in (1, 2, 3)]
    parts += [(name, "all", difficulty == name) for name in np.unique(difficulty)]
    rows = []
    for level, when, here in parts:
        if not here.any():
            continue
        about = {"level": level, "third": when, "groups": here.sum(),
                 "revisits": revisit[here].sum(), "q": t[here].mean()}
        found = beside_measurement(t[here], r[here], prompt[here], channel, std=std)
        rows += [about | {"quantity": name} | c._asdict() for name, c in found.items()]
    return pd.DataFrame(rows)


def rates_by_part(log: pd.DataFrame, difficulty_of: pd.Series) -> pd.DataFrame:
    """How often a run's rewards were wrong: in all, by difficulty, and in each tenth of the run.

    log: step, sample_id, true_reward and observed_reward of one run. difficulty_of: as for
    `signal_table`. The errors are those of a flawed checker and of the channel, taken together;
    withheld rewards do not count. One row a (by, part, rate): `by` is all, difficulty or tenth,
    `rate` false positives or false negatives. completions: those that are wrong (or right);
    errors: those of them that were rewarded (or not); realised, low and high: the share and its
    Clopper-Pearson interval of 95 %.
    """
    shown = log.dropna(subset="observed_reward")
    tenths = 10 * shown["step"] // (log["step"].max() + 1) + 1
    parts = {"all": np.full(len(shown), "all"), "tenth": tenths.to_numpy(),
             "difficulty": difficulty_of.loc[shown["sample_id"]].to_numpy(str)}
    rows = []
    for by in ("all", "difficulty", "tenth"):
        for part, here in shown.groupby(parts[by]):
            for rate, t in (("false positives", 0), ("false negatives", 1)):
                r = here.loc[here["true_reward"] == t, "observed_reward"]
                errors = int((r != t).sum())
                interval = stats.binomial_interval(errors, len(r))
                rows.append((by, str(part), rate, len(r), errors, *interval))
    return pd.DataFrame(rows, columns=RATES)


def pooled_rates(rates: pd.DataFrame) -> pd.DataFrame:
    """`rates_by_part` of several runs, with a column arm: their errors are counted together."""
    keys = ["arm", "by", "part", "rate"]
    counts = rates.groupby(keys, sort=False)[["errors", "completions"]].sum()
    found = [stats.binomial_interval(*pair) for pair in counts.itertuples(index=False)]
    intervals = pd.DataFrame(found, counts.index, ["realised", "low", "high"])
    return counts.join(intervals).reset_index()


def replay_run(log: pd.DataFrame, channel: Channel, noise_seed: int,
               correct: Callable[[ndarray, pd.Series], ndarray]) -> pd.DataFrame:
    """Draw a run's noise again: the rows of its reward log that are not what the run computes.

    A row fits if the channel turns its verdict into its observed reward (`noise.replay`), and the
    mitigation ``correct`` (`rewards.estimator`) turns that into what was returned to the trainer.
    """
    wrong = replay(log, channel, noise_seed)
    returned = pd.Series(np.nan, log.index)
    for _, step in log.groupby("step", sort=False):
        returned[step.index] = correct(step.observed_reward.to_numpy(float), step.sample_id)
    same = np.isclose(returned, log.returned, rtol=1e-5, atol=1e-6, equal_nan=True)
    return log[~same | log.index.isin(wrong.index)]
