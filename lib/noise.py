"""Reward-noise channels: what turns a true reward t into the observed reward r.

A channel is two rates and a level. `false_positive_rate` is a = P(r=1 | t=0), `false_negative_rate` is
b = P(r=0 | t=1), and J = 1 - a - b (Youden's index) is the part of the signal that survives. Natarajan et al.
(2013) call this class-conditional label noise. The level says who shares a draw: every completion has its own
(`rollout`), all completions of one visit to a prompt share one (`group`), or a prompt keeps one draw for the whole
run (`prompt`: a wrong label in the answer key).

Draws are a pure function of a key, never of a global generator. Three things follow: a resumed run sees the noise of
an uninterrupted one, two runs that differ only in the rate share their draws (the same completion whose reward is
changed at p=.1 would be changed at p=.2 too), and `replay` can prove a log row by row.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

LEVELS = ("rollout", "group", "prompt")
_STREAMS = {"change": 1, "abstain": 2}


@dataclass(frozen=True)
class Channel:
    """Rates in [0, 1] and the level at which one decision is shared. `abstain_rate` withholds the reward (NaN)."""

    false_positive_rate: float = 0.0
    false_negative_rate: float = 0.0
    level: str = "rollout"
    abstain_rate: float = 0.0

    def __post_init__(self):
        for name in ("false_positive_rate", "false_negative_rate", "abstain_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is not a probability: choose a value in [0, 1]")
        if self.level not in LEVELS:
            raise ValueError(f"noise_level={self.level!r} is unknown: choose one of {', '.join(LEVELS)}")

    @property
    def J(self) -> float:
        """1 - a - b: the slope of E[r | t] in t. 1 is clean, 0 carries no signal, below 0 the sign is reversed."""
        return 1 - self.false_positive_rate - self.false_negative_rate


def channel(label_flip_rate=0.0, mask_rate=0.0, false_positive_rate=0.0, false_negative_rate=0.0, abstain_rate=0.0,
            noise_level="rollout") -> Channel:
    """The channel that a run's parameters name; unused rates stay 0.

    flip p: (a, b) = (p, p). mask m: (0, m). asymmetric: (a, b) as given. random is flip .5.

    Raises ValueError if two of flip, mask and the explicit pair are set: their order would change the meaning.
    """
    named = [n for n, used in {"label_flip_rate": label_flip_rate, "mask_rate": mask_rate,
                               "false_positive_rate/false_negative_rate": false_positive_rate or false_negative_rate,
                               }.items() if used]
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} are both set, and the result would depend on their order: "
                         "give the combined channel as false_positive_rate and false_negative_rate")
    for name, rate in (("label_flip_rate", label_flip_rate), ("mask_rate", mask_rate)):
        if not 0 <= rate <= 1:
            raise ValueError(f"{name}={rate} is not a probability: choose a value in [0, 1]")
    a = label_flip_rate or false_positive_rate
    b = label_flip_rate or mask_rate or false_negative_rate
    return Channel(a, b, noise_level, abstain_rate)


def uniforms(noise_seed: int, level: str, step, sample_id, rollout, stream: str = "change") -> np.ndarray:
    """One number in [0, 1) a completion, a pure function of its key.

    step, rollout: int arrays (n,); sample_id: n strings. Returns float64 (n,). The level decides which of them are
    part of the key, so completions that share a key share the draw. `stream` separates independent decisions.
    """
    keys = [np.fromiter((_hash_id(s) for s in sample_id), np.uint64, len(sample_id))]
    if level in ("group", "rollout"):
        keys.append(np.asarray(step))
    if level == "rollout":
        keys.append(np.asarray(rollout))
    h = np.full(len(sample_id), _mix(np.uint64(int(noise_seed) % 2**64)))
    for key in (_STREAMS[stream], LEVELS.index(level), *keys):
        h = _mix(h ^ np.asarray(key).astype(np.uint64))
    return (h >> np.uint64(11)) * 2.0**-53


def observe(chan: Channel, true_reward, noise_seed: int, step, sample_id, rollout) -> np.ndarray:
    """Observed rewards: float64 (n,) of 0, 1 or NaN (withheld), from true rewards (n,) of 0 or 1 and their keys.

    Raises ValueError if a true reward is something else, NaN included: a channel is defined for verdicts only.
    """
    t = np.asarray(true_reward, float)
    binary = (t == 0) | (t == 1)
    if not binary.all():
        raise ValueError(f"a true reward must be 0 or 1, got {t[~binary][0]:g} in row {np.flatnonzero(~binary)[0]}")
    u = uniforms(noise_seed, chan.level, step, sample_id, rollout)
    rate = np.where(t == 1, chan.false_negative_rate, chan.false_positive_rate)
    r = np.where(u < rate, 1 - t, t)
    if chan.abstain_rate:
        r[uniforms(noise_seed, chan.level, step, sample_id, rollout, "abstain") < chan.abstain_rate] = np.nan
    return r


def replay(log: "pd.DataFrame", chan: Channel, noise_seed: int) -> "pd.DataFrame":
    """The rows of a reward log that this channel would not have written: empty if the log is proven.

    log: columns step, sample_id, rollout, observed_reward and verdict (or true_reward).
    Raises ValueError if a column is missing or a (step, sample_id, rollout) occurs twice.
    """
    key = ["step", "sample_id", "rollout"]
    verdict = "verdict" if "verdict" in log else "true_reward"
    missing = set(key + [verdict, "observed_reward"]) - set(log.columns)
    if missing:
        raise ValueError(f"the reward log lacks the columns {sorted(missing)}: is this a rewards.parquet of a run?")
    if log.duplicated(key).any():
        raise ValueError(f"{log.duplicated(key).sum()} completions are logged twice: the log is not that of one run")
    drawn = observe(chan, log[verdict], noise_seed, log.step, log.sample_id.astype(str).tolist(), log.rollout)
    same = (drawn == log.observed_reward) | (np.isnan(drawn) & log.observed_reward.isna())
    return log[~same].assign(drawn=drawn[~same])


@lru_cache(maxsize=1 << 16)
def _hash_id(sample_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(sample_id.encode(), digest_size=8).digest(), "little")


def _mix(h):
    """The splitmix64 finaliser (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    with np.errstate(over="ignore"):
        h = h + np.uint64(0x9E3779B97F4A7C15)
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return h ^ (h >> np.uint64(31))
