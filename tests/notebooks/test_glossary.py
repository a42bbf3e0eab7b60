"""docs/glossary.md and the tables agree: no column without a meaning, no meaning without a column."""
import json
import re
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest

from lib.audit import RATES
from lib.rewards import LOG_SCHEMA
from runner import ROOT
from runner.parameters import ADDED_LATER, NOT_HASHED, Params

HEADING, NAME = re.compile(r"^## `([\w.]+)`$", re.M), re.compile(r"`([^`]+)`")


def columns(table):
    """Columns of every committed copy of a table."""
    found = set()
    for path in ROOT.glob(f"outputs/*/{table}"):
        found |= set((pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, nrows=1)).columns)
    written = {"rewards.parquet": LOG_SCHEMA.names, "rates.csv": ["run_id", *RATES]}
    return found | set(written.get(table, []))


def glossary():
    """{table: the names that lead the rows of its section}."""
    _, *parts = HEADING.split((ROOT / "docs/glossary.md").read_text())
    rows = {table: [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
            for table, text in zip(parts[::2], parts[1::2], strict=True)}
    return {table: NAME.findall(" ".join(firsts)) for table, firsts in rows.items()}


NAMED = glossary()


@pytest.fixture(scope="module")
def written_by():
    """The sources that write columns: TRL's trainer, lib, runner, and the code of the notebooks."""
    cells = [cell for path in ROOT.glob("notebooks/**/*.ipynb") for cell in json.loads(path.read_text())["cells"]]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    sources = [Path(find_spec("trl").origin).with_name("trainer") / "grpo_trainer.py", *ROOT.glob("lib/*.py"),
               *ROOT.glob("runner/*.py")]
    return "\n".join([*code, *(path.read_text() for path in sources)])


def test_every_table_of_a_study_has_a_section():
    tables = {path.name for end in ("parquet", "csv") for study in ROOT.glob("outputs/*/04_analysis.ipynb")
              for path in study.parent.glob(f"*.{end}")}
    assert tables and tables - set(NAMED) == set()


@pytest.mark.parametrize("table", NAMED)
def test_columns_and_glossary_agree(table, written_by):
    named, there = NAMED[table], columns(table)
    assert len(named) == len(set(named)), f"named twice: {sorted(n for n in named if named.count(n) > 1)}"
    assert there and there - set(named) == set(), "columns without a meaning in docs/glossary.md"
    unknown = {n for n in set(named) - there if f'"{n.removeprefix("versions.")}"' not in written_by}
    assert unknown == set(), f"docs/glossary.md explains what no {table} has and no code writes"


def test_parameters_are_those_of_a_run():
    assert set(Params.model_fields) - NOT_HASHED - ADDED_LATER <= set(NAMED["runs.csv"])
