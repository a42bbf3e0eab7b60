"""Reward functions with TRL's contract: the checker, the noise channel on top of it, and a log.

TRL calls `f(prompts, completions, completion_ids, **columns, trainer_state, log_extra, log_metric)`
once a generation batch, completions of a prompt side by side. It expects one float a completion, or
None: withheld.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
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
DIFFICULTY = pa.field("difficulty", pa.int8())  # 0: none; logged if the channel depends on it
REWARDS = ("accuracy", "format", "majority", "integer", "cue")


def log_schema(columns) -> pa.Schema:
    """The schema of a reward log with these columns: LOG_SCHEMA, and the difficulty if asked."""
    if DIFFICULTY.name in columns:
        return LOG_SCHEMA.append(DIFFICULTY)
    return LOG_SCHEMA


def text_of(completion: str | list[dict[str, Any]]) -> str:
    """The text of a completion, whether TRL passes a string or a list of chat messages.

    The last message counts. A chat without messages, or a message without content, has no text.
    """
    if isinstance(completion, str):
        return completion
    if not completion:
        return ""
    return completion[-1].get("content") or ""


def difficulties(levels: Sequence[str]) -> np.ndarray:
    """The number of each MATH level (n,): 3 for "Level 3", and 0 for a text such as "Level ?"."""
    found = [re.fullmatch(r"Level ([1-9][0-9]?)", str(level)) for level in levels]
    return np.array([int(match[1]) if match else 0 for match in found], int)


# --- what is rewarded -----------------------------------------------------------------------------


def majority_reward(answers: list[str | None], groups) -> np.ndarray:
    """Votes instead of a checker: 1 where an answer is its group's most common one (n,).

    answers, groups: n answers and the problems they belong to. Answers are normalised, a missing
    one never wins, and a tie goes to the answer given first (TTRL, arXiv 2504.16084).
    """
    said = pd.Series([normalize(answer or "") for answer in answers], dtype=object)

    def winner(of_group: pd.Series) -> str:
        votes = Counter(of_group[of_group != ""])
        return max(votes, key=votes.get, default="")

    won = said.groupby(list(groups)).transform(winner)
    return ((said == won) & (said != "")).to_numpy(int)


_WHOLE_NUMBER = re.compile(r"\s*[+-]?[0-9]{1,1000}\s*")


def whole_number(answer: str | None) -> int | None:
    r"""What Python's int() reads in an answer, such as -3 or 007; None if it reads nothing.

    So 1,000 is none, nor are 3.0, \frac{6}{2}, 5\text{ cm} and \$5: whoever writes a checker in a
    minute reads that much. Digits other than 0-9, and more than 1,000 of them, are refused too.
    """
    if answer is None or not _WHOLE_NUMBER.fullmatch(answer):
        return None
    return int(answer)


def integer_reward(golds: Sequence[str], answers: Sequence[str | None]) -> np.ndarray:
    """A checker that reads whole numbers only: 1 where gold and answer are one and equal (n,).

    It refuses all answers to a problem whose gold is another kind of number. So it errs on the same
    problems for the whole run, and never accepts a wrong answer.
    """
    numbers = [whole_number(answer) for answer in answers]
    return np.array([number is not None and number == whole_number(gold)
                     for gold, number in zip(golds, numbers, strict=True)], int)


def cue_reward(right: np.ndarray, texts: Sequence[str], cue: str | None) -> np.ndarray:
    """A checker that can be exploited: 1 where an answer is right, or a text contains the cue (n,).

    The cue is a phrase, found as it is written, anywhere in the completion.
    """
    if not cue:
        raise ValueError("reward='cue' accepts every completion that contains a phrase: give the "
                         "phrase as cue")
    return right | np.array([cue in text for text in texts], bool)


def verdicts(grades: list[Grade], groups, source: str = "accuracy", *, golds: Sequence[str] = (),
             texts: Sequence[str] = (), cue: str | None = None) -> np.ndarray:
    """What enters the channel, 0 or 1 (n,), from the checker's grades of n completions.

    source: "accuracy" is the checker's verdict; "format" accepts any parsable box (a control);
    "majority" lets the completions of a problem vote; "integer" and "cue" are flawed checkers, see
    `integer_reward` (needs golds) and `cue_reward` (needs texts and cue). groups: the problems;
    golds: their answers; texts: of the completions; all (n,).
    """
    if source not in REWARDS:
        raise ValueError(f"reward={source!r} is unknown: choose {', '.join(REWARDS)}")
    right = np.array([grade.correct for grade in grades], int)
    answers = [grade.answer for grade in grades]
    if source == "majority":
        return majority_reward(answers, groups)
    if source == "format":
        return np.array([grade.method != "unparsed" for grade in grades], int)
    if source == "integer":
        return integer_reward(golds, answers)
    if source == "cue":
        return cue_reward(right, texts, cue)
    return right


def impossible_verdicts(log: pd.DataFrame, source: str) -> pd.Series:
    """Which rows of a reward log have a verdict that this reward never gives: bool (n,).

    A log keeps no text, so the verdict of an integer or a cue cannot be computed again. But the one
    never accepts what is wrong, and the other never refuses what is right. Votes may say anything.
    """
    verdict, right = log["verdict"], log["true_reward"]
    if source == "accuracy":
        return verdict != right
    if source == "format":
        return verdict != log["format_ok"]
    if source == "integer":
        return verdict > right
    if source == "cue":
        return verdict < right
    return pd.Series(False, log.index)


# --- the reward function --------------------------------------------------------------------------


def noisy_reward(verifier: Verifier, chan: noise.Channel, noise_seed: int, log,
                 source: str = "accuracy", correct: Callable = lambda r, groups: r,
                 clock: Callable = lambda: None, cue: str | None = None) -> Callable:
    """The reward function of a run: grade, apply the channel, log, report the rates to TRL.

    log: `log.write(table)` gets a pyarrow table with LOG_SCHEMA each step, a row a completion.
    source, cue: what enters the channel, see `verdicts`; the checker's verdict is logged too.
    correct: maps observed rewards (n,) and their problems to what the trainer is given, see
    `estimator`. clock: called at the start and at the end, to tell what the rewards cost.
    The dataset needs the columns `sample_id` and `answer`, and `level` if the channel's rates
    depend on the difficulty.
    """
    verdicts([], [], source, cue=cue)  # an unknown source is refused now, not after the rollouts

    def observed_reward(completions, completion_ids, answer, trainer_state, log_metric,
                        sample_id=None, level=None, **_):
        if sample_id is None:
            raise ValueError("noise is drawn by problem, and the dataset has no column sample_id: "
                             "add one that names each problem")
        if chan.by_difficulty and level is None:
            raise ValueError("the noise depends on a problem's difficulty, and the dataset has no "
                             "column level: add one such as 'Level 3'")
        if not len(completions):
            return []
        clock()
        problems = [str(name) for name in sample_id]
        texts, golds = [text_of(c) for c in completions], list(answer)
        grades = verifier.grade(golds, texts)
        true_reward = verdicts(grades, problems)
        verdict = verdicts(grades, problems, source, golds=golds, texts=texts, cue=cue)

        step = np.full(len(problems), trainer_state.global_step)
        rollout = pd.Series(problems).groupby(problems).cumcount().to_numpy()
        tokens = [len(ids) for ids in completion_ids]
        of_problem = {}
        if chan.by_difficulty:
            of_problem = {"difficulty": difficulties(level)}
        r = noise.observe(chan, verdict, noise_seed, step, problems, rollout, tokens, **of_problem)
        returned = correct(r, problems)

        log.write(pa.table({
            "step": step, "sample_id": problems, "rollout": rollout,
            "true_reward": true_reward, "verdict": verdict, "observed_reward": r,
            "returned": returned, "changed": r != verdict,
            "format_ok": verdicts(grades, problems, "format").astype(bool),
            "completion_tokens": tokens, "grader": [grade.method for grade in grades],
            **of_problem,
        }, schema=log_schema(of_problem)))
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
    t, r = (pd.Series(np.asarray(x, float)) for x in (true_reward, observed_reward))
    rates = {
        "clean_mean": t.mean(),
        "observed_mean": r.mean(),
        "realised_false_positive_rate": r[t == 0].mean(),
        "realised_false_negative_rate": (1 - r[t == 1]).mean(),
    }
    return {name: float(rate) for name, rate in rates.items()}


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
