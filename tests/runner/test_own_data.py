"""Problems of one's own and GSM8K: any field names, three forms of an answer, test problems drawn or given."""

import json
import os
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from loopback_hub import serve
from test_dataset import make_in_new_process

from runner import ROOT
from runner.dataset import load_split, make_dataset, read_manifest
from runner.parts import Fields, own_row
from runner.problems import write_jsonl

GSM8K_DIR = Path(os.environ.get("GSM8K_DIR", ROOT.parent / "shared/data/gsm8k"))


def sums(n, start=0):
    """Rows as GSM8K writes them, of one or two calculations."""
    rows = []
    for i in range(start, start + n):
        steps = f"First <<{i}+1={i + 1}>>{i + 1}."
        if i % 2:
            steps += f" Then <<{i + 1}+1={i + 2}>>{i + 2}."
        rows.append({"question": f"{i}+{1 + i % 2}=?", "answer": f"{steps}\n#### {i + 1 + i % 2}"})
    return rows


@pytest.mark.parametrize("answer, gold, level, solution", [
    (r"So $\boxed{6}$, no: \boxed{7}.", "7", "Level ?", r"So $\boxed{6}$, no: \boxed{7}."),
    ("3+4=<<3+4=7>>7.\n#### 7", "7", "Level 1", "3+4=7.\n\\boxed{7}"),
    ("<<1=1>>" * 9 + "#### 1,000", "1,000", "Level 5", r"\boxed{1,000}"),
    ("#### Step 1\nadd\n#### Step 2\n" + r"\boxed{7}", "7", "Level ?",  # headings of Markdown
     "#### Step 1\nadd\n#### Step 2\n" + r"\boxed{7}"),
    (7, "7", "Level ?", r"\boxed{7}"),
    (0.5, "0.5", "Level ?", r"\boxed{0.5}"),
    (" Paris ", "Paris", "Level ?", r"\boxed{Paris}"),
    (r"\frac{1}{2}", r"\frac{1}{2}", "Level ?", r"\boxed{\frac{1}{2}}"),
])
def test_three_forms_of_an_answer(answer, gold, level, solution):
    row = own_row({"problem": "What is it?", "answer": answer}, "mine.jsonl:1", Fields())
    assert row == {"problem": "What is it?", "level": level, "type": "Problem", "solution": solution, "answer": gold}


def test_difficulty_and_subject_from_named_fields():
    fields = Fields("q", "a", "grade", "topic")
    for grade in (3, "3", "Level 3"):
        row = own_row({"q": "3+4", "a": "<<3+4=7>>#### 7", "grade": grade, "topic": "Sums"}, "f:1", fields)
        assert (row["level"], row["type"]) == ("Level 3", "Sums")


@pytest.mark.parametrize("row, fields, message", [
    ({"question": "1+1", "answer": 2}, Fields(),
     "f:7: there is no field 'problem'; the row has question, answer: name one of them with -p problem_field NAME"),
    ({"problem": "1+1", "gold": 2}, Fields(), "f:7: there is no field 'answer'; the row has problem, gold: name"),
    ({"problem": "1+1", "answer": 2}, Fields(level="grade"), "name one of them with -p level_field NAME"),
    ({"problem": "1+1", "answer": 2, "level": "hard"}, Fields(level="level"),
     "f:7: field 'level' holds 'hard', and a difficulty is 1 to 5"),
    ({"problem": "1+1", "answer": True}, Fields(), "f:7: field 'answer' is not a non-empty text"),
    ({"problem": "1+1", "answer": ["2"]}, Fields(), "f:7: field 'answer' is not a non-empty text"),
    ({"problem": " ", "answer": 2}, Fields(), "f:7: field 'problem' is not a non-empty text"),
    ({"problem": "1+1", "answer": "two\n####  "}, Fields(), "f:7: field 'answer' has nothing behind its last ####"),
    ({"problem": "1+1", "answer": "Add.\nIt is 2."}, Fields(), "f:7: field 'answer' has several lines and neither"),
    ({"problem": "1+1", "answer": "{2"}, Fields(), "f:7: field 'answer': the braces of '{2' do not match"),
    ({"problem": "1+1", "answer": "2" * 1001}, Fields(), "f:7: the gold answer has 1,001 characters"),
    ([1], Fields("q", "a"), "f:7: expected an object with q and a, not a list"),
])
def test_a_row_that_does_not_fit_is_refused_with_the_way_out(row, fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        own_row(row, "f:7", fields)


def test_test_problems_are_drawn_from_a_single_file(tmp_path):
    write_jsonl(tmp_path / "mine.jsonl", sums(200))
    out, made = make_dataset(str(tmp_path / "mine.jsonl"), tmp_path / "out", problem_field="question")
    manifest = read_manifest(out)
    assert made and manifest["counts"] == {
        "train": 180, "validation": 20, "train_split": 162, "validation_split": 18, "test": 20}
    assert manifest["parameters"]["fields"] == {"problem": "question", "answer": "answer", "level": None, "type": None}
    splits = {name: load_split(out, name) for name in ("train", "validation", "test")}
    for rows in splits.values():  # stratified by the number of calculations
        assert rows["level"].count("Level 1") == rows["level"].count("Level 2")
    ids = [i for rows in splits.values() for i in rows["sample_id"]]
    assert sorted(ids) == sorted(f"mine:{line}" for line in range(1, 201))
    # again: nothing to do; another seed draws others
    again = {"problem_field": "question"}
    assert make_dataset(str(tmp_path / "mine.jsonl"), out, **again) == (out, False)
    make_dataset(str(tmp_path / "mine.jsonl"), out, data_seed=1, **again)
    assert set(load_split(out, "test")["sample_id"]) != set(splits["test"]["sample_id"])
    make_dataset(str(tmp_path / "mine.jsonl"), out, n_test=50, **again)
    assert load_split(out, "test").num_rows == 50


def test_a_problem_that_occurs_twice_is_not_in_training_and_test(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", sums(100))
    write_jsonl(tmp_path / "all/a.jsonl", sums(100))
    write_jsonl(tmp_path / "all/b.jsonl", sums(100))
    out, _ = make_dataset(str(tmp_path / "all"), tmp_path / "out", problem_field="question")
    train, validation, test = (set(load_split(out, s)["problem"]) for s in ("train", "validation", "test"))
    assert test and not train & test and not train & validation and not validation & test


def test_a_folder_that_names_its_test_problems_keeps_them(tmp_path):
    write_jsonl(tmp_path / "mine/train.jsonl", sums(100))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(sums(30, 500)), tmp_path / "mine/test.parquet")
    out, _ = make_dataset(str(tmp_path / "mine"), tmp_path / "out", problem_field="question")
    assert {i.split(":")[0] for i in load_split(out, "test")["sample_id"]} == {"test"}
    assert read_manifest(out)["counts"]["test"] == 30
    with pytest.raises(ValueError, match="n_test=5: .*mine has a part for testing"):
        make_dataset(str(tmp_path / "mine"), tmp_path / "x", n_test=5, problem_field="question")


@pytest.mark.parametrize("given, message", [
    ({"source": "nowhere.jsonl"}, "source='nowhere.jsonl' is no file or folder, seen from the project's root"),
    ({"source": "README.md"}, "source='README.md': a file of problems ends in .jsonl, .json, .parquet"),
    ({"source": "docs"}, "docs holds 0 problems: at least 20 are needed"),
    ({"source": "MINE"}, "mine.jsonl holds 5 problems: at least 20 are needed"),
    ({"source": "MANY", "n_test": 51}, "n_test=51: give a number from 1 to half of the 100 problems"),
    ({"source": "MANY", "n_train": 5}, "makes no use of n_train: leave it out"),
    ({"source": "MANY", "math_dir": "x"}, "makes no use of math_dir"),
    ({"source": "NAMESAKE", "data_dir": None}, "'math' is also the name of a source of this project"),
    ({"source": "gsm8k", "n_test": 5}, "source='gsm8k' makes no use of n_test"),
    ({"source": "arithmetic", "problem_field": "q"}, "source='arithmetic' makes no use of problem_field"),
])
def test_a_request_that_makes_no_sense_is_refused_before_anything_is_written(tmp_path, given, message):
    write_jsonl(tmp_path / "mine.jsonl", [{"problem": str(i), "answer": i} for i in range(5)])
    write_jsonl(tmp_path / "many.jsonl", [{"problem": str(i), "answer": i} for i in range(100)])
    write_jsonl(tmp_path / "math.jsonl", [{"problem": str(i), "answer": i} for i in range(100)])
    files = {"MINE": "mine.jsonl", "MANY": "many.jsonl", "NAMESAKE": "math.jsonl"}
    source = given["source"]
    if source in files:
        given = given | {"source": str(tmp_path / files[source])}
    with pytest.raises(ValueError, match=re.escape(message)):
        make_dataset(**({"data_dir": tmp_path / "out/x"} | given))
    assert not (tmp_path / "out/x").exists()


def test_gsm8k_from_a_hub(tmp_path):
    hub = tmp_path / "hub"
    for name, rows in (("train", sums(60)), ("test", sums(20, 500))):
        (hub / "main").mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), hub / f"main/{name}-00000-of-00001.parquet")
    (hub / "socratic").mkdir()
    (hub / "socratic/train-00000-of-00001.parquet").write_text("the same problems, in other words")
    requests = []
    with serve({("dataset", "openai/gsm8k"): hub}, requests) as endpoint:
        done = make_in_new_process(tmp_path / "gsm8k", tmp_path / "cache", endpoint, "gsm8k")
    assert done.stdout == "True\n", done.stderr
    assert not any("socratic" in request and "resolve" in request for request in requests)
    assert read_manifest(tmp_path / "gsm8k")["counts"] == {
        "train": 60, "validation": 20, "train_split": 54, "validation_split": 6, "test": 20}
    assert set(load_split(tmp_path / "gsm8k", "test")["level"]) == {"Level 1", "Level 2"}
    done = make_in_new_process(tmp_path / "other", tmp_path / "empty", endpoint, "gsm8k")  # the hub is gone
    assert "openai/gsm8k is not here, and cannot be had from the hub" in done.stderr
    assert "-p source FOLDER -p problem_field question -p data_dir gsm8k" in done.stderr


@pytest.mark.skipif(not GSM8K_DIR.is_dir(), reason="no copy of GSM8K: set GSM8K_DIR")
def test_counts_of_gsm8k(tmp_path):
    out, _ = make_dataset(str(GSM8K_DIR), tmp_path / "gsm8k", problem_field="question")
    manifest = read_manifest(out)
    assert manifest["counts"] == {
        "train": 7473, "validation": 1319, "train_split": 6726, "validation_split": 747, "test": 1319}
    assert manifest["duplicates"] == {"train": [], "validation": []} and manifest["empty_answers"] == []
    rows = [json.loads(line) for line in (out / "test.jsonl").read_text().splitlines()]
    assert rows[0]["answer"] == "18" and "<<" not in rows[0]["solution"]
    assert all(re.fullmatch(r"-?[\d,]+(\.\d+)?", row["answer"]) for row in rows)
