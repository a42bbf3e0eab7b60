"""lib.report: graded answers are counted right, and tables say what is wrong with them."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.report import accuracy_matrix, count_answers, write_answers
from lib.stats import pair, paired_difference

# ---- graded answers

def answered(rng, questions, k):
    """The table of one policy as 03_eval keeps it, in any order of rows."""
    ids = rng.permutation([f"q{i}" for i in range(questions)])
    rows = [(i, f"Level {1 + len(i) % 2}", "Addition", d, s) for i in ids
            for d, n in (("sampled", k), ("greedy", 1)) for s in range(n)]
    table = pd.DataFrame(rows, columns=["sample_id", "level", "type", "decoding", "sample"])
    exact, more = rng.random((2, len(table))) < [[0.6], [0.1]]
    table = table.assign(exact=exact, symbolic=exact | more, method=rng.choice(["exact", "unparsed"], len(table)))
    return table.iloc[rng.permutation(len(table))].reset_index(drop=True)


@pytest.fixture
def tables(tmp_path):
    """A function that counts a table of answers, the table, and its runs."""
    runs = pd.DataFrame({"run_id": ["a", "b", "c"], "arm": ["clean", "clean", "flip 0.2"],
                         "base_seed": 0, "seed": [1, 0, 0]})
    rows = [(r, q, "Level 1", "sampled", s, (i + j + s) % 2 == 0, True) for i, r in enumerate("abc")
            for j, q in enumerate(["q1", "q2", "q3"]) for s in range(2)]
    evals = pd.DataFrame(rows, columns=["run_id", "sample_id", "level", "decoding", "sample", "exact", "symbolic"])

    def count(table):
        table.to_parquet(tmp_path / "eval.parquet")
        return count_answers(tmp_path / "eval.parquet")

    return count, evals, runs


@settings(max_examples=15)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 4), st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_answers_written_in_pieces_are_those_of_one_table(tmp_path_factory, runs, questions, k, rows, seed):
    """Whatever the size of the pieces, the file holds all rows in their order, and counting them is a groupby."""
    rng, file = np.random.default_rng(seed), tmp_path_factory.mktemp("answers") / "eval.parquet"
    all_of = {f"r{i}": answered(rng, questions, k) for i in rng.permutation(runs)}
    write_answers(file, iter(all_of.items()), all_of, rows)
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
from test_report import answered
from lib.report import count_answers, write_answers
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


def test_memory_does_not_grow_with_the_rows(tmp_path):
    """600,000 answers and 2,400 resamples, in pieces, beside 50,000 and 200: all rows at once take 160 MB more."""
    done = subprocess.run([sys.executable, "-c", BOUNDED, tmp_path / "eval.parquet"], cwd=Path(__file__).parent,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    few, many = (int(peak) >> (20 if sys.platform == "darwin" else 10) for peak in done.stdout.split())  # MB
    assert many - few < 50


def test_accuracy_matrix_averages_samples(tables):
    count, evals, runs = tables
    answers = count(evals)
    found = accuracy_matrix(answers, runs, "clean")
    assert list(found.index) == [(0, 0), (0, 1)] and list(found.columns) == ["q1", "q2", "q3"]
    assert (found.to_numpy() == 0.5).all()
    assert (accuracy_matrix(answers, runs, "clean", grader="symbolic").to_numpy() == 1).all()


def test_pair_uses_the_common_seeds_and_counts_the_rest(tables):
    count, evals, runs = tables
    clean, noisy = (accuracy_matrix(count(evals), runs, arm) for arm in ("clean", "flip 0.2"))
    x, y, dropped = pair(clean, noisy)
    assert x.shape == y.shape == (1, 3) and dropped == 1


def test_errors_name_the_cause(tables):
    count, evals, runs = tables
    answers = count(evals)
    with pytest.raises(ValueError, match="no run in arm 'mask 0.3'; arms present: .'clean', 'flip 0.2'"):
        accuracy_matrix(answers, runs, "mask 0.3")
    with pytest.raises(ValueError, match="expected 'exact' or 'symbolic'"):
        accuracy_matrix(answers, runs, "clean", grader="regex")
    with pytest.raises(ValueError, match=r"no 'greedy' rows in the eval table for \['a', 'b'\]"):
        accuracy_matrix(answers, runs, "clean", decoding="greedy")
    with pytest.raises(ValueError, match=r"no 'sampled' rows in the eval table for \['b'\]"):
        accuracy_matrix(count(evals[evals["run_id"] != "b"]), runs, "clean")
    with pytest.raises(ValueError, match=r"several runs with one \(base_seed, seed\): \['a', 'b'\]"):
        accuracy_matrix(answers, runs.assign(seed=0), "clean")
    partial = count(evals[(evals["run_id"] != "a") | (evals["sample_id"] != "q3")])
    with pytest.raises(ValueError, match="different questions, .*'a': 2, 'b': 3"):
        accuracy_matrix(partial, runs, "clean")
    with pytest.raises(ValueError, match="1 in one arm only, such as .'q3'"):
        clean = accuracy_matrix(answers, runs, "clean")
        pair(clean.drop(columns="q3"), accuracy_matrix(answers, runs, "flip 0.2"))
    with pytest.raises(ValueError, match="no common seed"):
        other = accuracy_matrix(answers, runs.assign(seed=7), "flip 0.2")
        paired_difference(accuracy_matrix(answers, runs, "clean"), other)
