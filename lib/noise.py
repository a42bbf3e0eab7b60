"""Reward-noise channels: what turns a true reward t into the observed reward r.

A channel is two rates and a noise level. `false_positive_rate` is a = P(r=1 | t=0),
`false_negative_rate` is b = P(r=0 | t=1), and J = 1 - a - b (Youden's index) is the part of the
signal that survives. Natarajan et al. (2013) call this class-conditional label noise. The noise
level says who shares a draw: every completion has its own (`rollout`), all completions of one visit
to a prompt share one (`group`), or a prompt keeps one draw for the whole run (`prompt`: a wrong
label in the answer key).

Draws are a pure function of a key, never of a global generator. Three things follow. A resumed run
sees the noise of an uninterrupted one. Two runs that differ only in the rate share their draws: the
completion whose reward is changed at p=.1 is changed at p=.2 too. And `replay` can prove a log.

A channel is defined and named here and nowhere else: docs/recipe-channel.md adds one.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

LEVELS = ("rollout", "group", "prompt")
_STREAMS = {"change": 1, "abstain": 2}


@dataclass(frozen=True)
class Channel:
    """Rates in [0, 1], and who shares a decision. `abstain_rate` withholds the reward (NaN)."""

    false_positive_rate: float = 0.0
    false_negative_rate: float = 0.0
    noise_level: str = "rollout"
    abstain_rate: float = 0.0

    def __post_init__(self):
        if self.noise_level not in LEVELS:
            raise ValueError(f"noise_level={self.noise_level!r} is unknown: choose one of "
                             f"{', '.join(LEVELS)}")
        for name, rate in asdict(self).items():
            if name != "noise_level":
                _check_probability(name, rate)

    @property
    def J(self) -> float:
        """1 - a - b: the slope of E[r | t] in t. 1 is clean, 0 has no signal, below 0 misleads."""
        return 1 - self.false_positive_rate - self.false_negative_rate

    def change_rate(self, true_reward: np.ndarray, completion_tokens: np.ndarray) -> np.ndarray:
        """The probability (n,) that each reward is changed, given its verdict and its length."""
        return np.where(true_reward == 1, self.false_negative_rate, self.false_positive_rate)


def _check_probability(name: str, rate: float):
    if not 0 <= rate <= 1:
        raise ValueError(f"{name}={rate} is not a probability: choose a value in [0, 1]")


# --- the names of channels ------------------------------------------------------------------------


class Named(NamedTuple):
    """What a run's parameter makes of a channel."""

    called: str  # in tables and figures
    sets: Callable[[float], dict[str, float]]  # rate -> the fields of `Channel` that it decides
    added_later: bool = False  # not a part of a run's name at 0, so that earlier runs keep theirs


# A run's parameters by name; all are rates, and 0 unless given. Flip .5 is a random reward.
NAMED = {
    "label_flip_rate": Named(
        "flip", lambda p: {"false_positive_rate": p, "false_negative_rate": p}),
    "mask_rate": Named(
        "mask", lambda m: {"false_positive_rate": 0.0, "false_negative_rate": m}),
    "abstain_rate": Named("abstain", lambda m: {"abstain_rate": m}),
    "false_positive_rate": Named("false positives", lambda a: {"false_positive_rate": a}),
    "false_negative_rate": Named("false negatives", lambda b: {"false_negative_rate": b}),
}
PARAMETERS = (*NAMED, "noise_level")  # all parameters of a run that are about noise
CONTROLS = {"format": "format only", "majority": "majority vote"}  # rewards that are no verdict


def channel(*, noise_level: str = "rollout", **rates: float) -> Channel:
    """The channel that a run's parameters name (`NAMED`); unused rates stay 0.

    ValueError for an unknown name, and for two names that decide the same rate, such as flip and
    mask: the result would depend on their order.
    """
    unknown = sorted(rates.keys() - NAMED.keys())
    if unknown:
        raise ValueError(f"{unknown[0]!r} names no channel: choose from {', '.join(NAMED)}")
    decided: dict[str, float] = {}
    decided_by: dict[str, str] = {}
    for name, rate in _used(rates).items():
        _check_probability(name, rate)
        for field, value in NAMED[name].sets(rate).items():
            if field in decided:
                raise ValueError(f"{decided_by[field]} and {name} are both set, and the result "
                                 "would depend on their order: give the combined channel as "
                                 "false_positive_rate and false_negative_rate")
            decided[field], decided_by[field] = value, name
    return Channel(**decided, noise_level=noise_level)


def describe(parameters: Mapping[str, Any]) -> tuple[str, str, float]:
    """(arm, channel, rate) as tables and figures name them, such as ("flip 0.2", "flip", 0.2).

    parameters: those of a run, by name. If several are set, the rate is that of the last.
    """
    noise = _rates_in_words(parameters)
    arms = [f"{called} {rate:g}" for called, rate in noise]
    kinds = [called for called, _ in noise]
    control = CONTROLS.get(parameters["reward"])
    if control:
        arms, kinds = [control, *arms], [control, *kinds]
    if not kinds:
        return "clean", "clean", 0.0

    arm, kind = " + ".join(arms), " + ".join(kinds)
    level = parameters["noise_level"]
    shared = "" if level == "rollout" else f" ({level})"
    if not noise:
        return arm, kind + shared, 0.0
    last_rate = noise[-1][1]
    return arm + shared, kind + shared, last_rate


def _rates_in_words(parameters: Mapping[str, Any]) -> list[tuple[str, float]]:
    """What each rate that is not 0 is called, and the rate."""
    rates = _used(parameters)
    called = {name: NAMED[name].called for name in rates}
    if "false_positive_rate" in rates and "false_negative_rate" in rates:  # one channel, not two
        b = rates.pop("false_negative_rate")
        called["false_positive_rate"] = f"asymmetric (b={b:g})"
    return [(called[name], rate) for name, rate in rates.items()]


def _used(parameters: Mapping[str, Any]) -> dict[str, float]:
    """The rates that are not 0, in the order of `NAMED`."""
    return {name: parameters[name] for name in NAMED if parameters.get(name)}


# --- draws ----------------------------------------------------------------------------------------


def uniforms(noise_seed: int, noise_level: str, step, sample_id, rollout,
             stream: str = "change") -> np.ndarray:
    """One number in [0, 1) a completion, a pure function of its key.

    step, rollout: int arrays (n,); sample_id: n problems' names. Returns float64 (n,). The noise
    level decides which of them are part of the key, so completions that share a key share the draw.
    `stream` separates independent decisions.
    """
    keys = [np.fromiter((_hash_id(str(s)) for s in sample_id), np.uint64, len(sample_id))]
    if noise_level in ("group", "rollout"):
        keys.append(np.asarray(step))
    if noise_level == "rollout":
        keys.append(np.asarray(rollout))
    h = np.full(len(sample_id), _mix(np.uint64(int(noise_seed) % 2**64)))
    for key in (_STREAMS[stream], LEVELS.index(noise_level), *keys):
        h = _mix(h ^ np.asarray(key).astype(np.uint64))
    return (h >> np.uint64(11)) * 2.0**-53


def observe(chan: Channel, true_reward, noise_seed: int, step, sample_id, rollout,
            completion_tokens=0) -> np.ndarray:
    """Observed rewards: float64 (n,) of 0, 1 or NaN (withheld), from true rewards (n,) of 0 or 1.

    step, sample_id, rollout: their keys, see `uniforms`. completion_tokens: lengths (n,), for
    channels whose rates depend on them. ValueError if a true reward is something else, NaN
    included: a channel is defined for verdicts only.
    """
    t = np.asarray(true_reward, float)
    other = np.flatnonzero((t != 0) & (t != 1))
    if len(other):
        raise ValueError(f"a true reward must be 0 or 1, got {t[other[0]]:g} in row {other[0]}")
    key = noise_seed, chan.noise_level, step, sample_id, rollout
    changed = uniforms(*key) < chan.change_rate(t, np.asarray(completion_tokens))
    r = np.where(changed, 1 - t, t)
    if chan.abstain_rate:
        r[uniforms(*key, "abstain") < chan.abstain_rate] = np.nan
    return r


def replay(log: "pd.DataFrame", chan: Channel, noise_seed: int) -> "pd.DataFrame":
    """The rows of a reward log that this channel would not have written: empty if it is proven.

    log: columns step, sample_id, rollout, observed_reward and verdict (or true_reward).
    ValueError if a column is missing or a (step, sample_id, rollout) occurs twice.
    """
    key = ["step", "sample_id", "rollout"]
    verdict = "verdict" if "verdict" in log else "true_reward"
    missing = sorted({*key, verdict, "observed_reward"} - set(log.columns))
    if missing:
        raise ValueError(f"the reward log lacks the columns {missing}: is it that of a run?")
    twice = log.duplicated(key).sum()
    if twice:
        raise ValueError(f"{twice} completions are logged twice: the log is not that of one run")
    drawn = observe(chan, log[verdict], noise_seed, log.step, log.sample_id.tolist(), log.rollout,
                    log.get("completion_tokens", 0))
    same = (drawn == log.observed_reward) | (np.isnan(drawn) & log.observed_reward.isna())
    return log[~same].assign(drawn=drawn[~same])


@lru_cache(maxsize=1 << 16)
def _hash_id(sample_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(sample_id.encode(), digest_size=8).digest(), "little")


def _mix(h):
    """The splitmix64 finaliser (Steele, Lea and Flood 2014): each input bit reaches every bit."""
    with np.errstate(over="ignore"):
        h = h + np.uint64(0x9E3779B97F4A7C15)
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return h ^ (h >> np.uint64(31))
