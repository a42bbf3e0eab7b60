"""Tables of a study as 03_eval writes them, made from a logistic model instead of trained policies."""
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import special

from lib.audit import rates_by_part, signal_table
from lib.noise import NAMED as RATES
from lib.noise import channel, describe, observe

TINY = [{}, *({"label_flip_rate": p} for p in (0.1, 0.2, 0.3, 0.4, 0.5)), *({"mask_rate": m} for m in (0.3, 0.6, 0.9))]


NAMED = [  # as in params/studies: names and references are templates
    {"name": "clean, G={num_generations}", "num_generations": [4, 8]},
    {"name": "flip .3 {noise_level}, G={num_generations}", "label_flip_rate": 0.3, "num_generations": [4, 8],
     "noise_level": ["rollout", "group"], "reference": "clean, G={num_generations}"}]


ABOUT = {"profile": "tiny", "model": "tiny", "data_dir": "arithmetic", "prompt_template": "none",
         "engine": "transformers"}


def expand(arms: list[dict]) -> list[dict]:
    """Arms with lists become one arm a combination; an arm that names no reference is its own."""
    found = []
    for arm in arms:
        lists = {k: v if isinstance(v, list) else [v] for k, v in arm.items()}
        found += [dict(zip(lists, values, strict=True)) for values in product(*lists.values())]
    return found


def reward_log(noise, seed, steps, G, prompts=6, ids=None):
    """A reward log of `steps` steps over prompts that differ in difficulty, and the prompts' levels.

    ids: the prompts in turn, one a group; all different if not given.
    """
    rng = np.random.default_rng(seed)
    ids = np.array([f"add/train:{i + 1}" for i in range(steps * prompts)] if ids is None else ids)
    q = special.expit(rng.normal(0, 1.3, len(ids)) + np.repeat(np.linspace(-0.8, 1.2, steps), prompts))
    log = pd.DataFrame({"step": np.repeat(np.arange(steps), prompts * G), "sample_id": np.repeat(ids, G),
                        "rollout": np.tile(np.arange(G), len(ids))})
    log["true_reward"] = log["verdict"] = (rng.random(len(log)) < np.repeat(q, G)).astype(int)
    log["observed_reward"] = observe(noise, log["verdict"], seed, log["step"], log["sample_id"].tolist(),
                                     log["rollout"])
    return log.assign(format_ok=True), pd.Series(np.where(q > 0.5, "Level 1", "Level 2"), index=ids)


def graded(asked: pd.DataFrame, logit: np.ndarray, k: int, rng: np.random.Generator) -> pd.DataFrame:
    """The table of one policy as 03_eval keeps it: k sampled answers and a greedy one to every question.

    asked: sample_id, level, type. logit: of a right sampled answer (questions,); the greedy one is surer.
    """
    frames = []
    for decoding, samples, sharper in (("sampled", k, 1.0), ("greedy", 1, 1.8)):
        right = rng.random((samples, len(asked))) < special.expit(sharper * logit)
        symbolic = right | (rng.random(right.shape) < 0.01)
        frames.append(asked.loc[asked.index.repeat(samples)].assign(
            decoding=decoding, sample=np.tile(np.arange(samples), len(asked)), exact=right.T.ravel(),
            symbolic=symbolic.T.ravel(), method=np.where(right.T.ravel(), "exact", "symbolic")))
    return pd.concat(frames, ignore_index=True)


def write_study(folder: Path, arms: list[dict] = TINY, seeds=(0, 1, 2), base_seeds=(0,), questions=120, k=4,
                steps=40, unfinished: dict[int, str] | None = None, rewards_log=False) -> Path:
    """Write runs.csv, summary.csv, eval.parquet, metrics.parquet and signals.parquet to `folder`; returns it.

    arms: parameters that differ from a clean run, and perhaps `name` and `reference` (see NAMED). unfinished:
    position of a run -> its status instead of done. rewards_log: also write replay.csv and rates.csv, whose counts
    give the realised rates.
    """
    rng = np.random.default_rng(0)
    difficulty, ids = rng.normal(0, 1.3, questions), np.array([f"add/test:{i + 1}" for i in range(questions)])
    level = np.where(difficulty > 0.7, "Level 1", np.where(difficulty > -0.7, "Level 2", "Level 3"))
    asked = pd.DataFrame({"sample_id": ids, "level": level, "type": "arithmetic"})
    runs, summary, evals, metrics, signals, proofs, rates = [], [], [], [], [], [], []

    def evaluate(run_id, skill):
        table = graded(asked, skill + difficulty + rng.normal(0, 0.4, questions), k, rng)
        evals.append((run_id, table))
        means = table.groupby("decoding")[["exact", "symbolic"]].mean()
        return {f"{d}_{g}": means.loc[d, g] for d, g in product(("sampled", "greedy"), ("exact", "symbolic"))} | {
            "n_questions": questions, "k": k, "disagreement": (table["exact"] != table["symbolic"]).mean()}

    for b in base_seeds:
        summary.append({"run_id": f"base-s{b}", "arm": "base", "channel": "base", "base_seed": b} | evaluate(
            f"base-s{b}", -0.8))
    for i, (arm, b, seed) in enumerate(product(expand(arms), base_seeds, seeds)):
        params = {name: rate.off for name, rate in RATES.items()} | ABOUT
        params |= {"noise_level": "rollout", "reward": "accuracy", "learning_rate": 1e-3,
                                              "grpo_beta": 0.0, "seed": seed, "base_seed": b, "noise_seed": seed,
                                              "per_device_train_batch_size": 128, "max_steps": steps,
                                              "num_generations": 8, "scale_rewards": "group", "mitigation": "none"}
        params |= {k: v for k, v in arm.items() if k not in ("name", "reference")}
        name, kind, rate = describe(params)
        name, named = arm.get("name", name).format(**params), "name" in arm
        reference = arm.get("reference", name if named else "clean").format(**params)
        noise = channel(**{c: params[c] for c in RATES}, noise_level=params["noise_level"])
        run_id = f"{describe(params)[0].replace(' ', '-')}-s{seed}-{i:08x}"
        status = (unfinished or {}).get(i, "done")
        about = {"arm": name, "channel": kind, "rate": rate, "reference": reference, "J": noise.J}
        if noise.by_difficulty:  # in all that follows, a mask of their mean
            noise = channel(mask_rate=np.mean(noise.false_negative_rate), noise_level=params["noise_level"])
        runs.append({"run_id": run_id, "status": status, "named": named} | about | params)
        if status != "done":
            continue
        gain = 3.2 * noise.J**0.5 if noise.J > 0 else -0.3
        skill = -0.8 + gain * (params["learning_rate"] / 1e-3) ** 0.2 + rng.normal(0, 0.12)
        summary.append({"run_id": run_id, "seed": seed, "base_seed": b} | about | evaluate(run_id, skill))
        step = np.arange(1, steps + 1)
        clean = special.expit(-0.8 + (skill + 0.8) * (1 - np.exp(-3 * step / steps))) + rng.normal(0, 0.03, steps)
        clean = clean.clip(0, 1)
        a, fn = noise.false_positive_rate, noise.false_negative_rate
        metrics.append(pd.DataFrame({
            "run_id": run_id, "step": step, "clean_mean": clean, "observed_mean": a + noise.J * clean,
            "realised_false_positive_rate": rng.binomial(70, a, steps) / 70,
            "realised_false_negative_rate": rng.binomial(58, fn, steps) / 58, "frac_reward_zero_std": 0.1}))
        log, levels = reward_log(noise, seed, steps, params["num_generations"])
        if params["reward"] == "accuracy" and not params["mask_rate_by_difficulty"]:
            signals.append(signal_table(log, levels, params["num_generations"], noise).assign(run_id=run_id))
        if rewards_log:
            rates.append(rates_by_part(log, levels).assign(run_id=run_id))
            shown = log[log["observed_reward"].notna()].groupby(["verdict", "observed_reward"]).size()
            names = {"false_positives": (0, 1), "true_negatives": (0, 0), "false_negatives": (1, 0),
                     "true_positives": (1, 1)}
            proofs.append({"run_id": run_id, "rows": len(log), "not_replayed": 0, "timeouts": 0} |
                          {name: shown.get(pair, 0) for name, pair in names.items()})

    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(runs).to_csv(folder / "runs.csv", index=False)
    if proofs:
        pd.DataFrame(proofs).to_csv(folder / "replay.csv", index=False)
        pd.concat(rates).to_csv(folder / "rates.csv", index=False)
    pd.DataFrame(summary).to_csv(folder / "summary.csv", index=False)
    pd.concat([t.assign(run_id=r) for r, t in evals]).to_parquet(folder / "eval.parquet")
    pd.concat(metrics).to_parquet(folder / "metrics.parquet")
    pd.concat(signals).to_parquet(folder / "signals.parquet")
    return folder
