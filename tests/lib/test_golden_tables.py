"""The published tables of every study come out again, text for text, from its graded answers."""

import pandas as pd
import pytest

from lib import report
from runner import ROOT, evaluate

STUDIES = sorted(path.parent for path in ROOT.glob("outputs/*/eval.parquet"))


def differences(folder, name, table, float_format):
    """Lines in which a computed table differs from the published one: (published, computed)."""
    published = (folder / name).read_text().splitlines()
    computed = table.to_csv(index=False, float_format=float_format).splitlines()
    assert len(published) == len(computed), name
    return [pair for pair in zip(published, computed, strict=True) if pair[0] != pair[1]]


def test_there_are_published_studies():
    assert len(STUDIES) >= 11


@pytest.mark.parametrize("folder", STUDIES, ids=lambda path: path.name)
def test_published_tables_come_out_of_the_graded_answers(folder):
    answers = report.count_answers(folder / "eval.parquet")
    runs = pd.read_csv(folder / "runs.csv")
    summary = evaluate.summarise(answers, runs)
    assert not differences(folder, "summary.csv", summary, "%.6f")

    published = pd.read_csv(folder / "summary.csv")  # what 04_analysis reads
    results = report.assemble(answers, runs, published).results
    assert not differences(folder, "results.csv", results, "%.6g")
