"""The gradient of one policy on MATH under every arm: `python gradient_pass.py PROFILE OUT.csv OPTIONS`.

It also writes `groups-PROFILE.csv` beside it: for each problem its difficulty, and how many of its completions are
right, have a box, were cut off and hold the cue. What rival theories predict is computed from that table.

OPTIONS is JSON: `prompts`, `directions` onto which scores are projected (0: none), `adapter` (a folder; without it the
base policy with a fresh adapter), and any parameter of a run. The completions come from a rollout server, one group a
problem. One forward and one backward pass give their scores, from which every arm follows in closed form
(`lib.gradient`). A row of the table is an arm on all problems, on those of one difficulty, or on those whose answers
are short or long. Intervals are over problems.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from peft import PeftModel, get_peft_model

from lib import gradient, rewards, theory
from lib.answers import Verifier, last_boxed
from lib.noise import Channel
from runner import dataset, parameters, policies, server, studies
from runner.engines import BASE
from runner.rollouts import request_seed

STUDIES = ("math-pairs", "math-natural", "math-curve", "math-exploit")
CUE = studies.load_study("math-exploit", "qwen2.5-coder-1.5b")[1][-1].cue
RESAMPLES = 400


def answers(params, tokenizer, problems, stops, adapter: str | None) -> list[list[list[int]]]:
    """Token ids of one group for each problem, from the base policy or with an adapter."""
    how = {"n": params.num_generations, "temperature": params.temperature,
           "max_tokens": params.max_completion_length, "stop_token_ids": stops}
    prompts = [tokenizer(prompt)["input_ids"] for prompt in problems["prompt"]]
    with server.client_for(params, "server") as client, ThreadPoolExecutor(64) as threads:
        if adapter:
            client.load("adapter", Path(adapter).resolve())

        def ask(i):
            return client.complete("adapter" if adapter else BASE, prompts[i], seed=request_seed(params.seed, i), **how)

        groups = list(threads.map(ask, range(len(prompts))))
    return [[completion.ids for completion in group] for group in groups]


def adapted(model, params, adapter: str | None):
    """The policy with its adapter. A fresh one has B = 0, so A has no gradient, and is not trained."""
    if adapter:
        return PeftModel.from_pretrained(model, adapter, is_trainable=True).eval()
    torch.manual_seed(params.seed)
    model = get_peft_model(model, policies.lora(params)).eval()
    for name, weight in model.named_parameters():
        if "lora_A" in name:
            weight.requires_grad_(False)
    return model


def scores_of(model, pairs: list[tuple[list[int], list[int]]], temperature: float, directions: int, at_once: int = 8):
    """Scores of (prompt, completion) pairs, (n, directions); pairs of like length are computed together."""
    order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))
    drawn = gradient.random_directions(model, directions) if directions else None
    found = {}
    for start in range(0, len(order), at_once):
        rows = order[start:start + at_once]
        width = max(sum(map(len, pairs[i])) for i in rows)
        ids, attended, written = torch.zeros(3, len(rows), width, dtype=torch.long, device=model.device)
        for row, i in enumerate(rows):
            prompt, completion = pairs[i]
            whole = torch.tensor(prompt + completion, device=model.device)
            ids[row, :len(whole)], attended[row, :len(whole)], written[row, len(prompt):len(whole)] = whole, 1, 1
        part = gradient.score_vectors(model, ids, attended, written, temperature=temperature, directions=drawn,
                                      batch_size=at_once)
        found |= dict(zip(rows, part.numpy(), strict=True))
    return np.stack([found[i] for i in range(len(pairs))])


def finite_groups(scores: np.ndarray) -> np.ndarray:
    """Which groups (M,) have finite scores. One that has not would spoil every product; how many is printed."""
    kept = np.isfinite(scores).all((1, 2))
    if not kept.all():
        print(f"{(~kept).sum()} of {len(kept)} groups have scores that are no numbers, and are left out")
    if not kept.any():
        raise ValueError("no group has finite scores: is the policy whole?")
    return kept


def under_channel(groups: gradient.Groups, chan: Channel, difficulty: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean gradient (M, D) and mean squared length (M,) of each group under a channel."""
    if not chan.by_difficulty:
        given = gradient.given_right(chan, groups.G)
        return gradient.mean_gradients(groups, given), gradient.mean_squares(groups, given)
    mean, square = np.zeros_like(groups.right), np.zeros(len(groups.k))
    for one in np.unique(difficulty):
        given = gradient.given_right(Channel(0.0, chan.false_negative_rate[one - 1], chan.noise_level), groups.G)
        here = difficulty == one
        mean[here] = gradient.mean_gradients(groups, given)[here]
        square[here] = gradient.mean_squares(groups, given)[here]
    return mean, square


def under_rewards(scores: np.ndarray, rewarded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same for rewards that are not drawn (M, G), such as those of a flawed checker."""
    mean = np.einsum("mg,mgd->md", theory.advantages(rewarded), scores)
    return mean, (mean**2).sum(1)


def row(mean, square, reference, of_step: int, chosen: np.ndarray, draws: np.ndarray) -> dict[str, float]:
    """Cosine, length and signal-to-noise of a step of `of_step` groups of these problems; intervals over problems."""
    p = gradient.Products(mean @ mean.T, mean @ reference.T, reference @ reference.T, (mean**2).sum(1), square,
                          np.ones(len(mean)))
    with np.errstate(invalid="ignore"):  # a resample may hold none of the chosen problems
        one, many = (gradient.step(p, of_step, weights) for weights in (chosen, chosen * draws))
        low, high = np.nanquantile(many.cosine, [0.025, 0.975])
        return {"problems": int(chosen.sum()), "cosine": one.cosine, "low": low, "high": high, "length": one.length,
                "signal_to_noise": one.signal_to_noise}


def arms_of(profile: str) -> dict[str, parameters.Params]:
    """The arms of the studies, by name."""
    arms = {}
    for name in STUDIES:
        study, grid = studies.load_study(name, profile)
        arms |= {study.arm_and_reference(p)[0]: p for p in grid}
    return arms


def main(profile: str, out: Path, prompts: int = 512, directions: int = 2048, adapter: str | None = None, **given):
    """Sample, grade, score, and write the table."""
    torch.backends.cuda.matmul.allow_tf32 = True  # fp32 in three times the speed; scores need no more digits
    params = parameters.resolve(profile, use_selected=True, **{"engine": "server", **given})
    model, tokenizer = policies.load_policy(params, "transformers")
    rows, _ = policies.as_prompts(dataset.load_split(params.data_dir, "train"), params, tokenizer)
    difficulty = rewards.difficulties(rows["level"])
    chosen = np.random.default_rng(1).permutation(np.flatnonzero(difficulty))[:prompts]
    problems, difficulty = rows.select(chosen), difficulty[chosen]

    model = model.float()
    completions = answers(params, tokenizer, problems, model.generation_config.eos_token_id, adapter)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for group in completions for ids in group]
    golds = np.repeat(problems["answer"], params.num_generations).tolist()
    verifier = Verifier(workers=params.num_threads)
    grades = verifier.grade(golds, texts)
    verifier.close()
    shape = len(problems), params.num_generations
    t = rewards.verdicts(grades, golds).reshape(shape)
    how = {"golds": golds, "texts": texts, "cue": CUE}
    flawed = {source: rewards.verdicts(grades, golds, source, **how).reshape(shape)
              for source in ("integer", "cue", "format")}
    length = np.reshape([len(ids) for group in completions for ids in group], shape).mean(1)

    starts = [tokenizer(prompt)["input_ids"] for prompt in problems["prompt"]]
    pairs = [(start, ids) for start, group in zip(starts, completions, strict=True) for ids in group]
    scores = scores_of(adapted(model, params, adapter), pairs, params.temperature, directions).reshape(*shape, -1)
    write_groups(out.with_name(f"groups-{profile}.csv"), problems, completions, texts, t, params)
    kept = finite_groups(scores)
    flawed = {source: accepted[kept] for source, accepted in flawed.items()}
    write_table(out, arms_of(profile), flawed, *(x[kept] for x in (scores, t, difficulty, length)))


def write_groups(out: Path, problems, completions, texts: list[str], t: np.ndarray, params):
    """A row for each problem: how many of its completions are right, boxed, cut off, and hold the cue."""
    lengths = np.reshape([len(ids) for group in completions for ids in group], t.shape)
    cut = lengths >= params.max_completion_length
    boxed = np.reshape([last_boxed(text) is not None for text in texts], t.shape)
    cue = np.reshape([CUE in text for text in texts], t.shape)
    table = pd.DataFrame({"difficulty": rewards.difficulties(problems["level"]), "right": t.sum(1).astype(int),
                          "of": t.shape[1], "boxed": boxed.sum(1), "cut": cut.sum(1), "cue": cue.sum(1),
                          "cue_in_wrong": (cue & (t == 0)).sum(1)})
    out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(out, index=False)


def write_table(out: Path, arms, flawed, scores, t, difficulty, length):
    """A row for each arm and each part of the problems. flawed: what each flawed checker accepts, (M, G).

    The step is that of the arms: so many groups as they ask in one.
    """
    groups = gradient.groups(scores, t)
    reference = gradient.mean_gradients(groups, gradient.given_right(Channel(), groups.G))
    parts = {"all": np.ones(len(t)), "short answers": 1.0 * (length <= np.median(length)),
             "long answers": 1.0 * (length > np.median(length))}
    parts |= {f"difficulty {one}": 1.0 * (difficulty == one) for one in np.unique(difficulty)}
    draws = np.random.default_rng(0).multinomial(len(t), np.full(len(t), 1 / len(t)), RESAMPLES)
    table = []
    for arm, params in arms.items():
        if params.reward in flawed:
            found = under_rewards(scores, flawed[params.reward])
        else:
            found = under_channel(groups, params.channel, difficulty)
        table += [{"arm": arm, "part": part} | row(*found, reference, params.prompts_per_step, chosen, draws)
                  for part, chosen in parts.items()]
    out.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(table).assign(right=t.mean(), mixed=((t.sum(1) > 0) & (t.sum(1) < t.shape[1])).mean()).to_csv(
        out, index=False, float_format="%.5g")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), **json.loads(sys.argv[3]))
