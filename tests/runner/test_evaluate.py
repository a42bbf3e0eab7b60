"""runner.evaluate: answers are written whole and in bounded memory; kept tables and adapters are checked."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow.parquet import ParquetFile

from lib.report import count_answers
from runner import evaluate, parameters
from runner.evaluate import write_answers


def answered(rng, questions, k):
    """The table of one policy as 03_eval keeps it, in any order of rows."""
    ids = rng.permutation([f"q{i}" for i in range(questions)])
    rows = [(i, f"Level {1 + len(i) % 2}", "Addition", d, s) for i in ids
            for d, n in (("sampled", k), ("greedy", 1)) for s in range(n)]
    table = pd.DataFrame(rows, columns=["sample_id", "level", "type", "decoding", "sample"])
    exact, more = rng.random((2, len(table))) < [[0.6], [0.1]]
    table = table.assign(exact=exact, symbolic=exact | more, method=rng.choice(["exact", "unparsed"], len(table)))
    return table.iloc[rng.permutation(len(table))].reset_index(drop=True)


@settings(max_examples=15)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 4), st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_answers_written_in_pieces_are_those_of_one_table(tmp_path_factory, runs, questions, k, rows, seed):
    """Whatever the size of the pieces, the file holds all rows in their order, and counting them is a groupby."""
    rng, file = np.random.default_rng(seed), tmp_path_factory.mktemp("answers") / "eval.parquet"
    all_of = {f"r{i}": answered(rng, questions, k) for i in rng.permutation(runs)}
    write_answers(file, iter(all_of.items()), all_of, rows)
    groups = ParquetFile(file).metadata
    assert max(groups.row_group(i).num_rows for i in range(groups.num_row_groups)) <= max(rows, questions * (k + 1))
    whole = pd.concat([t.assign(run_id=r) for r, t in all_of.items()], ignore_index=True)
    back = pd.read_parquet(file)
    assert list(back["run_id"].cat.categories) == sorted(all_of)
    pd.testing.assert_frame_equal(back.astype(whole.dtypes), whole)
    found = count_answers(file)
    for name, column in (("n", 1), ("exact", whole["exact"]), ("symbolic", whole["symbolic"]),
                         ("differ", whole["exact"] != whole["symbolic"])):
        counted = whole.assign(hit=column).groupby(["decoding", "run_id", "sample_id"])["hit"].sum().unstack()
        pd.testing.assert_frame_equal(getattr(found, name), counted, check_dtype=False, check_index_type=False,
                                      check_column_type=False)
    assert found.difficulty.to_dict() == dict(zip(whole["sample_id"], whole["level"], strict=True))


def test_an_evaluation_that_stops_leaves_the_last_table(tmp_path):
    rng, file = np.random.default_rng(0), tmp_path / "eval.parquet"
    write_answers(file, [("a", answered(rng, 3, 2))], ["a"])
    before = file.read_bytes()

    def stops():
        yield "a", answered(rng, 3, 2)
        raise RuntimeError("the adapter of b changes nothing")

    with pytest.raises(RuntimeError, match="the adapter of b"):
        write_answers(file, stops(), ["a", "b"], rows=1)
    assert file.read_bytes() == before


BOUNDED = """
import resource, sys
from pathlib import Path
import numpy as np
from test_evaluate import answered
from lib.report import count_answers
from runner.evaluate import write_answers
from lib.stats import iqm

file, peak = Path(sys.argv[1]), []
table = answered(np.random.default_rng(0), 1000, 4)
for runs in (10, 120):
    names = [f"r{i}" for i in range(runs)]
    write_answers(file, ((name, table) for name in names), names, rows=40_000)
    counts = count_answers(file)
    iqm((counts.exact / counts.n).loc["sampled"].iloc[:10].to_numpy(), n_boot=runs * 20)
    peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # kB, bytes on macOS
print(*peak)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path):
    """600,000 answers and 2,400 resamples, in pieces, beside 50,000 and 200: all rows at once take 160 MB more.

    In pieces they took 44 to 60 MB more in eight tries.
    """
    done = subprocess.run([sys.executable, "-c", BOUNDED, tmp_path / "eval.parquet"], cwd=Path(__file__).parent,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    few, many = (int(peak) >> (20 if sys.platform == "darwin" else 10) for peak in done.stdout.split())  # MB
    assert many - few < 80


# ---- kept tables and adapters

class Engine:
    """Says how often it was asked; every adapter shifts the numbers of the base by `effect`."""

    def __init__(self, effect):
        self.effect, self.asked = effect, []

    def ask(self, adapter, prompts, k, temperature):
        self.asked.append(adapter)
        return [["a"] * k] * len(prompts)

    def numbers(self, adapter, prompt):
        return [0.0 if adapter is None else self.effect]

    def close(self):
        self.asked.append("closed")


def log_rewards(run, rewards):
    """The log of a run of one group that was given these rewards."""
    pd.DataFrame({"step": 0, "sample_id": "a", "returned": rewards}).to_parquet(run.folder / "rewards.parquet")


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A finished run in the store of a temporary workspace, and where its table and that of its base are kept."""
    monkeypatch.setattr(parameters, "WORK", tmp_path)
    run = parameters.resolve("tiny")
    (run.folder / "adapter").mkdir(parents=True)
    (run.folder / "adapter/adapter_model.safetensors").write_text("weights")
    (run.folder / "DONE").write_text(evaluate.runs.adapter_hash(run.folder) + "\n")
    log_rewards(run, [1.0, 0.0])
    return run, {"base-s0": tmp_path / "base.parquet", parameters.run_id(run): run.folder / "eval.parquet"}


def evaluated(run, kept, engine):
    """Names of the tables, from `tables_of` with an engine."""
    progress = []
    found = evaluate.tables_of([run], kept, start=lambda: engine, prompt="1+1=", progress=progress.append,
                               grade=lambda ask: pd.DataFrame({"text": ask(["1+1="], 2, 1.0)[0]}))
    return [name for name, _ in found], progress


def test_only_what_is_not_kept_is_asked(finished):
    run, kept = finished
    engine = Engine(effect=1.0)
    assert evaluated(run, kept, engine) == (list(kept), [0, 1])
    assert engine.asked == [None, run.folder / "adapter", "closed"]
    unused = Engine(effect=1.0)
    assert evaluated(run, kept, unused) == (list(kept), []) and unused.asked == []
    kept["base-s0"].unlink()
    again = Engine(effect=0.0)  # the kept table of the run needs no adapter
    assert evaluated(run, kept, again)[0] == list(kept) and again.asked == [None, "closed"]


def test_an_adapter_without_effect_is_refused_unless_its_run_had_no_signal(finished):
    run, kept = finished
    with pytest.raises(RuntimeError, match="changes nothing"):
        evaluated(run, kept, Engine(effect=0.0))
    log_rewards(run, [1.0, None])
    assert evaluated(run, kept, Engine(effect=0.0))[0] == list(kept)


def test_an_adapter_that_was_left_behind_is_named(finished):
    run, kept = finished
    (run.folder / "adapter/adapter_model.safetensors").unlink()
    with pytest.raises(RuntimeError, match="was left behind"):
        evaluated(run, kept, Engine(effect=1.0))


def test_runs_that_differ_in_their_prompts_are_not_evaluated_together():
    runs = [parameters.resolve("tiny"), parameters.resolve("tiny", max_completion_length=9)]
    with pytest.raises(ValueError, match="one evaluation has one data_dir, .*: make a study of each"):
        evaluate.engine_for(runs, None)
    with pytest.raises(ValueError, match="engine='unsloth': choose transformers or server"):
        evaluate.engine_for(runs[:1], "unsloth")
    assert evaluate.engine_for(runs[:1], None) == "transformers"
