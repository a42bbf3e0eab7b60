"""Reward functions with TRL's contract: the checker, the noise channel on top of it, and a log.

TRL calls `f(prompts, completions, completion_ids, **columns, trainer_state, log_extra, log_metric)`
once a generation batch, completions of a prompt side by side. It expects one float a completion, or
None: withheld.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from lib import noise
from lib.answers import Grade, Verifier, normalize

LOG_SCHEMA = pa.schema([
    ("step", pa.int32()),
    ("sample_id", pa.string()),
    ("rollout", pa.int16()),
    ("true_reward", pa.int8()),  # the checker's verdict on the answer
    ("verdict", pa.int8()),  # what entered the channel: the same, unless reward is a control
    ("observed_reward", pa.float32()),  # what left it; missing if withheld
    ("returned", pa.float32()),  # what the trainer was given: the same without a mitigation
    ("changed", pa.bool_()),  # observed_reward differs from verdict, or is withheld
    ("format_ok", pa.bool_()),
    ("completion_tokens", pa.int32()),
    ("grader", pa.string()),
])
REWARDS = ("accuracy", "format", "majority")


def text_of(completion: str | list[dict[str, Any]]) -> str:
    """The text of a completion, whether TRL passes a string or a list of chat messages.

    The last message counts. A chat without messages, or a message without content, has no text.
    """
    if isinstance(completion, str):
        return completion
    if not completion:
        return ""
    return completion[-1].get("content") or ""


def majority_reward(answers: list[str | None], groups) -> np.ndarray:
    """Votes instead of a checker: 1 where an answer is its group's most common one (n,).

    answers, groups: n answers and the problems they belong to. Answers are normalised, a missing
    one never wins, and a tie goes to the answer given first (TTRL, arXiv 2504.16084).
    """
    said = [normalize(answer or "") for answer in answers]
    votes: dict[Any, Counter] = defaultdict(Counter)
    for group, answer in zip(groups, said, strict=True):
        if answer:
            votes[group][answer] += 1
    winner = {group: counts.most_common(1)[0][0] for group, counts in votes.items()}
    return np.array([answer == winner.get(g) for g, answer in zip(groups, said, strict=True)], int)


def verdicts(grades: list[Grade], groups, source: str = "accuracy") -> np.ndarray:
    """What enters the channel, 0 or 1 (n,), from the checker's grades of n completions.

    source: "accuracy" is the checker's verdict; "format" accepts any parsable box (a control);
    "majority" lets the completions of a problem vote. groups: the problems (n,).
    """
    if source not in REWARDS:
        raise ValueError(f"reward={source!r} is unknown: choose {', '.join(REWARDS)}")
    if source == "majority":
        return majority_reward([grade.answer for grade in grades], groups)
    if source == "format":
        return np.array([grade.method != "unparsed" for grade in grades], int)
    return np.array([grade.correct for grade in grades], int)


def noisy_reward(verifier: Verifier, chan: noise.Channel, noise_seed: int, log,
                 source: str = "accuracy", correct: Callable = lambda r, groups: r,
                 clock: Callable = lambda: None) -> Callable:
    """The reward function of a run: grade, apply the channel, log, report the rates to TRL.

    log: `log.write(table)` gets a pyarrow table with LOG_SCHEMA each step, a row a completion.
    source: what enters the channel, see `verdicts`; the checker's verdict is logged in any case.
    correct: maps observed rewards (n,) and their problems to what the trainer is given, see
    `estimator`. clock: called at the start and at the end, to tell what the rewards cost.
    The dataset needs the columns `sample_id` and `answer`.
    """
    verdicts([], [], source)  # an unknown source is refused now, not after the first rollouts

    def observed_reward(completions, completion_ids, answer, trainer_state, log_metric,
                        sample_id=None, **_):
        if sample_id is None:
            raise ValueError("noise is drawn by problem, and the dataset has no column sample_id: "
                             "add one that names each problem")
        if not len(completions):
            return []
        clock()
        problems = [str(name) for name in sample_id]
        grades = verifier.grade(list(answer), [text_of(c) for c in completions])
        true_reward = verdicts(grades, problems)
        verdict = verdicts(grades, problems, source)

        step = np.full(len(problems), trainer_state.global_step)
        rollout = pd.Series(problems).groupby(problems).cumcount().to_numpy()
        tokens = [len(ids) for ids in completion_ids]
        r = noise.observe(chan, verdict, noise_seed, step, problems, rollout, tokens)
        returned = correct(r, problems)

        log.write(pa.table({
            "step": step, "sample_id": problems, "rollout": rollout,
            "true_reward": true_reward, "verdict": verdict, "observed_reward": r,
            "returned": returned, "changed": r != verdict,
            "format_ok": verdicts(grades, problems, "format").astype(bool),
            "completion_tokens": tokens, "grader": [grade.method for grade in grades],
        }, schema=LOG_SCHEMA))
        for name, value in realised_rates(true_reward, r).items():
            if not np.isnan(value):  # a batch without a wrong answer has no false-positive rate
                log_metric(name, value)
        clock()
        return [None if np.isnan(x) else float(x) for x in returned]

    return observed_reward


def realised_rates(true_reward, observed_reward) -> dict[str, float]:
    """Clean mean, observed mean, share of wrong answers rewarded and of right answers not.

    Withheld rewards are NaN and count for the clean mean only. NaN where a rate is undefined.
    """
    t, r = np.asarray(true_reward), np.asarray(observed_reward, float)
    shown = ~np.isnan(r)
    return {
        "clean_mean": _mean(t),
        "observed_mean": _mean(r[shown]),
        "realised_false_positive_rate": _mean(r[shown & (t == 0)] == 1),
        "realised_false_negative_rate": _mean(r[shown & (t == 1)] == 0),
    }


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


# --- what people do against noise -----------------------------------------------------------------


def estimator(mitigation: str, a: float = 0.0, b: float = 0.0) -> Callable:
    """What turns observed rewards (n,) and their problems into what the trainer is given.

    a, b: the rates that it assumes. "backward" and "forward" are corrected rewards. "sgrpo" returns
    advantages, so TRL must not scale them again (`scale_rewards="none"`; their mean over a group is
    0 already). ValueError where the rates make no sense for it.
    """
    if mitigation == "none":
        return lambda r, _: r
    if mitigation == "forward":
        return lambda r, _: forward_correction(r, b)
    if mitigation == "backward":
        backward_correction(0.0, a, b)  # rates that it refuses are refused now
        return lambda r, _: backward_correction(r, a, b)
    if mitigation == "sgrpo":
        if a != b:
            raise ValueError(
                f"mitigation='sgrpo' is made for flips, a = b, but assumes a={a:g} and b={b:g}: "
                "set assumed_false_positive_rate and assumed_false_negative_rate to one rate below "
                "0.5")
        sgrpo_weight(0.5, a)
        return lambda r, groups: sgrpo_advantages(r, groups, a)
    raise ValueError(f"mitigation={mitigation!r} is unknown: choose none, backward, forward, sgrpo")


def backward_correction(rewards, a, b) -> np.ndarray:
    """(r - a) / J. Its mean given t is t (Natarajan et al. 2013; arXiv 2510.00915, 2510.18924)."""
    J = 1 - np.asarray(a) - b
    if np.any(np.abs(J) < 1e-12):
        raise ValueError("backward_correction divides by J = 1 - a - b: choose a + b other than 1")
    return (np.asarray(rewards, dtype=float) - a) / J


def forward_correction(rewards, b) -> np.ndarray:
    """r - (1 - b): b for r = 1, b - 1 for r = 0. Its mean given t is J (t - 1).

    Our derivation of weights with the property that arXiv 2510.00915 asks for: b is enough.
    """
    return np.asarray(rewards, dtype=float) - (1 - b)


def sgrpo_advantages(r, groups, p: float) -> np.ndarray:
    """S-GRPO's advantages (n,): std-normalised in each group, times w*(group mean, p)."""
    r = pd.Series(np.asarray(r, float))
    group = r.groupby(list(groups))
    mean, std = group.transform("mean"), group.transform("std")
    return (sgrpo_weight(mean.to_numpy(), p) * ((r - mean) / (std + 1e-4))).to_numpy()


def sgrpo_weight(observed_mean, p) -> np.ndarray:
    """S-GRPO's factor w* on a group's advantages, for flips at p < 1/2 (arXiv 2508.05928).

    w* = (1-2p) t (1-t) / [sqrt(r (1-r)) sqrt(t (1-t))], with r = ``observed_mean`` and
    t = clip((r-p)/(1-2p), 0, 1): the correlation of observed and true reward in a group with these
    means. 0 where t is 0 or 1.
    """
    r, p = np.asarray(observed_mean, float), np.asarray(p, float)
    if np.any(p >= 0.5):
        raise ValueError("sgrpo_weight needs observed and true reward to agree more often than "
                         "not: choose p below 0.5")
    t = np.clip((r - p) / (1 - 2 * p), 0.0, 1.0)
    informative = t * (1 - t) > 0
    ratio = np.divide(t * (1 - t), r * (1 - r), out=np.zeros(t.shape), where=informative)
    return ((1 - 2 * p) * np.sqrt(ratio))[()]
