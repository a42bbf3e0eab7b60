"""runner.dataset: merge, checks of every row, atomic output, generated data sets, a loopback hub."""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback_hub import serve

from runner import ROOT, dataset, parameters
from runner.dataset import (
    data_folder,
    data_hash,
    load_split,
    make_dataset,
    read_manifest,
    shown,
)
from runner.parts import merge_parts
from runner.problems import (
    DIFFICULTIES,
    GENERATED,
    OPERATIONS,
    write_jsonl,
)

MATH_DIR = Path(os.environ.get("MATH_DIR", ROOT.parent / "shared/data/math"))
ROW = {"problem": "1+1=", "level": "Level 1", "type": "Algebra", "solution": r"It is $\boxed{2}$."}


def counts(rows):
    """Rows a type (down) and level (across), with totals."""
    frame = rows.to_pandas()
    return pd.crosstab(frame["type"], frame["level"], margins=True, margins_name="all")


def rows(n, start=0, **fields):
    return [
        ROW | {"problem": f"{i}+1=", "solution": rf"\boxed{{{i + 1}}}"} | fields
        for i in range(start, start + n)
    ]


@pytest.fixture
def parts(tmp_path):
    """A small folder of parts: 30 train and 5 validation problems, two subjects."""
    write_jsonl(tmp_path / "parts/algebra/train.jsonl", rows(20))
    write_jsonl(tmp_path / "parts/geometry/train.jsonl", rows(10, 100, type="Geometry", level="Level 5"))
    write_jsonl(tmp_path / "parts/algebra/validation.jsonl", rows(5, 200))
    return tmp_path / "parts"


# ---- merge ----


def test_sample_id_is_part_and_line(parts):
    merged = merge_parts(parts)
    assert [len(merged[s]) for s in ("train", "validation")] == [30, 5]
    row = merged["train"][20]
    assert row == {
        "sample_id": "geometry/train:1",
        "problem": "100+1=",
        "level": "Level 5",
        "type": "Geometry",
        "solution": r"\boxed{101}",
        "answer": "101",
    }


def test_line_numbers_count_blank_lines(tmp_path, parts):
    (parts / "algebra/train.jsonl").write_text("\n" + json.dumps(ROW) + "\r\n\n" + json.dumps(ROW))
    ids = [r["sample_id"] for r in merge_parts(parts)["train"]]
    assert ids[:2] == ["algebra/train:2", "algebra/train:4"]


def test_a_byte_order_mark_is_not_content(parts):
    path = parts / "algebra/train.jsonl"
    before = merge_parts(parts)
    path.write_text("\ufeff" + path.read_text(), encoding="utf-8")
    assert merge_parts(parts) == before


def test_every_format_and_depth_gives_the_same_rows(tmp_path):
    good = rows(3)
    write_jsonl(tmp_path / "lines/a/b/train.jsonl", good)
    (tmp_path / "list").mkdir()
    (tmp_path / "list/train.json").write_text("\ufeff" + json.dumps(good, indent=2))
    (tmp_path / "table/train").mkdir(parents=True)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(good), tmp_path / "table/train/part-00000-of-00001.parquet"
    )
    (tmp_path / "files/train/algebra").mkdir(parents=True)
    for i, row in enumerate(good):  # the layout of the original release: one problem a file
        (tmp_path / f"files/train/algebra/{i}.json").write_text(json.dumps(row))
    contents = []
    for layout in ("lines", "list", "table", "files"):
        write_jsonl(tmp_path / layout / "MATH-test.jsonl", rows(1, 50))
        contents.append(
            [{k: r[k] for k in r if k != "sample_id"} for r in merge_parts(tmp_path / layout)["train"]]
        )
    assert contents[0] == contents[1] == contents[2] == contents[3]
    assert len(contents[0]) == 3


@given(order=st.permutations(["algebra/train", "geometry/train", "zeta/x/train", "algebra/test"]))
@settings(max_examples=10)
def test_merge_does_not_depend_on_the_order_of_writing(tmp_path_factory, order):
    folder = tmp_path_factory.mktemp("merge")
    for name in order:
        write_jsonl(folder / f"{name}.jsonl", rows(2, sum(map(ord, name))))
    ids = [r["sample_id"] for split in merge_parts(folder).values() for r in split]
    assert ids == [
        f"{n}:{i}"
        for n in ("algebra/train", "geometry/train", "zeta/x/train", "algebra/test")
        for i in (1, 2)
    ]


# ---- bad input: one error, with its place, and nothing written ----


def without(field):
    return json.dumps({k: v for k, v in ROW.items() if k != field})


BAD_LINES = {
    "truncated": (json.dumps(ROW)[:-20], "algebra/train.jsonl:3: not valid JSON"),
    "not an object": (
        "[1, 2]",
        "algebra/train.jsonl:3: expected an object with problem, level, type, solution",
    ),
    "no problem": (without("problem"), "algebra/train.jsonl:3: field 'problem' is missing"),
    "no level": (without("level"), "algebra/train.jsonl:3: field 'level' is missing"),
    "no type": (without("type"), "algebra/train.jsonl:3: field 'type' is missing"),
    "no solution": (without("solution"), "algebra/train.jsonl:3: field 'solution' is missing"),
    "empty problem": (
        json.dumps(ROW | {"problem": " "}),
        "train.jsonl:3: field 'problem' is not a non-empty text",
    ),
    "number": (json.dumps(ROW | {"type": 3}), "train.jsonl:3: field 'type' is not a non-empty text"),
    "level": (
        json.dumps(ROW | {"level": "Level 6"}),
        "train.jsonl:3: unknown level 'Level 6'; known: Level 1",
    ),
    "no box": (
        json.dumps(ROW | {"solution": "It is 2."}),
        r"train.jsonl:3: the solution has no complete \boxed",
    ),
    "brackets in the answer": (
        json.dumps(ROW | {"solution": r"\boxed{" + "{" * 100_000 + "}" * 100_000 + "}"}),
        "train.jsonl:3: the gold answer has 200,000 characters, and the graders read at most 1,000: leave",
    ),
    "open box": (
        json.dumps(ROW | {"solution": r"\boxed{2"}),
        r"train.jsonl:3: the solution has no complete \boxed",
    ),
}


@pytest.mark.parametrize("line,message", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_stops_with_file_and_line_and_writes_nothing(tmp_path, parts, line, message):
    path = parts / "algebra/train.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[3:]]))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        make_dataset("math", tmp_path / "out/math", parts)
    assert str(tmp_path) not in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


def delete(name):
    return lambda p: (p / name).unlink()


def write(name, content):
    def change(parts):
        (parts / name).parent.mkdir(parents=True, exist_ok=True)
        (parts / name).write_bytes(content)

    return change


LINE = json.dumps(ROW).encode() + b"\n"
BAD_FOLDERS = {
    "no validation": (
        delete("algebra/validation.jsonl"),
        "no validation part: no .jsonl, .json, .parquet file",
    ),
    "no word": (write("algebra/more.jsonl", LINE), "algebra/more.jsonl: the path says neither train nor"),
    "two words": (
        write("train/test.jsonl", LINE),
        "train/test.jsonl: the path says both train and test/validation",
    ),
    "same id": (
        write("algebra/train.json", LINE),
        "algebra/train.jsonl and algebra/train.json would give the same",
    ),
    "empty": (
        write("algebra/validation.jsonl", b"\n"),
        "the validation parts hold no rows (algebra/validation.jsonl)",
    ),
    "binary": (write("algebra/train.jsonl", b"\xff\xfe\x00"), "algebra/train.jsonl: not UTF-8 text"),
    "json": (write("x/train.json", b'[\n{"problem": "1+'), "x/train.json:2: not valid JSON"),
    "json row": (write("x/train.json", b"[" + LINE + b", 7]"), "x/train.json:2: expected an object"),
    "json lines": (
        write("x/train.json", LINE + LINE),
        "x/train.json:2: more than one JSON value: if each line is a row, rename the file to .jsonl",
    ),
    "parquet": (write("x/train.parquet", b"PAR1 cut"), "x/train.parquet: cannot be read"),
}


@pytest.mark.parametrize("change,message", BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_a_bad_folder_stops_with_one_message_and_writes_nothing(tmp_path, parts, change, message):
    change(parts)
    with pytest.raises(ValueError, match=re.escape(message)):
        make_dataset("math", tmp_path / "out/math", parts)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_empty_or_missing_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no train part"):
        merge_parts(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        merge_parts(tmp_path / "nowhere")


# ---- overlaps and duplicates ----


def test_overlaps_leave_train_and_duplicates_are_reported(tmp_path, parts):
    write_jsonl(
        parts / "geometry/validation.jsonl", [*rows(3), ROW | {"problem": "10 +1="}]
    )  # 0, 1, 2 are in train
    write_jsonl(parts / "twice/train.jsonl", rows(1, 19))  # also algebra/train:20
    out, made = make_dataset("math", tmp_path / "math", parts)
    manifest = read_manifest(out)
    dropped = manifest["dropped_from_train_split"] + manifest["dropped_from_validation_split"]
    assert made and {"algebra/train:1", "algebra/train:2", "algebra/train:3"} <= set(dropped)
    assert manifest["duplicates"] == {"train": [["algebra/train:20", "twice/train:1"]], "validation": []}
    assert manifest["differ_in_white_space_only"] == [["algebra/train:11", "geometry/validation:4"]]
    counts = manifest["counts"]
    assert counts["train"] == 31 == counts["train_split"] + counts["validation_split"] + len(dropped)
    assert counts["test"] == counts["validation"] == 9
    problems = [set(load_split(out, s)["problem"]) for s in ("train", "validation", "test")]
    assert not problems[0] & problems[1] and not problems[0] & problems[2] and not problems[1] & problems[2]


def test_no_problem_is_in_two_splits_whatever_repeats(tmp_path):
    """Every problem of train occurs three times there, and half of them in validation too."""
    for name in ("a/train", "b/train", "c/train"):
        write_jsonl(tmp_path / f"parts/{name}.jsonl", rows(60))
    write_jsonl(tmp_path / "parts/a/test.jsonl", rows(30, 30))
    out, _ = make_dataset("math", tmp_path / "math", tmp_path / "parts")
    manifest = read_manifest(out)
    train, validation, test = (set(load_split(out, s)["problem"]) for s in ("train", "validation", "test"))
    assert not train & validation and not train & test and not validation & test
    assert len(test) == 30 and train | validation == {f"{i}+1=" for i in range(30)}
    assert min(len(manifest[f"dropped_from_{s}_split"]) for s in ("train", "validation")) > 0
    kept = manifest["counts"]["train_split"] + manifest["counts"]["validation_split"]
    assert kept + sum(len(manifest[f"dropped_from_{s}_split"]) for s in ("train", "validation")) == 180


# ---- generated data sets ----


def test_default_sizes_balance_and_no_overlap(tmp_path):
    out, _ = make_dataset("arithmetic", tmp_path / "arithmetic")
    manifest = read_manifest(out)
    assert manifest["counts"] == {
        "train": 6000,
        "validation": 1024,
        "train_split": 5400,
        "validation_split": 600,
        "test": 1024,
    }
    assert manifest["dropped_from_train_split"] == manifest["dropped_from_validation_split"] == []
    assert manifest["duplicates"] == {"train": [], "validation": []}
    table = counts(load_split(out, "test"))
    assert table.loc["all", "all"] == 1024 and table.loc["all"].min() >= 150 and table.min().min() >= 50
    splits = [load_split(out, s)["problem"] for s in ("train", "validation", "test")]
    assert len(set().union(*splits)) == sum(map(len, splits)) == 7024
    # Finished runs record the hash of these data: they must stay the same bytes.
    digest = hashlib.sha256((out / "test.jsonl").read_bytes()).hexdigest()
    assert digest == "d3bc8f65aeeb8211253331876599c8a9078bacb451db52f966a1a4fab825d990"
    assert data_hash(out) == "9cfb843989982888fb5f85f74ed2dd53101d90d2477dac722374d9fca8d126d2"


@pytest.mark.parametrize("sizes", [{"n_train": 0}, {"n_test": 0}, {"n_train": 26_000, "n_test": 641}])
def test_impossible_sizes_are_refused(tmp_path, sizes):
    with pytest.raises(ValueError, match="sum <= 26640"):
        make_dataset("arithmetic", tmp_path / "x", **sizes)
    assert list(tmp_path.iterdir()) == []


def test_default_operations_in_every_split(tmp_path):
    out, _ = make_dataset("operations", tmp_path / "operations")
    manifest = read_manifest(out)
    assert manifest["parameters"] == {
        "source": "operations", "data_seed": 0, "n_train": 10_000, "n_test": 2_048
    }
    assert manifest["counts"] == {
        "train": 10_000,
        "validation": 2_048,
        "train_split": 9_000,
        "validation_split": 1_000,
        "test": 2_048,
    }
    assert manifest["dropped_from_train_split"] == manifest["dropped_from_validation_split"] == []
    assert manifest["duplicates"] == {"train": [], "validation": []}
    splits = {s: load_split(out, s) for s in ("train", "validation", "test")}
    assert len(set().union(*(rows["problem"] for rows in splits.values()))) == 12_048
    tables = {s: counts(rows) for s, rows in splits.items()}
    for table in tables.values():
        assert table.shape == (5, 6) and set(table.index) == {*OPERATIONS, "all"} and table.min().min() >= 1
    whole = sum(tables.values())
    assert abs(tables["test"] - whole * 2_048 / 12_048).loc[list(OPERATIONS), DIFFICULTIES[:5]].max().max() < 1
    assert whole.loc["Addition"].tolist() == [81, 810, 1448, 1448, 1448, 5235]
    assert whole.loc["Division"].tolist() == [15, 30, 33, 148, 548, 774]
    test = out / "test.jsonl"
    again, _ = make_dataset("operations", tmp_path / "again")
    assert data_hash(again) == data_hash(out) and (again / "test.jsonl").read_bytes() == test.read_bytes()


def test_more_operations_than_there_are_are_refused(tmp_path):
    with pytest.raises(ValueError, match="n_train=177555, n_test=2048: each must .* sum <= 177555"):
        make_dataset("operations", tmp_path / "x", n_train=177_555)
    assert list(tmp_path.iterdir()) == []


# ---- make_dataset: parameters, no-op, atomicity ----


def snapshot(folder):
    return {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in sorted(folder.rglob("*")) if f.is_file()}


def test_second_run_is_a_no_op_and_another_seed_replaces(tmp_path, parts):
    out, made = make_dataset("math", tmp_path / "o/math", parts)
    before, first = snapshot(out), data_hash(out)
    assert made and make_dataset("math", out, parts) == (out, False)
    assert snapshot(out) == before
    assert make_dataset("math", out, parts, data_seed=1) == (out, True)
    assert data_hash(out) != first
    assert make_dataset("math", out, parts) == (out, True) and data_hash(out) == first
    assert [f.name for f in (tmp_path / "o").iterdir()] == ["math"]


def test_a_changed_part_or_output_is_rebuilt(tmp_path, parts):
    out, _ = make_dataset("math", tmp_path / "math", parts)
    good = data_hash(out)
    with (out / "test.jsonl").open("a") as f:
        f.write("{}\n")
    with pytest.raises(ValueError, match="test.jsonl has changed since it was made"):
        data_hash(out)
    assert make_dataset("math", out, parts) == (out, True) and data_hash(out) == good
    write_jsonl(parts / "algebra/validation.jsonl", rows(6, 200))
    assert make_dataset("math", out, parts) == (out, True) and data_hash(out) != good


def test_an_error_keeps_the_data_that_were_there(tmp_path, parts):
    out, _ = make_dataset("math", tmp_path / "o/math", parts)
    before = snapshot(tmp_path / "o")
    (parts / "algebra/train.jsonl").write_text('{"problem": ')
    with pytest.raises(ValueError, match=re.escape("algebra/train.jsonl:1")):
        make_dataset("math", out, parts)
    assert snapshot(tmp_path / "o") == before and [f.name for f in (tmp_path / "o").iterdir()] == ["math"]


BIG = """
import resource, signal, sys
if sys.argv[2] != "0":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
from runner.dataset import make_dataset
make_dataset("arithmetic", sys.argv[1], n_train=25_000, n_test=1_000)
"""


@pytest.mark.parametrize("limit", [50_000, 1_000_000, 4_000_000], ids=lambda n: f"{n} bytes")
def test_a_full_disk_leaves_no_output(tmp_path, limit):
    """A limit on the size of a file stands for the full disk: the parts, the test or the train file fails."""
    run = subprocess.run(
        [sys.executable, "-c", BIG, str(tmp_path / "o/x"), str(limit)], capture_output=True, text=True
    )
    assert "File too large" in run.stderr
    assert list((tmp_path / "o").iterdir()) == []


def test_the_output_appears_whole(tmp_path):
    """Watched from outside while it is made, the folder is either absent or complete."""
    out, listings = tmp_path / "o/x", set()
    process = subprocess.Popen([sys.executable, "-c", BIG, str(out), "0"])
    while process.poll() is None:
        if out.exists():
            listings.add(tuple(sorted(f.name for f in out.iterdir())))
        time.sleep(0.001)
    assert process.returncode == 0
    listings.add(tuple(sorted(f.name for f in out.iterdir())))
    assert len(listings) == 1 and "manifest.json" in next(iter(listings))


def test_foreign_files_are_never_replaced(tmp_path, parts):
    (tmp_path / "o").mkdir()
    (tmp_path / "o/thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="o holds other files"):
        make_dataset("math", tmp_path / "o", parts)
    assert (tmp_path / "o/thesis.tex").read_text() == "years of work"


def test_contradictory_parameters(parts, tmp_path):
    with pytest.raises(ValueError, match="source='gsm9k' is no file or folder.*did you mean 'gsm8k'.*arithmetic, op"):
        make_dataset("gsm9k", tmp_path / "x")
    for source in GENERATED:
        with pytest.raises(ValueError, match=f"source='{source}' makes no use of math_dir"):
            make_dataset(source, tmp_path / "x", parts)


def test_loading(tmp_path, parts):
    for name, source in (("math", "math"), ("Operations-7", "operations"), ("my-arithmetic", "arithmetic")):
        command = f"papermill notebooks/01_data.ipynb .* --log-output -p source {source} -p data_dir {name}"
        with pytest.raises(FileNotFoundError, match=command):
            load_split(tmp_path / name, "train")
    for name in ("gsm9k", "mine"):  # sums would be made in their place, and trained on
        own = f"'{name}' is none of the sources .* -p source FILE_OR_FOLDER -p data_dir {name} .docs/recipe-data.md"
        with pytest.raises(FileNotFoundError, match=own) as refusal:
            load_split(tmp_path / name, "train")
        assert "-p source arithmetic" not in str(refusal.value)
    out, _ = make_dataset("math", tmp_path / "math", parts)
    assert load_split(out, "test").column_names == [
        "sample_id",
        "problem",
        "level",
        "type",
        "solution",
        "answer",
    ]
    assert [load_split(out, s).num_rows for s in ("train", "validation", "test")] == [27, 3, 5]
    with pytest.raises(ValueError, match="split='train_split': choose one of train, validation, test"):
        load_split(out, "train_split")
    write_jsonl(parts / "algebra/train.jsonl", rows(2))
    (parts / "geometry/train.jsonl").unlink()
    make_dataset("math", out, parts)
    with pytest.raises(ValueError, match="math: the validation split is empty"):
        load_split(out, "validation")


def test_names_and_paths(tmp_path):
    assert data_folder("math") == data_folder("data/math") == ROOT / "data/math"
    assert data_folder(tmp_path) == tmp_path
    assert shown(ROOT / "data/math") == "data/math" and shown(Path("/a/b/c")) == "b/c"


# ---- the hub ----

MAKE = "from runner.dataset import make_dataset; print(make_dataset({source!r}, {out!r})[1])"


def make_in_new_process(out, cache, endpoint, source="math"):
    """In a process of its own: huggingface_hub reads HF_ENDPOINT when it is imported."""
    environment = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    return subprocess.run(
        [sys.executable, "-c", MAKE.format(source=source, out=str(out))],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_download_from_a_hub_then_from_its_cache(tmp_path, parts):
    (parts / "README.md").write_text("not a part")
    requests = []
    with serve({("dataset", "fdyrd/MATH"): parts}, requests) as endpoint:
        run = make_in_new_process(tmp_path / "hub", tmp_path / "cache", endpoint)
    assert run.stdout == "True\n", run.stderr
    assert not any("README" in r for r in requests)
    local, _ = make_dataset("math", tmp_path / "local", parts)
    assert data_hash(tmp_path / "hub") == data_hash(local)
    run = make_in_new_process(tmp_path / "hub", tmp_path / "cache", endpoint)  # the hub is gone by now
    assert run.stdout == "False\n", run.stderr


@pytest.mark.parametrize("hub", ["unreachable", "without the dataset"])
def test_a_failed_download_is_one_sentence_with_the_ways_out(tmp_path, hub):
    with serve({}) as endpoint:
        if hub == "without the dataset":
            run = make_in_new_process(tmp_path / "o/math", tmp_path / "cache", endpoint)
    if hub == "unreachable":
        run = make_in_new_process(tmp_path / "o/math", tmp_path / "cache", endpoint)
    last = run.stderr.strip().splitlines()[-1]
    assert run.returncode == 1 and "During handling" not in run.stderr
    assert last.startswith("FileNotFoundError: fdyrd/MATH is not here, and cannot be had from the hub (")
    assert "math_dir" in last and "HF_ENDPOINT" in last
    assert list((tmp_path / "o").iterdir()) == []


# ---- the real data ----


@pytest.mark.skipif(not MATH_DIR.is_dir(), reason="no copy of MATH: set MATH_DIR")
def test_counts_of_math(tmp_path):
    out, _ = make_dataset("math", tmp_path / "math", MATH_DIR)
    manifest = read_manifest(out)
    assert manifest["counts"] == {
        "train": 7500,
        "validation": 5000,
        "train_split": 6750,
        "validation_split": 750,
        "test": 5000,
    }
    assert manifest["dropped_from_train_split"] == manifest["dropped_from_validation_split"] == []
    assert manifest["duplicates"] == {"train": [], "validation": []}
    assert manifest["empty_answers"] == ["number_theory/train:850", "number_theory/train:852"]
    train = counts(load_split(out, "train"))
    assert train.loc["all", "Level ?"] == 2 and list(train.columns) == [*DIFFICULTIES, "all"]


@pytest.mark.parametrize("which, kept", [("all", 5), ("1-3", 3), ("4,5", 2), ("1,3-4", 3), ("5", 1)])
def test_difficulties_are_chosen_by_number_and_range(which, kept):
    rows = datasets.Dataset.from_dict({"level": [f"Level {n}" for n in range(1, 6)]})
    assert len(dataset.of_difficulties(rows, which)) == kept


@pytest.mark.parametrize("levels, rates, words", [
    (["Level 1", "Level ?", "Level 2"], 2, None), (["Level 1"], 5, None),
    (["Level ?", "hard"], 2, "no training problem of mine has a difficulty"),
    (["Level 1", "Level 3"], 2, "has 2 rates, and the training problems of mine have difficulties up to 3: give one")])
def test_rates_by_difficulty_fit_the_training_problems(monkeypatch, levels, rates, words):
    splits = {("mine", "train"): {"level": levels}}
    monkeypatch.setattr(dataset, "load_split", lambda data_dir, split: splits[data_dir, split])
    if words is None:
        dataset.check_rates("mine", rates)
        return
    with pytest.raises(ValueError, match=words):
        dataset.check_rates("mine", rates)


def test_difficulties_that_no_problem_has_are_refused_with_those_that_are_there():
    rows = datasets.Dataset.from_dict({"level": ["Level 1", "Level ?"]})
    with pytest.raises(ValueError, match=r"train_difficulties='4-5': no problem .* there are Level 1, Level \?"):
        dataset.of_difficulties(rows, "4-5")
    for wrong in ("hard", "1-", "1;2", ""):
        with pytest.raises(ValueError, match="train_difficulties"):
            parameters.resolve("tiny", train_difficulties=wrong)
    assert parameters.run_id(parameters.resolve("tiny")) == parameters.run_id(
        parameters.resolve("tiny", train_difficulties="all")) != parameters.run_id(
        parameters.resolve("tiny", train_difficulties="1"))
