"""04_analysis runs on synthetic studies of every shape."""
import re
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import yaml
from synthetic_study import NAMED, write_study

from runner.__main__ import to_html

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "04_analysis.ipynb"


def analyse(folder, **parameters):
    """Execute 04_analysis on a study folder; returns its text outputs joined and its table of results."""
    out = folder / "analysis.ipynb"
    papermill.execute_notebook(NOTEBOOK, out, {"study": str(folder), "n_boot": 200, **parameters},
                               progress_bar=False, cwd=NOTEBOOK.parents[1])
    outputs = [o for cell in nbformat.read(out, 4).cells for o in cell.get("outputs", [])]
    text = "\n".join(o.get("data", {}).get("text/markdown", "") + o.get("text", "") for o in outputs)
    return text, pd.read_csv(folder / "results.csv").set_index("arm")


def test_analysis_of_the_tiny_study_with_two_runs_missing(tmp_path):
    folder = write_study(tmp_path / "tiny", unfinished={5: "failed", 20: "missing"}, rewards_log=True)
    text, results = analyse(folder)
    assert "### Study tiny, INCOMPLETE: 25 of 27 runs" in text
    assert "**This study was cut short.** Runs missing: flip 0.1 (1 of 3), mask 0.3 (1 of 3)." in text
    assert "flip 0.1 (1 left out, 2 pairs)" in text
    assert len(results) == 9 and results.loc["flip 0.1", "seeds"] == 2
    assert results.loc["flip 0.5", "p_holm"] < 0.05 < results.loc["flip 0.5", "estimate"] < 0.5
    assert ((results["low"] <= results["estimate"]) & (results["estimate"] <= results["high"])).all()
    assert (results["p_holm"].dropna() >= results["p"].dropna()).all()
    evals = pd.read_parquet(folder / "eval.parquet").query("decoding == 'sampled'")
    summary = pd.read_csv(folder / "summary.csv").query("arm == 'clean'")
    clean = evals[evals["run_id"].isin(summary["run_id"])]["exact"].mean()
    assert results.loc["clean", "estimate"] == pytest.approx(clean, abs=1e-5)
    assert "50 rates tested" in text and "Shown are 6 of 50 rates" in text  # of one clean run, one flip and one mask
    assert {p.stem for p in (folder / "figures").iterdir()} == {
        "accuracy-vs-noise", "paired-differences", "training-curves", "by-level", "common-axis-J",
        "theory-beside-measurement"}
    assert "Predicted crossing: none for J = 0.4" not in text and "q* = 0.87 for J = 0.4" in text  # flip .3, mask .6
    assert "Nowhere do theory and measurement differ" in text


def test_predictions_for_the_language_model_are_judged(tmp_path):
    """On made-up runs in which J alone decides, so what theory and the tiny policy say of levels must not hold."""
    arms = yaml.safe_load((NOTEBOOK.parents[1] / "params/studies/language-model.yaml").read_text())["arms"]
    folder = write_study(tmp_path / "lm", arms, seeds=range(5), questions=80, steps=4)
    analyse(folder)
    out = tmp_path / "predictions.ipynb"
    papermill.execute_notebook(NOTEBOOK.parent / "appendix/language_model.ipynb", out, {"study": str(folder)},
                               progress_bar=False, cwd=NOTEBOOK.parents[1])
    judged = pd.read_csv(folder / "predictions.csv").set_index("claim")
    assert list(judged.index) == [1, 1, 2, 3, 4, 5, 6, 7, 7, 8, 9]
    assert judged.loc[2, "verdict"] == "holds" and (judged.loc[[4, 5], "verdict"] != "holds").all()
    assert (folder / "figures/sizes.png").exists() and "80 of 80 runs" in out.read_text()


def test_analysis_of_a_grid_without_noise(tmp_path):
    arms = [{"learning_rate": lr, "grpo_beta": b} for lr in (5e-4, 1e-3) for b in (0.0, 0.05)]
    text, results = analyse(write_study(tmp_path / "grid", arms, seeds=(100, 101), questions=40, steps=4))
    assert "clean runs only, so it says nothing about noise yet" in text
    assert "No noisy arm, hence no curve." in text and "No arm can be compared with a reference." in text
    assert len(results) == 4 and "clean | learning_rate=0.001, grpo_beta=0.05" in results.index


def test_analysis_of_two_noise_levels_and_two_base_policies(tmp_path):
    arms = [{}, {"label_flip_rate": 0.3}, {"label_flip_rate": 0.3, "noise_level": "prompt"},
            {"false_positive_rate": 0.6}, {"abstain_rate": 0.5}, {"reward": "format"}]
    folder = write_study(tmp_path / "channels", arms, seeds=(0, 1), base_seeds=(0, 1), questions=40, steps=4)
    text, results = analyse(folder, grader="symbolic", decoding="greedy")
    assert "# Study channels, complete" in text and "Each (base policy, seed) pair counts" in text
    assert set(results["seeds"]) == {4} and "flip 0.3 (prompt)" in results.index
    assert "The rates were not counted" in text  # no replay.csv


def test_analysis_of_one_seed_gives_no_interval(tmp_path):
    text, results = analyse(write_study(tmp_path / "one", [{}, {"mask_rate": 0.5}], seeds=(7,), questions=40, steps=4))
    assert "one seed, no interval" in text and "Every comparison rests on one seed" in text
    assert results[["low", "high", "difference_low", "p"]].isna().all(axis=None)


def test_analysis_of_a_kl_weight_crossed_with_noise(tmp_path):
    """Each setting has its own clean arm, curve and comparison."""
    arms = [{"grpo_beta": b, "label_flip_rate": p} for b in (0.0, 0.05) for p in (0.0, 0.4)]
    folder = write_study(tmp_path / "beta", arms, seeds=(0, 1, 2), questions=40, steps=4)
    text, results = analyse(folder)
    assert results["p"].notna().sum() == 2
    for b in ("0.0", "0.05"):
        clean, noisy = (results.loc[f"{a} | grpo_beta={b}"] for a in ("clean", "flip 0.4"))
        assert noisy["difference"] == pytest.approx(noisy["estimate"] - clean["estimate"], abs=1e-5)
    assert {"accuracy-vs-noise-0", "accuracy-vs-noise-1"} <= {p.stem for p in (folder / "figures").iterdir()}


def test_analysis_of_named_arms_compares_each_with_its_reference(tmp_path):
    folder = write_study(tmp_path / "named", NAMED, steps=6, questions=80)
    text, results = analyse(folder)
    assert list(results.index[:2]) == ["clean, G=4", "clean, G=8"] and len(results) == 6
    assert results["difference"].notna().sum() == 4
    for arm, row in results[results["difference"].notna()].iterrows():
        assert row["reference"] == "clean, G=" + arm[-1]
        expected = row["estimate"] - results.loc[row["reference"], "estimate"]
        assert row["difference"] == pytest.approx(expected, abs=1e-5)
        said = f"- {arm}: **harmed**" if row["p_holm"] < 0.05 and row["difference"] < 0 else f"- {arm}: "
        assert said in text
    assert "4 arms compared with a reference" in text and "Against **clean, G=8**" in text
    assert "Several arms share a channel and a J" in text
    figures = {p.stem for p in (folder / "figures").iterdir()}
    assert "accuracy-by-arm" in figures and not figures & {"accuracy-vs-noise", "common-axis-J"}


def test_analysis_of_channels_of_equal_J(tmp_path):
    levels = ["rollout", "group"]
    arms = [{"name": "clean"},
            *({"name": name + ", {noise_level}", "reference": "clean", "noise_level": levels} | rates for name, rates in
              (("flip .3", {"label_flip_rate": 0.3}), ("mask .6", {"mask_rate": 0.6}),
               ("abstain .6", {"abstain_rate": 0.6}))),
            {"name": "votes", "reward": "majority", "reference": "nobody"}]
    folder = write_study(tmp_path / "channels", arms, steps=6, questions=80)
    text, results = analyse(folder)
    assert "Not compared, because the reference has no evaluated run of the same seeds: votes." in text
    assert np.isnan(results.loc["votes", "J"]) and results.loc["flip .3, group", "J"] == pytest.approx(0.4)
    assert "share their J and differ in channel or in level alone: 9." in text  # 3 a level, 1 a channel
    assert "Predicted crossing: q* = 0.87 for J = 0.4" in text
    assert {"accuracy-by-arm", "common-axis-J", "theory-beside-measurement"} <= {
        p.stem for p in (folder / "figures").iterdir()}


def test_analysis_says_where_theory_is_wrong(tmp_path):
    folder = write_study(tmp_path / "off", [{}, {"label_flip_rate": 0.3}], questions=40, steps=20)
    signals = pd.read_parquet(folder / "signals.parquet")
    flipped = signals["run_id"].str.startswith("flip") & (signals["quantity"] == "energy")
    signals.loc[flipped, "measured"] += 0.1
    signals.to_parquet(folder / "signals.parquet")
    text, _ = analyse(folder)
    assert "**disagree** after Holm: flip 0.3, mean squared advantage" in text


def test_analysis_of_tables_from_before_names_and_signals(tmp_path):
    folder = write_study(tmp_path / "old", [{}, {"mask_rate": 0.5}], questions=40, steps=4)
    (folder / "signals.parquet").unlink()
    for name, new in (("runs.csv", "arm channel rate J reference named"), ("summary.csv", "reference")):
        pd.read_csv(folder / name).drop(columns=new.split()).to_csv(folder / name, index=False)
    text, results = analyse(folder)
    assert results.loc["mask 0.5", "reference"] == "clean" and results["difference"].notna().sum() == 1
    assert "No signals.parquet in this study: run 03_eval again." in text


def test_analysis_without_tables_says_what_to_run(tmp_path):
    says = "run 03_eval first: .* has no runs.csv, summary.csv"
    with pytest.raises(papermill.PapermillExecutionError, match=says) as e:
        analyse(tmp_path)
    assert f"in {tmp_path.parent.name}/{tmp_path.name}" in str(e.value)  # two folders, not the whole path


def test_the_page_of_an_analysis_needs_no_network(tmp_path):
    cells = nbformat.read(NOTEBOOK, 4).cells
    assert not any("$" in c.source for c in cells if c.cell_type == "markdown"), "a formula that needs MathJax"
    code = nbformat.v4.new_markdown_cell("How it is done", metadata={"tags": ["about-code"]})
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# What was found"), code])
    nbformat.write(notebook, tmp_path / "04.ipynb")
    page = to_html(tmp_path / "04.ipynb").read_text()
    assert "What was found" in page and "How it is done" not in page
    assert not re.search(r"<script|<link|@import|\ssrc=.http", page)
