"""Published run ids derive again from the parameters that were published with them."""

import csv

import pytest

from runner import ROOT, parameters

FIRST_TEN = ("channels", "controls", "group_size", "hyperparameters", "hyperparameters-smol", "language-model-smol",
             "mitigations", "seeds-smol", "smoke-smol", "tiny")
TABLES = sorted(ROOT.glob("outputs/*/runs.csv"))


def published(table) -> dict[str, parameters.Params]:
    """run id -> parameters of a table of runs. An empty cell is None; pydantic reads numbers from their text."""
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    named = parameters.Params.model_fields.keys() & rows[0].keys()
    return {row["run_id"]: parameters.Params(**{name: row[name] or None for name in named}) for row in rows}


@pytest.mark.parametrize("table", TABLES, ids=lambda path: path.parent.name)
def test_published_run_ids_derive_again(table):
    runs = published(table)
    assert runs
    for name, params in runs.items():
        assert parameters.run_id(params) == name


def test_all_published_runs_are_looked_at():
    """Ten studies have 397 rows (tiny-again repeats the runs of tiny); they share 50. Later studies come on top."""
    runs = {table.parent.name: set(published(table)) for table in TABLES}
    first = {name: runs[name] for name in FIRST_TEN}
    assert runs["tiny-again"] == runs["tiny"]
    assert sum(map(len, first.values())) == 397
    assert len(set().union(*first.values())) == 347
