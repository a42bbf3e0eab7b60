"""Reward functions with TRL's contract: the checker, the noise channel on top of it, and the log of every completion.

TRL calls `f(prompts, completions, completion_ids, **columns, trainer_state, log_extra, log_metric)` once a
generation batch, completions of a prompt side by side, and expects one float (or None: withheld) a completion.
"""

from collections import Counter, defaultdict
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from lib import noise
from lib.answers import Verifier, normalize

if TYPE_CHECKING:
    pass

LOG_SCHEMA = pa.schema([
    ("step", pa.int32()), ("sample_id", pa.string()), ("rollout", pa.int16()),
    ("true_reward", pa.int8()),        # the checker's verdict on the answer
    ("verdict", pa.int8()),            # what entered the channel: the same, unless reward is format or majority
    ("observed_reward", pa.float32()), # what left it; missing if withheld
    ("returned", pa.float32()),        # what the trainer was given: the same, unless there is a mitigation
    ("changed", pa.bool_()),           # observed_reward differs from verdict, or is withheld
    ("format_ok", pa.bool_()), ("completion_tokens", pa.int32()), ("grader", pa.string())])


def text_of(completion) -> str:
    """The text of a completion, whether TRL passes a string or a list of chat messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def majority_reward(answers: list[str | None], groups) -> np.ndarray:
    """Votes instead of a checker: 1 where the normalised answer is its group's most common one (TTRL, 2504.16084).

    answers, groups: n answers and the problems they belong to. A tie goes to the answer given first.
    """
    votes: dict = defaultdict(Counter)
    said = [None if a is None else normalize(a) for a in answers]
    for group, answer in zip(groups, said, strict=True):
        if answer:
            votes[group][answer] += 1
    winner = {group: counts.most_common(1)[0][0] for group, counts in votes.items()}
    return np.array([int(bool(a) and a == winner[g]) for g, a in zip(groups, said, strict=True)])


def verdicts(grades, groups, source: str = "accuracy") -> np.ndarray:
    """What enters the channel, 0 or 1 (n,), from the checker's grades of n completions and their problems.

    "accuracy" is the checker's verdict; "format" accepts any parsable box (a control); "majority" lets the group vote.
    """
    if source not in ("accuracy", "format", "majority"):
        raise ValueError(f"reward={source!r} is unknown: choose accuracy, format or majority")
    if source == "majority":
        return majority_reward([g.answer for g in grades], groups)
    return np.array([g.correct if source == "accuracy" else g.method != "unparsed" for g in grades], int)


def noisy_reward(verifier: Verifier, chan: noise.Channel, noise_seed: int, log, source: str = "accuracy",
                 correct=lambda r, groups: r, clock=lambda: None):
    """The reward function of a run: grade, apply the channel, log every completion, report the rates to TRL.

    source: what enters the channel, see `verdicts`. The checker's own verdict is logged in any case.
    correct: maps observed rewards (n,) and their problems to what the trainer is given (see `estimator`).
    clock: called at the start and at the end, so that a run can say what its rewards cost.
    log: what each step is written to: `log.write(table)`, a pyarrow table with LOG_SCHEMA, a row a completion.
    The dataset needs the columns `sample_id` and `answer`.
    """
    verdicts([], [], source)  # an unknown source is refused now, not after the first rollouts

    def observed_reward(completions, completion_ids, answer, trainer_state, log_metric, sample_id=None, **_):
        if sample_id is None:
            raise ValueError(f"noise is drawn by problem, and the dataset has no column "
                             "sample_id: add one that names each problem")
        clock()
        texts = [text_of(c) for c in completions]
        grades = verifier.grade(list(answer), texts)
        t = np.array([g.correct for g in grades], int)
        format_ok = np.array([g.method != "unparsed" for g in grades])
        visits = defaultdict(count)
        rollout = np.array([next(visits[s]) for s in sample_id])
        step = np.full(len(t), trainer_state.global_step)
        verdict = verdicts(grades, sample_id, source)
        r = noise.observe(chan, verdict, noise_seed, step, sample_id, rollout)
        returned = correct(r, sample_id)
        log.write(pa.table([
            step, sample_id, rollout, t, verdict, r, returned, r != verdict, format_ok,
            [len(ids) for ids in completion_ids], [g.method for g in grades]], schema=LOG_SCHEMA))
        for name, value in realised_rates(t, r).items():
            if not np.isnan(value):  # a batch without a wrong answer has no false-positive rate
                log_metric(name, float(value))
        clock()
        return [None if np.isnan(x) else float(x) for x in returned]

    return observed_reward


# --- what people do against noise -------------------------------------------------------------------------------


def estimator(mitigation: str, a: float = 0.0, b: float = 0.0):
    """The function (observed rewards (n,), their problems) -> what the trainer is given, for assumed rates a and b.

    "backward" and "forward" are corrected rewards; "sgrpo" returns advantages, so TRL must not scale them again
    (`scale_rewards="none"`; their mean over a group is 0 already). ValueError where the rates make no sense for it.
    """
    if mitigation == "backward":
        backward_correction(0.0, a, b)
        return lambda r, _: backward_correction(r, a, b)
    if mitigation == "forward":
        return lambda r, _: forward_correction(r, b)
    if mitigation == "sgrpo":
        if a != b:
            raise ValueError(f"mitigation='sgrpo' is made for flips, a = b, but assumes a={a:g} and b={b:g}: set "
                             "assumed_false_positive_rate and assumed_false_negative_rate to one rate below 0.5")
        sgrpo_weight(0.5, a)
        return lambda r, groups: sgrpo_advantages(r, groups, a)
    if mitigation != "none":
        raise ValueError(f"mitigation={mitigation!r} is unknown: choose none, backward, forward or sgrpo")
    return lambda r, _: r


def sgrpo_advantages(r, groups, p: float) -> np.ndarray:
    """S-GRPO: each group's std-normalised advantages (n,), times w*(group mean, p). 0 in a group without signal."""
    import pandas as pd

    grouped = pd.Series(np.asarray(r, float)).groupby(list(groups))
    mean, std = grouped.transform("mean"), grouped.transform("std")
    return (sgrpo_weight(mean.to_numpy(), p) * ((r - mean) / (std + 1e-4))).to_numpy()


def backward_correction(rewards, a, b) -> np.ndarray:
    """(r - a) / J, whose mean given t is t (Natarajan et al. 2013; arXiv 2510.00915, 2510.18924)."""
    J = 1 - np.asarray(a) - b
    if np.any(np.abs(J) < 1e-12):
        raise ValueError("backward_correction divides by J = 1 - a - b, here 0: choose a + b other than 1.")
    return (np.asarray(rewards, dtype=float) - a) / J


def forward_correction(rewards, b) -> np.ndarray:
    """r - (1 - b): b for r = 1, b - 1 for r = 0. Its mean given t is J (t - 1).

    Our derivation of weights with the property that arXiv 2510.00915 asks for: the false-negative rate is enough.
    """
    return np.asarray(rewards, dtype=float) - (1 - b)


def sgrpo_weight(observed_mean, p) -> np.ndarray:
    """S-GRPO's factor w* on a group's std-normalised advantages, for flips at p < 1/2 (arXiv 2508.05928).

    w* = (1-2p) t (1-t) / [sqrt(r (1-r)) sqrt(t (1-t))], r = ``observed_mean``, t = clip((r-p)/(1-2p), 0, 1):
    the correlation of observed and true reward in a group with these means. 0 where t is 0 or 1.
    """
    r, p = np.asarray(observed_mean, float), np.asarray(p, float)
    if np.any(p >= 0.5):
        raise ValueError("sgrpo_weight needs observed and true reward to agree more often than not: "
                         "choose p below 0.5.")
    t = np.clip((r - p) / (1 - 2 * p), 0.0, 1.0)
    ratio = np.divide(t * (1 - t), r * (1 - r), out=np.zeros(t.shape), where=t * (1 - t) > 0)
    return ((1 - 2 * p) * np.sqrt(ratio))[()]


def realised_rates(true_reward, observed_reward) -> dict[str, float]:
    """Clean mean, observed mean, shares of wrong answers rewarded and of right answers not; NaN where undefined."""
    t, r = np.asarray(true_reward), np.asarray(observed_reward, float)
    kept = ~np.isnan(r)

    def share(rows, value):
        return float(np.mean(value[rows])) if rows.any() else float("nan")

    return {"clean_mean": float(np.mean(t)), "observed_mean": share(kept, r),
            "realised_false_positive_rate": share(kept & (t == 0), r == 1),
            "realised_false_negative_rate": share(kept & (t == 1), r == 0)}
