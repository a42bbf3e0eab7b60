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
    """Rates in [0, 1], and who shares a decision. `abstain_rate` withholds the reward (NaN).

    The false-negative rate is one number, or one for each difficulty of a problem: 1, 2, ...
    """

    false_positive_rate: float = 0.0
    false_negative_rate: float | tuple[float, ...] = 0.0
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
    def by_difficulty(self) -> bool:
        """Whether a rate depends on the difficulty of the problem."""
        return isinstance(self.false_negative_rate, tuple)

    @property
    def J(self) -> float:
        """1 - a - b: the slope of E[r | t] in t. 1 is clean, 0 has no signal, below 0 misleads.

        NaN if the rates depend on the difficulty: then there is a J for each, and none for all.
        """
        if self.by_difficulty:
            return float("nan")
        return 1 - self.false_positive_rate - self.false_negative_rate

    def change_rate(self, true_reward: np.ndarray, completion_tokens: np.ndarray,
                    difficulty: np.ndarray) -> np.ndarray:
        """The probability (n,) that each reward is changed.

        Given are its verdict, its length, and the difficulty of its problem (0 if it has none).
        """
        b = self.false_negative_rate
        if self.by_difficulty:
            b = _rate_of(difficulty, b)
        return np.where(true_reward == 1, b, self.false_positive_rate)

    def __str__(self):
        a, b = self.false_positive_rate, self.false_negative_rate
        if self.by_difficulty:
            rates = f"b = {_in_words(b)} for difficulties 1, 2, ..."
        else:
            rates = f"b = {b:g}, J = {self.J:g}"
        return (f"false-positive rate a = {a:g}, false-negative rate {rates}, one decision a "
                f"{self.noise_level}")


def _rate_of(difficulty: np.ndarray, rates: tuple[float, ...]) -> np.ndarray:
    """The rate of each problem (n,); 0 if it has no difficulty. ValueError if one has no rate."""
    hardest = difficulty.max(initial=0)
    if hardest > len(rates):
        raise ValueError(f"a problem has difficulty {hardest}, and rates are given for "
                         f"difficulties 1 to {len(rates)} only: give one for each")
    return np.array([0.0, *rates])[difficulty]


def _check_probability(name: str, rate: float | tuple[float, ...]):
    for one in np.atleast_1d(rate):
        if not 0 <= one <= 1:
            raise ValueError(f"{name}={one:g} is not a probability: choose a value in [0, 1]")


def rates_by_difficulty(text: str) -> tuple[float, ...]:
    """The rates of difficulties 1, 2, ... in a text such as "0.24,0.3"; ValueError for another."""
    try:
        rates = tuple(float(part) + 0.0 for part in text.split(","))
    except ValueError:
        raise ValueError(f"mask_rate_by_difficulty={text!r} is no list of rates: give one for each "
                         "difficulty from 1 on, such as '0.24,0.3,0.35'") from None
    _check_probability("mask_rate_by_difficulty", rates)
    return rates


def _in_words(rates: tuple[float, ...]) -> str:
    return ",".join(f"{rate:.12g}" for rate in rates)


def one_spelling(text: str) -> str:
    """Rates by difficulty as every run spells them: "0.24, .30" is "0.24,0.3"."""
    return _in_words(rates_by_difficulty(text))


# --- the names of channels ------------------------------------------------------------------------


class Named(NamedTuple):
    """What a run's parameter makes of a channel."""

    called: str  # in tables and figures
    sets: Callable[[Any], dict[str, Any]]  # rate -> the fields of `Channel` that it decides
    added_later: bool = False  # not a part of a run's name if off, so that earlier runs keep theirs
    by_difficulty: bool = False  # not one rate, but a text such as "0.24,0.3"

    @property
    def off(self) -> float | str:
        """The value without noise."""
        return "" if self.by_difficulty else 0.0


# A run's parameters by name; all are rates, and 0 unless given. Flip .5 is a random reward.
NAMED = {
    "label_flip_rate": Named(
        "flip", lambda p: {"false_positive_rate": p, "false_negative_rate": p}),
    "mask_rate": Named(
        "mask", lambda m: {"false_positive_rate": 0.0, "false_negative_rate": m}),
    "abstain_rate": Named("abstain", lambda m: {"abstain_rate": m}),
    "false_positive_rate": Named("false positives", lambda a: {"false_positive_rate": a}),
    "false_negative_rate": Named("false negatives", lambda b: {"false_negative_rate": b}),
    "mask_rate_by_difficulty": Named(
        "mask by difficulty", lambda rates: {"false_positive_rate": 0.0,
                                             "false_negative_rate": rates_by_difficulty(rates)},
        added_later=True, by_difficulty=True),
}
PARAMETERS = (*NAMED, "noise_level")  # all parameters of a run that are about noise
CONTROLS = {"format": "format only", "majority": "majority vote"}  # rewards that are no verdict
FLAWED = {"integer": "whole numbers only", "cue": "cue"}  # verdicts of another checker


def channel(*, noise_level: str = "rollout", **rates: float | str | None) -> Channel:
    """The channel that a run's parameters name (`NAMED`); unused rates stay 0.

    ValueError for an unknown name, and for two names that decide the same rate, such as flip and
    mask: the result would depend on their order.
    """
    unknown = sorted(rates.keys() - NAMED.keys())
    if unknown:
        raise ValueError(f"{unknown[0]!r} names no channel: choose from {', '.join(NAMED)}")
    decided: dict[str, Any] = {}
    decided_by: dict[str, str] = {}
    for name, rate in _used(rates).items():
        if not NAMED[name].by_difficulty:
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

    parameters: those of a run, by name. If several are set, the rate is that of the last. Rates by
    difficulty are no one rate: they stand in the channel's name, and the rate is 0.
    """
    noise = _rates_in_words(parameters)
    arms = [f"{called} {rate:g}" if rate else called for called, rate in noise]
    kinds = [called for called, _ in noise]
    source = (CONTROLS | FLAWED).get(parameters["reward"])
    if parameters.get("cue"):
        source = f"{source} ({parameters['cue']})"
    if source:
        arms, kinds = [source, *arms], [source, *kinds]
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
    """What each rate that is not 0 is called, and the rate; 0 for rates by difficulty."""
    rates = _used(parameters)
    called = {name: NAMED[name].called for name in rates}
    for name in [name for name in rates if NAMED[name].by_difficulty]:
        called[name] += f" ({rates[name]})"
        rates[name] = 0.0
    if "false_positive_rate" in rates and "false_negative_rate" in rates:  # one channel, not two
        b = rates.pop("false_negative_rate")
        called["false_positive_rate"] = f"asymmetric (b={b:g})"
    return [(called[name], rate) for name, rate in rates.items()]


def _used(parameters: Mapping[str, Any]) -> dict[str, Any]:
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
            completion_tokens=0, difficulty=0) -> np.ndarray:
    """Observed rewards: float64 (n,) of 0, 1 or NaN (withheld), from true rewards (n,) of 0 or 1.

    step, sample_id, rollout: their keys, see `uniforms`. completion_tokens and difficulty: whole
    numbers (n,), for channels whose rates depend on them; difficulty 0 is unknown. ValueError if a
    true reward is something else, NaN included: a channel is defined for verdicts only.
    """
    t = np.asarray(true_reward, float)
    other = np.flatnonzero((t != 0) & (t != 1))
    if len(other):
        raise ValueError(f"a true reward must be 0 or 1, got {t[other[0]]:g} in row {other[0]}")
    key = noise_seed, chan.noise_level, step, sample_id, rollout
    difficulty = np.broadcast_to(np.asarray(difficulty, int), t.shape)
    changed = uniforms(*key) < chan.change_rate(t, np.asarray(completion_tokens), difficulty)
    r = np.where(changed, 1 - t, t)
    if chan.abstain_rate:
        r[uniforms(*key, "abstain") < chan.abstain_rate] = np.nan
    return r


def replay(log: "pd.DataFrame", chan: Channel, noise_seed: int) -> "pd.DataFrame":
    """The rows of a reward log that this channel would not have written: empty if it is proven.

    log: columns step, sample_id, rollout, observed_reward and verdict (or true_reward), and
    difficulty if the channel needs it. ValueError if a column is missing or a (step, sample_id,
    rollout) occurs twice.
    """
    key = ["step", "sample_id", "rollout"]
    verdict = "verdict" if "verdict" in log else "true_reward"
    needed = {*key, verdict, "observed_reward"}
    if chan.by_difficulty:
        needed.add("difficulty")
    missing = sorted(needed - set(log.columns))
    if missing:
        raise ValueError(f"the reward log lacks the columns {missing}: is it that of a run?")
    twice = log.duplicated(key).sum()
    if twice:
        raise ValueError(f"{twice} completions are logged twice: the log is not that of one run")
    drawn = observe(chan, log[verdict], noise_seed, log.step, log.sample_id.tolist(), log.rollout,
                    log.get("completion_tokens", 0), log.get("difficulty", 0))
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
