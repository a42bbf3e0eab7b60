"""Reward functions with TRL's contract: the checker, the noise channel on top of it, and the log of every completion.

TRL calls `f(prompts, completions, completion_ids, **columns, trainer_state, log_extra, log_metric)` once a
generation batch, completions of a prompt side by side, and expects one float (or None: withheld) a completion.
"""

import os
import shutil
from collections import defaultdict
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lib import noise
from lib.answers import Verifier, last_boxed

LOG_SCHEMA = pa.schema([
    ("step", pa.int32()), ("sample_id", pa.string()), ("rollout", pa.int16()), ("true_reward", pa.int8()),
    ("observed_reward", pa.float32()), ("changed", pa.bool_()), ("format_ok", pa.bool_()),
    ("completion_tokens", pa.int32()), ("grader", pa.string())])


def text_of(completion) -> str:
    """The text of a completion, whether TRL passes a string or a list of chat messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def accuracy_reward(verifier: Verifier):
    """A reward function: 1.0 where the last box of the completion holds the column `answer`, else 0.0."""
    def accuracy(completions, answer, **_):
        return [float(g.correct) for g in verifier.grade(list(answer), [text_of(c) for c in completions])]
    return accuracy


def format_reward(completions, **_):
    """1.0 where the last box is closed and not blank, else 0.0: the answer in it is not looked at."""
    return [float(bool((last_boxed(text_of(c)) or "").strip())) for c in completions]


def noisy_reward(verifier: Verifier, chan: noise.Channel, noise_seed: int, log_folder, source: str = "accuracy"):
    """The reward function of a run: grade, apply the channel, log every completion, report the rates to TRL.

    source: "accuracy" sends the checker's verdict through the channel; "format" rewards any parsable box (a control:
    the verdict is logged as the true reward, but never shown to the trainer).
    The dataset needs the columns `sample_id` and `answer`. One file a step appears in `log_folder`.
    """
    if source not in ("accuracy", "format"):
        raise ValueError(f"reward={source!r} is unknown: choose accuracy or format")
    folder = Path(log_folder)
    folder.mkdir(parents=True, exist_ok=True)

    def observed_reward(completions, completion_ids, sample_id, answer, trainer_state, log_metric, **_):
        texts = [text_of(c) for c in completions]
        grades = verifier.grade(list(answer), texts)
        t = np.array([g.correct for g in grades], int)
        format_ok = np.array([g.method != "unparsed" for g in grades])
        visits = defaultdict(count)
        rollout = np.array([next(visits[s]) for s in sample_id])
        step = np.full(len(t), trainer_state.global_step)
        shown = t if source == "accuracy" else format_ok.astype(int)
        r = noise.observe(chan, shown, noise_seed, step, sample_id, rollout)
        write_step(folder, pa.table([
            step, sample_id, rollout, t, r, r != t, format_ok, [len(ids) for ids in completion_ids],
            [g.method for g in grades]], schema=LOG_SCHEMA))
        for name, value in realised_rates(t, r).items():
            if not np.isnan(value):  # a batch without a wrong answer has no false-positive rate
                log_metric(name, float(value))
        return [None if np.isnan(x) else float(x) for x in r]

    return observed_reward


def realised_rates(true_reward, observed_reward) -> dict[str, float]:
    """Clean mean, observed mean, shares of wrong answers rewarded and of right answers not; NaN where undefined."""
    t, r = np.asarray(true_reward), np.asarray(observed_reward, float)
    kept = ~np.isnan(r)

    def share(rows, value):
        return float(np.mean(value[rows])) if rows.any() else float("nan")

    return {"clean_mean": float(np.mean(t)), "observed_mean": share(kept, r),
            "realised_false_positive_rate": share(kept & (t == 0), r == 1),
            "realised_false_negative_rate": share(kept & (t == 1), r == 0)}


def write_step(folder: Path, table: pa.Table):
    """One generation step as one file, so a kill between steps loses nothing and a repeated step replaces itself."""
    name = folder / f"step-{table['step'][0].as_py():06d}.parquet"
    memory = pa.BufferOutputStream()  # one system call instead of thirty small ones
    pq.write_table(table, memory, compression="none", use_dictionary=False, write_statistics=False)
    name.with_suffix(".part").write_bytes(memory.getvalue())
    os.replace(name.with_suffix(".part"), name)


def drop_steps_from(log_folder, step: int):
    """Forget the log of `step` and later: a resumed run does those steps again."""
    for file in Path(log_folder).glob("step-*.parquet"):
        if int(file.stem.split("-")[1]) >= step:
            file.unlink()
    joined = Path(log_folder).parent / "rewards.parquet"
    if joined.exists():  # the run was killed between joining its log and being done
        log = pd.read_parquet(joined)
        _write_log(joined, log[log.step < step])


def read_log(run_folder) -> pd.DataFrame:
    """The reward log of a run, finished or not: a row a completion, in the order of steps (columns: LOG_SCHEMA)."""
    whole, parts = Path(run_folder) / "rewards.parquet", sorted(Path(run_folder).glob("rewards/step-*.parquet"))
    if not whole.exists() and not parts:
        raise FileNotFoundError(f"{Path(run_folder).name} has no reward log: it stopped before its first step")
    steps = [pd.read_parquet(p) for p in parts]
    if whole.exists():  # with step files beside it after a kill: a step's own file is the newer one
        joined = pd.read_parquet(whole)
        steps.insert(0, joined[~joined.step.isin({s.step.iloc[0] for s in steps})])
    return pd.concat(steps).sort_values("step", kind="stable", ignore_index=True)


def join_log(run_folder):
    """Join the steps' files into `rewards.parquet` (atomically), then remove them."""
    _write_log(Path(run_folder) / "rewards.parquet", read_log(run_folder))
    if (Path(run_folder) / "rewards").exists():
        shutil.rmtree(Path(run_folder) / "rewards")


def _write_log(path: Path, log: pd.DataFrame):
    part = path.with_name(path.name + ".part")
    pq.write_table(pa.Table.from_pandas(log, LOG_SCHEMA, preserve_index=False), part)
    os.replace(part, path)
