"""`python -m runner compare A B`: published studies, published runs, and runs that were evaluated alone."""

import numpy as np
import pandas as pd
import pytest
from synthetic_study import write_study

from runner import ROOT, compare, parameters
from runner.__main__ import main


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    """A folder of results of one's own, before the published ones."""
    monkeypatch.setattr(compare, "OUTPUTS", tmp_path / "outputs")
    monkeypatch.setattr(compare, "STORES", (tmp_path / "outputs", ROOT / "outputs"))
    return tmp_path / "outputs"


def table_of(outputs, a, b, name="results"):
    return pd.read_csv(outputs / f"compare/{a}-and-{b}/{name}.csv", index_col=0)


def test_two_published_studies(outputs, capsys):
    assert main(["compare", "tiny", "tiny-again"]) == 0
    printed = capsys.readouterr().out
    assert "No parameter differs" in printed and "81.7 (77.3 to 86.0)" in printed
    table = table_of(outputs, "tiny", "tiny-again")
    for side, study in (("A", "tiny"), ("B", "tiny-again")):  # as 04_analysis says
        published = pd.read_csv(ROOT / f"outputs/{study}/results.csv", index_col="arm")
        for value in ("estimate", "low", "high"):
            assert table[f"{side}_{value}"].to_numpy() == pytest.approx(published.loc[table.index, value], abs=1e-5)
    assert table.difference_estimate.to_numpy() == pytest.approx(table.B_estimate - table.A_estimate, abs=1e-5)
    assert (table.difference_low < table.difference_estimate).all()
    image = outputs / "compare/tiny-and-tiny-again/comparison.png"
    assert image.read_bytes().startswith(b"\x89PNG")


def test_studies_of_other_models_have_no_paired_difference(outputs, capsys):
    assert main(["compare", "tiny", "language-model-smol"]) == 0
    assert "B - A is empty where" in capsys.readouterr().out
    table = table_of(outputs, "tiny", "language-model-smol")
    assert table.difference_estimate.isna().all() and table.loc["mask 0.2", "A_estimate"] != table.loc[
        "mask 0.2", "A_estimate"]
    differ = table_of(outputs, "tiny", "language-model-smol", "parameters")
    assert list(differ.loc["model"]) == ["tiny", "smol-warm"]
    assert list(differ.loc["mask_rate"]) == ["0, 0.3, 0.6, 0.9", "0, 0.2, 0.4, 0.6, 0.8"]
    assert "temperature" not in differ.index and "run_id" not in differ.index


def test_a_difference_between_studies_is_paired_on_seed_and_question(outputs):
    for name, arms in (("one", [{}, {"label_flip_rate": 0.3}]), ("two", [{}, {"label_flip_rate": 0.4}])):
        write_study(outputs / name, arms, questions=40, steps=4)
    assert main(["compare", "one", "two"]) == 0
    table = table_of(outputs, "one", "two")
    assert table.index.tolist() == ["clean", "flip 0.3", "flip 0.4"]
    assert np.isfinite(table.loc["clean", "difference_low"])
    assert table.loc[["flip 0.3", "flip 0.4"], "difference_estimate"].isna().all()


@pytest.mark.parametrize("low, label", [(np.nan, "accuracy, % (one seed: no intervals)"), (0.49, "accuracy, %")])
def test_a_small_difference_looks_small(low, label):
    columns = ["A_estimate", "A_low", "A_high", "B_estimate", "B_low", "B_high"]
    table = pd.DataFrame([[0.500, low, low + 0.02, 0.501, low, low + 0.02]], ["clean"], columns)
    sides = [compare.Side(name, pd.DataFrame(), {}, None) for name in ("one", "two")]
    [ax] = compare.figure_of_studies(*sides, table).axes
    left, right = ax.get_xlim()
    assert right - left == pytest.approx(compare.LEAST_SPAN) and left < 50 < 50.1 < right
    assert ax.get_xlabel() == label


def test_two_published_runs(outputs, capsys):
    runs = pd.read_csv(ROOT / "outputs/tiny/summary.csv").set_index("run_id")
    clean = next(name for name in runs.index if name.startswith("clean-s0"))
    flip = next(name for name in runs.index if name.startswith("flip-0.4-s0"))
    assert main(["compare", clean, flip]) == 0
    table, differ = table_of(outputs, clean, flip), table_of(outputs, clean, flip, "parameters")
    assert differ.index.tolist() == ["label_flip_rate"] and list(differ.loc["label_flip_rate"]) == [0.0, 0.4]
    expected = runs.loc[[clean, flip], "sampled_exact"]
    assert list(table.loc["sampled", ["A_estimate", "B_estimate"]]) == pytest.approx(list(expected), abs=1e-5)
    assert "two runs cannot say" in capsys.readouterr().out


def write_run(outputs, accuracy, **given):
    """The tables of an evaluated run: `accuracy` of 100 questions are answered rightly. Returns its id."""
    params = parameters.resolve("tiny", **given)
    run = {"run_id": parameters.run_id(params)}
    folder = outputs / f"run-{run['run_id']}"
    folder.mkdir(parents=True)
    pd.DataFrame([params.model_dump() | run]).to_csv(folder / "runs.csv", index=False)
    metrics = pd.DataFrame({"step": range(1, 21), "clean_mean": np.linspace(0.3, 0.6, 20)} | run)
    metrics.to_parquet(folder / "metrics.parquet")
    right = np.arange(100) < 100 * accuracy
    answers = {"sample_id": [f"q{i}" for i in range(100)], "decoding": "greedy", "exact": right}
    pd.DataFrame(answers | run).to_parquet(folder / "eval.parquet")
    return run["run_id"]


def test_runs_that_were_evaluated_alone(outputs):
    one, two = write_run(outputs, 0.5), write_run(outputs, 0.7, mask_rate=0.5)
    assert main(["compare", one, two]) == 0
    row = table_of(outputs, one, two).loc["greedy"]
    assert row.A_estimate == 0.5 and row.difference_estimate == pytest.approx(0.2)
    half = 1.96 * np.std([1] * 20 + [0] * 80, ddof=1) / 10  # of 100 questions, 20 are gained
    assert row.difference_low == pytest.approx(0.2 - half, abs=1e-5)


def test_what_cannot_be_compared_is_refused_in_words(outputs, capsys):
    run = write_run(outputs, 0.5)
    assert main(["compare", "tiny", "tinny"]) == 2
    assert "there is no study and no evaluated run 'tinny', did you mean 'tiny'?" in capsys.readouterr().err
    assert main(["compare", run, "tiny"]) == 2
    assert "give two runs or two studies" in capsys.readouterr().err
