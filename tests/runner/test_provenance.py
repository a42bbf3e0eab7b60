"""Where a run comes from: which edits make other code of it, and what the record must not tell."""

import ast
import getpass
import json
import shutil
import socket

import pandas as pd
import pytest

from runner import ROOT, checkpoints, parameters, provenance, runs

# 02_train imports these, but they show or check what a run has computed already
SHOWING = {"lib/plots.py", "lib/report.py", "lib/stats.py", "lib/audit.py", "lib/theory.py", "runner/progress.py",
           "runner/results.py"}


def imported(source):
    """The modules of lib and runner that a piece of code imports, as paths."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or node.module.split(".")[0] not in ("lib", "runner"):
            continue
        package, _, module = node.module.partition(".")
        found |= {f"{package}/{name}.py" for name in ([module] if module else [alias.name for alias in node.names])}
        found.add(f"{package}/__init__.py")
    return {name for name in found if (ROOT / name).exists()}


def cells_of_02_train():
    """Its code."""
    cells = json.loads((ROOT / "notebooks/02_train.ipynb").read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def test_the_modules_that_decide_a_run_are_those_that_02_train_needs():
    needed, waiting = set(), imported(cells_of_02_train()) - SHOWING
    while waiting:
        needed |= waiting
        waiting = set().union(*(imported((ROOT / name).read_text()) for name in waiting)) - SHOWING - needed
    assert set(provenance.DECISIVE) == needed - {"lib/__init__.py"}  # a docstring


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the code, which may be edited."""
    for package in ("lib", "runner"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    return tmp_path


def edit(path):
    path.write_text(path.read_text() + "\n# edited\n")


@pytest.mark.parametrize("name", sorted([*SHOWING, "runner/__main__.py", "runner/sweep.py", "runner/studies.py"]))
def test_an_edited_figure_or_sweep_makes_no_other_code(copy, name):
    before = provenance.code([])
    edit(copy / name)
    assert provenance.code([]) == before


@pytest.mark.parametrize("name", provenance.DECISIVE)
def test_an_edit_of_what_decides_a_run_makes_other_code(copy, name):
    before = provenance.code([])
    edit(copy / name)
    after = provenance.code([])
    assert after["modules"] != before["modules"] and after["notebook"] == before["notebook"]


def test_an_interrupted_run_that_goes_on_unchanged_has_one_version(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "logged_until", lambda *_: 100)
    params, cells = parameters.resolve("tiny"), ["seed = 1", "print(1)"]
    first, _ = runs.begin(tmp_path, params, cells, policy_hash="aa")
    (tmp_path / "checkpoints/checkpoint-50").mkdir(parents=True)
    (tmp_path / "checkpoints/checkpoint-50/optimizer.pt").write_text("state")
    checkpoints.keep_checkpoint(tmp_path, 50)
    record, _ = runs.begin(tmp_path, params, cells, policy_hash="aa")
    assert record["resumed_from"] == [50] and record["code"] == first["code"] * 2
    assert runs.code_note(pd.Series({"a": record["code"]}, dtype=object)) == ""
    edited, _ = runs.begin(tmp_path, params, ["seed = 1", "print(2)"], policy_hash="aa")
    assert "two versions" in runs.code_note(pd.Series({"a": edited["code"]}, dtype=object))


def test_parameters_are_no_code():
    cells = ["", "seed = 1", "# Parameters\nseed = 2\n", "print(1)\n"]
    assert provenance.code(cells) == provenance.code(["seed = 3  # other", "print(1)"])
    assert provenance.code(cells) != provenance.code(["print(2)"])


def test_the_record_names_no_path_user_or_host():
    text = json.dumps(provenance.provenance())
    assert str(ROOT) not in text and socket.gethostname() not in text
    assert getpass.getuser() not in json.loads(text)


# --- the sentence about it


def version(number):
    """What a run's record says of its code."""
    return {"notebook": f"{number:064x}", "modules": f"{number:064d}"}


def test_runs_of_one_code_need_no_sentence():
    assert runs.code_note(pd.Series({"a": [version(1)], "b": [version(1)], "c": None}, dtype=object)) == ""
    assert runs.code_note(pd.Series({"a": None}, dtype=object)) == ""


def test_two_versions_are_counted_in_words():
    made = {"a": [version(1)], "b": [version(1)], "c": [version(2)], "old": None}
    note = runs.code_note(pd.Series(made, dtype=object))
    assert note.startswith("The runs were made with two versions of the training code (2 and 1 runs). So they may")
    assert "a" * 8 not in note and "0" * 8 not in note  # no hashes: provenance.csv has them


def test_a_run_that_went_on_with_other_code_counts_for_both():
    made = {"a": [version(1)], "b": [version(1), version(2)]}
    for column in (pd.Series(made, dtype=object), pd.Series(made, dtype=object).astype(str)):  # a table keeps text
        assert "(2 and 1 runs)" in runs.code_note(column)


def test_published_runs_of_two_versions_are_named():
    table = pd.read_csv(ROOT / "outputs/language-model-smol/provenance.csv", index_col="run_id")
    assert "two versions of the training code (56 and 24 runs)" in runs.code_note(table["code"])
