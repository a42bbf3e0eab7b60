"""What 03_eval asks, keeps and writes: engines for all adapters of a study, answers, summary.csv.

An engine has three methods. `ask(adapter, prompts, k, temperature)` returns k texts a prompt,
`numbers(adapter, prompt)` what an adapter makes of a prompt, and `close()` ends it. An adapter is
the folder of its weights, or None for the base policy.
"""

import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import disable_progress_bars
from transformers.utils import logging as transformers_logging

from lib import report
from runner import engines, files, parameters, policies, rewardlog, runs, server
from runner.engines import BASE
from runner.rollouts import AT_ONCE, request_seed

ALIKE = {"model", "prompt_template", "data_dir", "max_prompt_length", "max_completion_length"}
SERVERS_A_GPU = 2  # one keeps its own thread busy before the GPU is
LABELS = ["sample_id", "level", "type", "decoding", "method"]


class Transformers:
    """Loads each adapter into the base policy, and takes it out again."""

    def __init__(self, policy, tokenizer, params: parameters.Params, seed: int):
        self.policy, self.tokenizer, self.seed = policy, tokenizer, seed
        self.length = params.max_completion_length
        self.batch_size = 1024
        if policy.device.type == "cuda":
            self.batch_size = min(8192, 2**20 // (params.max_prompt_length + self.length))

    def ask(self, adapter, prompts, k, temperature):
        with policies.adapted(self.policy, adapter) as model:
            return policies.sample(model, self.tokenizer, prompts, self.length, k=k, seed=self.seed,
                                   temperature=temperature, batch_size=self.batch_size)

    def numbers(self, adapter, prompt):
        with policies.adapted(self.policy, adapter) as model, torch.inference_mode():
            inputs = self.tokenizer(prompt, return_tensors="pt").to(model.device)
            return model(**inputs).logits[0, -1].tolist()

    def close(self):
        """Nothing to end."""


class Served:
    """vLLM servers, which are given each adapter in turn; each answers a part of the questions."""

    def __init__(self, of: list[parameters.Params], tokenizer, stop_token_ids, seed: int):
        torch.cuda.empty_cache()
        log = server.log_folder(of[0]) / "evaluation"
        self.stack = ExitStack()
        self.clients = self.stack.enter_context(
            server.clients(of, log, completions=AT_ONCE, on_a_gpu=SERVERS_A_GPU))
        self.tokenizer, self.seed = tokenizer, seed
        self.length = max(params.max_completion_length for params in of)
        self.stop = list(stop_token_ids)
        self.loaded: Path | None = None
        self.process = secrets.token_hex(2)

    def _use(self, adapter: Path | None) -> str:
        """Have all servers know this adapter; returns its name there."""
        if adapter is None:
            return BASE
        if adapter != self.loaded:
            self._forget()
            for client in self.clients:
                client.load(self._name(adapter), adapter)
            self.loaded = adapter
        return self._name(adapter)

    def _forget(self):
        if self.loaded:
            for client in self.clients:
                client.unload(self._name(self.loaded))
            self.loaded = None

    def _name(self, adapter: Path) -> str:
        """A name that no other adapter and no other evaluation has."""
        return f"evaluation-{self.process}-{files.digest(str(adapter))}"

    def ask(self, adapter, prompts, k, temperature):
        name = self._use(adapter)
        ids = self.tokenizer(list(prompts))["input_ids"]

        def answer(j: int) -> list[str]:
            client = self.clients[j % len(self.clients)]
            found = client.complete(
                name, ids[j], n=k, temperature=temperature, max_tokens=self.length,
                seed=request_seed(self.seed, j), stop_token_ids=self.stop)
            return self.tokenizer.batch_decode([completion.ids for completion in found],
                                               skip_special_tokens=True)

        with ThreadPoolExecutor(AT_ONCE * len(self.clients)) as threads:
            return list(threads.map(answer, range(len(ids))))

    def numbers(self, adapter, prompt):
        name = self._use(adapter)
        return self.clients[0].score(name, self.tokenizer(prompt)["input_ids"])

    def close(self):
        self._forget()
        self.stack.close()


def start(engine: str, policy, tokenizer, of: list[parameters.Params], seed: int):
    """An engine for the runs `of`. A server loads the base policy itself: ours leaves the GPU."""
    if engine == "transformers":
        return Transformers(policy, tokenizer, of[0], seed)
    stop_token_ids = policy.generation_config.eos_token_id
    policy.to("cpu")
    return Served(of, tokenizer, stop_token_ids, seed)


def engine_for(grid: list[parameters.Params], engine: str | None) -> str:
    """Which engine writes the answers, after checking that one evaluation can serve all runs."""
    if engine is None:
        engine = grid[0].engine if grid[0].engine in engines.SHARING else "server"
    if engine not in engines.SHARING:
        raise ValueError(f"engine={engine!r}: choose {' or '.join(engines.SHARING)}")
    engines.check_engine(engine)
    shared = {tuple(params.model_dump(include=ALIKE).items()) for params in grid}
    if len(shared) > 1:
        raise ValueError(f"one evaluation has one {', '.join(sorted(ALIKE))}: make a study of each")
    return engine


def be_quiet():
    """No progress bars and warnings of libraries between the results of a notebook."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()


# --- tables that are kept, and the check of an adapter ---


def keep(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Write the table, so that it appears when it is whole; returns it as it will be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, table.to_parquet(index=False))
    return pd.read_parquet(path)


def check_adapter(params: parameters.Params, engine, prompt: str, of_base: list[float]):
    """RuntimeError unless the run's adapter is there, and changes what the base does.

    It may change nothing if no group of the run had two different rewards: it is empty then.
    """
    name = parameters.run_id(params)
    if not (params.folder / runs.WEIGHTS).exists():
        raise RuntimeError(f"the adapter of {name} was left behind, and these answers were not "
                           "asked: delete the run and repeat it")
    if not rewardlog.rewards_differed(params.folder):
        return
    with_adapter = engine.numbers(params.folder / "adapter", prompt)
    if np.allclose(with_adapter, of_base, rtol=0, atol=1e-4):
        raise RuntimeError(f"the adapter of {name} changes nothing: it was not trained or not "
                           "loaded")


def tables_of(of: list[parameters.Params], kept: dict[str, Path], start: Callable, grade: Callable,
              prompt: str, progress: Callable[[int], None]) -> Iterator[tuple[str, pd.DataFrame]]:
    """(name, table of answers) of a base policy and of the runs `of` that started from it.

    kept: name -> where the table is kept, the base policy first; only what is not there is asked.
    start() is the engine, grade(ask) the table of one policy, `prompt` what shows that an adapter
    has an effect, and progress(n) is told how many runs are done.
    """
    if all(path.exists() for path in kept.values()):  # nothing to ask: no engine
        yield from ((name, pd.read_parquet(path)) for name, path in kept.items())
        return
    engine = start()
    try:
        of_base = engine.numbers(None, prompt)
        adapters = [None, *(params.folder / "adapter" for params in of)]
        for n, ((name, path), adapter) in enumerate(zip(kept.items(), adapters, strict=True)):
            if path.exists():
                table = pd.read_parquet(path)
            else:
                if adapter is not None:
                    check_adapter(of[n - 1], engine, prompt, of_base)
                table = keep(path, grade(partial(engine.ask, adapter)))
            progress(n)
            yield name, table
    finally:
        engine.close()


# --- tables of the study ---


def write_answers(path: Path, tables: Iterable[tuple[str, pd.DataFrame]], run_ids: Iterable[str],
                  rows: int = 2**20):
    """Write eval.parquet from (run_id, table) pairs; the file appears when it is complete.

    A table has a row an answer: sample_id, level, type, decoding, sample, exact, symbolic, method.
    `run_ids`: all that will come. About `rows` rows are held at a time and become a row group.
    """
    names = pd.CategoricalDtype(sorted(run_ids))  # the first row group fixes the types of the file
    types = dict.fromkeys(LABELS, "category") | {"sample": "int8", "run_id": names}
    groups = (pa.Table.from_pandas(group.astype(types), preserve_index=False)
              for group in _row_groups(tables, rows))
    first = next(groups)
    part = Path(path).with_suffix(".part")
    with pq.ParquetWriter(part, first.schema, compression="zstd") as writer:
        for group in chain([first], groups):
            writer.write_table(group.cast(first.schema))
    os.replace(part, path)


def _row_groups(tables: Iterable[tuple[str, pd.DataFrame]], rows: int) -> Iterator[pd.DataFrame]:
    """Whole tables of policies, joined until they have about `rows` rows."""
    held, length = [], 0
    for run_id, table in tables:
        if held and length + len(table) > rows:
            yield pd.concat(held, ignore_index=True)
            held, length = [], 0
        held.append(table.assign(run_id=run_id))
        length += len(table)
    yield pd.concat(held, ignore_index=True)


def summarise(answers: report.Answers, runs: pd.DataFrame) -> pd.DataFrame:
    """The table summary.csv: a row for each base policy and each run of `runs` that has answers.

    `standard_error` is that of one run's sampled accuracy over questions; `disagreement` is the
    share of sampled answers on which the graders differ.
    """
    n, exact, differ = (t.loc["sampled"] for t in (answers.n, answers.exact, answers.differ))
    scores = {"n_questions": (n > 0).sum(axis=1), "k": n.max(axis=1)}
    for decoding in ("sampled", "greedy"):
        asked = answers.n.loc[decoding].sum(axis=1)
        for grader in ("exact", "symbolic"):
            right = getattr(answers, grader).loc[decoding].sum(axis=1)
            scores[f"{decoding}_{grader}"] = right / asked
    scores["standard_error"] = (exact / n).sem(axis=1)
    scores["disagreement"] = differ.sum(axis=1) / n.sum(axis=1)

    bases = pd.DataFrame([{"run_id": f"base-s{b}", "arm": "base", "channel": "base", "rate": 0.0,
                           "J": np.nan, "seed": -1, "base_seed": b}
                          for b in runs["base_seed"].unique()])
    about = runs[["run_id", "arm", "reference", "channel", "rate", "J", "seed", "base_seed"]]
    policies = pd.concat([bases, about]).set_index("run_id")
    return policies.join(pd.DataFrame(scores), how="inner").reset_index(names="run_id")
