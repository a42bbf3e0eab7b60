"""04_analysis runs on synthetic studies of every shape."""
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from synthetic_study import NAMED, write_study
from traitlets.config import Config

from lib import plots
from runner import OUTPUTS, parameters, studies
from runner.notebooks import to_html

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "04_analysis.ipynb"


@pytest.fixture(scope="module", autouse=True)
def shell():
    """IPython in this process: a kernel a notebook would import all libraries again. test_end_to_end has kernels."""
    main = sys.modules["__main__"]
    yield InteractiveShell.instance(config=Config({"HistoryManager": {"hist_file": ":memory:"}}))
    InteractiveShell.clear_instance()
    sys.modules["__main__"] = main


@pytest.fixture(autouse=True)
def quick_figures(monkeypatch):
    """Figures without the search for their margins, which takes as long as the rest. test_plots has it."""
    monkeypatch.setitem(plots.STYLE, "figure.constrained_layout.use", False)


def execute(notebook, **parameters):
    """Execute a notebook in this process: {cell id: [what it displayed, by MIME type]}."""
    cells = parameterize_notebook(load_notebook_node(str(notebook)), parameters).cells
    shell = InteractiveShell.instance()
    shell.reset()
    shown = {}
    for cell in cells:
        if cell.cell_type == "code":
            with capture_output() as captured:
                result = shell.run_cell(cell.source, store_history=True)
            result.raise_error()
            shown[cell.get("id")] = [output.data for output in captured.outputs] + [{"printed": captured.stdout}]
    return shown


def joined(shown, *kinds):
    """All that cells displayed of these kinds, joined."""
    return "\n".join(data.get(kind, "") for cell in shown.values() for data in cell for kind in kinds)


def paragraphs(shown):
    """The paragraphs that cells displayed or printed, joined."""
    return joined(shown, "text/markdown", "printed")


def execute_analysis(folder, **parameters):
    """Execute 04_analysis on a study folder: see `execute`."""
    return execute(NOTEBOOK, study=str(folder), n_boot=200, **parameters)


def analyse(folder, **parameters):
    """Execute 04_analysis on a study folder; returns its paragraphs joined and its table of results."""
    text = paragraphs(execute_analysis(folder, **parameters))
    return text, pd.read_csv(folder / "results.csv").set_index("arm")


def test_analysis_of_the_tiny_study_with_two_runs_missing(tmp_path):
    folder = write_study(tmp_path / "tiny", unfinished={5: "failed", 20: "missing"}, rewards_log=True)
    text, results = analyse(folder)
    assert text.index("# The tiny policy under reward noise") < text.index("**Clean training lifts accuracy from")
    assert "*Study tiny: 9 arms, 25 of 27 runs, 120 questions to each policy.*" in text
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
    assert f"to {100 * clean:.1f} %.**" in text
    assert {p.stem for p in (folder / "figures").iterdir()} == {
        "accuracy-vs-noise", "paired-differences", "training-curves", "by-difficulty", "common-axis-J"}
    assert "Over 8 different arms, " in text and "Flip 0.5 loses most: " in text


def test_predictions_for_the_language_model_are_judged(tmp_path):
    """On made-up runs in which J alone decides, so what theory and the tiny policy say of levels must not hold."""
    arms = yaml.safe_load((NOTEBOOK.parents[1] / "params/studies/language-model.yaml").read_text())["arms"]
    folder = write_study(tmp_path / "lm", arms, seeds=range(5), questions=40, steps=4)
    analyse(folder)
    shown = execute(NOTEBOOK.parent / "appendix/language_model.ipynb", study=str(folder))
    judged = pd.read_csv(folder / "predictions.csv").set_index("claim")
    assert list(judged.index) == [1, 1, 2, 3, 4, 5, 6, 7, 7, 8, 9]
    assert judged.loc[2, "verdict"] == "holds" and (judged.loc[[4, 5], "verdict"] != "holds").all()
    assert (folder / "figures/sizes.png").exists() and "80 of 80 runs" in paragraphs(shown)


def test_rivals_are_judged_by_made_up_runs_on_math(tmp_path, monkeypatch):
    """Accuracies in which false positives are mild and all else costs what J says."""
    monkeypatch.setattr("runner.OUTPUTS", tmp_path)
    shutil.copytree(OUTPUTS / "math-base", tmp_path / "math-base")
    rng, cost = np.random.default_rng(0), {"false positives 0.6": 0.01, "mask by prompt": 0.0, "drawn mask": 0.0}
    for name in ("math-pairs", "math-natural"):
        study, grid = studies.load_study(name, "qwen2.5-coder-1.5b")
        arms = [study.arm_and_reference(p)[0] for p in grid]
        accuracy = [0.3 - cost.get(arm, 0.1 * (1 - p.channel.J)) + rng.normal(0, 0.002)
                    for arm, p in zip(arms, grid, strict=True)]
        (tmp_path / f"{name}-qwen2.5-coder-1.5b").mkdir()
        pd.DataFrame({"run_id": [parameters.run_id(p) for p in grid], "arm": arms, "channel": arms,
                      "seed": [p.seed for p in grid], "sampled_exact": accuracy}).to_csv(
            tmp_path / f"{name}-qwen2.5-coder-1.5b/summary.csv", index=False)
    cosines = pd.DataFrame({"arm": ["clean", "flip 0.3", "mask 0.8", "drawn mask", "whole numbers only"], "part": "all",
                            "cosine": [0.5, 0.1, 0.2, 0.4, 0.3]})
    cosines.to_csv(tmp_path / "math-base/gradient-qwen2.5-coder-1.5b.csv", index=False)
    shown = paragraphs(execute(NOTEBOOK.parent / "appendix/math.ipynb"))
    assert "6 of 6 primary contrasts can be judged" in shown and "All runs are there." in shown
    judged = pd.read_csv(tmp_path / "math-pairs-qwen2.5-coder-1.5b/verdicts.csv", index_col=0)
    assert judged.loc[1, ["J", "gap", "signal to noise"]].tolist() == ["refuted", "refuted", "holds"]
    assert judged.loc[2, ["J", "push", "cosine"]].tolist() == ["holds", "refuted", "refuted"]
    assert judged.loc[3, ["J", "signal to noise", "push"]].tolist() == ["holds", "refuted", "holds"]
    assert judged["cosine"].notna().tolist() == [False, True, False, False, True, False]
    assert judged.loc[4, ["false negatives are worse", "push"]].tolist() == ["holds", "refuted"]
    assert judged.loc[6, ["gap", "signal to noise"]].tolist() == ["holds", "undecided"]


def test_analysis_of_a_grid_without_noise(tmp_path):
    arms = [{"learning_rate": lr, "grpo_beta": b} for lr in (5e-4, 1e-3) for b in (0.0, 0.05)]
    text, results = analyse(write_study(tmp_path / "grid", arms, seeds=(100, 101), questions=40, steps=4))
    assert "# The tiny policy: grid" in text and "No noisy arm is compared with a clean one here" in text
    assert "in the best of 4 arms, clean | learning_rate=" in text
    assert "No arm can be compared with a reference." in text
    assert "Fewer than four arms with different predictions" in text
    assert len(results) == 4 and "clean | learning_rate=0.001, grpo_beta=0.05" in results.index


def test_analysis_of_two_noise_levels_and_two_base_policies(tmp_path):
    arms = [{}, {"label_flip_rate": 0.3}, {"label_flip_rate": 0.3, "noise_level": "prompt"},
            {"false_positive_rate": 0.6}, {"abstain_rate": 0.5}, {"reward": "format"}]
    folder = write_study(tmp_path / "channels", arms, seeds=(0, 1), base_seeds=(0, 1), questions=40, steps=4)
    text, results = analyse(folder, grader="symbolic", decoding="greedy")
    assert "The intervals hold for new seeds of *these* base policies" in text
    assert set(results["seeds"]) == {4} and "flip 0.3 (prompt)" in results.index
    assert re.search(r"Base policy [01] loses most in \d of 5 arms", text)


def test_analysis_of_one_seed_gives_no_interval(tmp_path):
    text, results = analyse(write_study(tmp_path / "one", [{}, {"mask_rate": 0.5}], seeds=(7,), questions=40, steps=4))
    assert "because every arm has a single seed" in text and "Every comparison rests on one seed" in text
    assert results[["low", "high", "difference_low", "p"]].isna().all(axis=None)


def test_analysis_of_a_kl_weight_crossed_with_noise(tmp_path):
    """Each setting has its own clean arm and comparison."""
    arms = [{"grpo_beta": b, "label_flip_rate": p} for b in (0.0, 0.05) for p in (0.0, 0.4)]
    folder = write_study(tmp_path / "beta", arms, seeds=(0, 1, 2), questions=40, steps=4)
    text, results = analyse(folder)
    assert results["p"].notna().sum() == 2
    for b in ("0.0", "0.05"):
        clean, noisy = (results.loc[f"{a} | grpo_beta={b}"] for a in ("clean", "flip 0.4"))
        assert noisy["difference"] == pytest.approx(noisy["estimate"] - clean["estimate"], abs=1e-5)
    assert "accuracy-by-arm" in {p.stem for p in (folder / "figures").iterdir()}
    assert "Significantly below their reference: 2 of 2 different arms." in text


def test_analysis_of_named_arms_compares_each_with_its_reference(tmp_path):
    folder = write_study(tmp_path / "named", NAMED, steps=6, questions=80)
    text, results = analyse(folder)
    assert list(results.index[:2]) == ["clean, G=4", "clean, G=8"] and len(results) == 6
    assert results["difference"].notna().sum() == 4
    for arm, row in results[results["difference"].notna()].iterrows():
        assert row["reference"] == "clean, G=" + arm[-1]
        expected = row["estimate"] - results.loc[row["reference"], "estimate"]
        assert row["difference"] == pytest.approx(expected, abs=1e-5)
    worst = results["difference"].idxmin()
    assert f"F{worst[1:]} loses most: {-100 * results.loc[worst, 'difference']:.1f} points.**" in text
    assert "There is no figure over J here: arms share a channel and a J" in text
    figures = {p.stem for p in (folder / "figures").iterdir()}
    assert "accuracy-by-arm" in figures and not figures & {"accuracy-vs-noise", "common-axis-J"}


def test_named_arms_keep_their_names_everywhere(tmp_path):
    arms = [{"name": "small steps"}, {"name": "large | steps", "learning_rate": 0.002, "reference": "small steps"},
            {"name": "my noise", "label_flip_rate": 0.3, "reference": "large | steps"},
            {"name": "half asleep", "mask_rate": 0.6, "reference": "my noise"}]
    folder = write_study(tmp_path / "named", arms, steps=4, questions=60, unfinished={4: "failed"})
    shown = joined(execute_analysis(folder), "text/markdown", "printed", "text/html")
    assert list(pd.read_csv(folder / "results.csv").arm) == [arm["name"] for arm in arms]
    assert "Runs missing: large | steps (1 of 3)." in shown and "a run of " in shown
    assert "share of the reference's gain lost" in shown
    run_ids = "|".join(pd.read_csv(folder / "runs.csv").run_id)
    elsewhere = re.sub(rf"{run_ids}|label_flip_rate|mask_rate", "", shown)
    assert not re.search(r"\b(clean|flip|mask)\b 0?\.", elsewhere), "an arm is called after its noise"


def test_analysis_of_channels_of_equal_J(tmp_path):
    levels = ["rollout", "group"]
    arms = [{"name": "clean"},
            *({"name": name + ", {noise_level}", "reference": "clean", "noise_level": levels} | rates for name, rates in
              (("flip .3", {"label_flip_rate": 0.3}), ("mask .6", {"mask_rate": 0.6}),
               ("abstain .6", {"abstain_rate": 0.6}))),
            {"name": "votes", "reward": "majority", "reference": "nobody"}]
    folder = write_study(tmp_path / "channels", arms, steps=6, questions=80)
    text, results = analyse(folder)
    assert "Not compared, because the reference has no run of the same seeds: votes." in text
    assert np.isnan(results.loc["votes", "J"]) and results.loc["flip .3, group", "J"] == pytest.approx(0.4)
    assert "9 pairs of arms share their J" in text  # 3 a level, 1 a channel
    assert {"accuracy-by-arm", "common-axis-J"} <= {p.stem for p in (folder / "figures").iterdir()}


def test_one_noise_under_two_names_counts_once_if_no_prompt_comes_twice(tmp_path):
    arms = [{}, {"mask_rate": 0.5}, {"label_flip_rate": 0.3, "noise_level": "group"},
            {"label_flip_rate": 0.3, "noise_level": "prompt"}]
    folder = write_study(tmp_path / "names", arms, questions=40, steps=4)
    text, _ = analyse(folder)
    assert "*flip 0.3 (group) and flip 0.3 (prompt)* are one experiment under 2 names" in text
    assert re.search("2 different arms|2 differences", text)
    signals = pd.read_parquet(folder / "signals.parquet").assign(revisits=1)
    signals.to_parquet(folder / "signals.parquet")
    text, _ = analyse(folder)
    assert "under 2 names" not in text and re.search("3 different arms|3 differences", text)


def test_a_measured_cosine_stands_beside_theory(tmp_path):
    folder = write_study(tmp_path / "cosine", questions=60, steps=4)
    arms = pd.read_csv(folder / "runs.csv")["arm"].unique()
    (tmp_path / "gradient").mkdir()
    cosines = np.linspace(0.77, 0.1, len(arms))
    measured = pd.DataFrame({"study": "cosine", "arm": arms, "base_seed": 0, "cosine": cosines})
    measured.to_csv(tmp_path / "gradient/cosines.csv", index=False)
    shown = execute_analysis(folder)
    table = shown["kept"][0]["text/html"]
    assert "<th>cosine</th>" in table and "0.77" in table
    assert "signal to noise − cosine" in shown["ranks"][0]["text/plain"]


FLAWED = [{}, {"mask_rate": 0.4}, {"reward": "integer"}, {"reward": "cue", "cue": "Hence"},
          {"mask_rate_by_difficulty": "0.1,0.5,0.6", "noise_level": ["rollout", "prompt"]}]
HAVE_NO_J = ["whole numbers only", "cue (Hence)", "mask by difficulty (0.1,0.5,0.6)",
             "mask by difficulty (0.1,0.5,0.6) (prompt)"]


def test_flawed_checkers_and_rates_by_difficulty_are_compared_but_theory_says_nothing_of_them(tmp_path):
    folder = write_study(tmp_path / "flawed", FLAWED, questions=60)
    shown = execute_analysis(folder)
    results = pd.read_csv(folder / "results.csv").set_index("arm")
    assert sorted(results.index) == sorted(["clean", "mask 0.4", *HAVE_NO_J])
    assert results.loc[HAVE_NO_J, "J"].isna().all() and results.loc[["clean", "mask 0.4"], "J"].tolist() == [1, 0.6]
    assert (results["reference"] == "clean").all() and results.loc[HAVE_NO_J, "difference"].notna().all()
    lost_most = results["difference"].idxmin()
    assert f"{lost_most[0].upper()}{lost_most[1:]} loses most" in paragraphs(shown)
    predicted = shown["kept"][0]["text/html"]
    assert "mask 0.4" in predicted and not any(name in predicted for name in HAVE_NO_J)


@pytest.mark.parametrize("arm, says", [({"reward": "integer"}, "Whole numbers only loses most"),
                                       ({"reward": "format"}, "Only controls are compared here, and no noise.")])
def test_one_arm_without_J_beside_the_clean_one(tmp_path, arm, says):
    folder = write_study(tmp_path / "one", [{}, arm], questions=40, steps=4)
    assert says in paragraphs(execute_analysis(folder))
    assert (folder / "figures/accuracy-by-arm.png").exists()  # a curve over rates would put both at rate 0


# ---- the audit of the noise

def audit(folder):
    """Execute appendix/audit on a study folder; returns its computed paragraphs, joined."""
    return paragraphs(execute(NOTEBOOK.parent / "appendix/audit.ipynb", study=str(folder)))


def test_the_audit_finds_the_noise_as_it_should_be(tmp_path):
    folder = write_study(tmp_path / "tiny", [{}, {"label_flip_rate": 0.3}, {"mask_rate": 0.6, "noise_level": "prompt"}],
                         questions=40, rewards_log=True)
    text = audit(folder)
    assert re.search(r"All [\d,]+ logged rewards are what the channels draw", text)
    assert "Of 12 realised rates" in text  # two a run, where each completion has a draw of its own
    assert "Nowhere do theory and measurement differ significantly" in text
    assert "0 of 3 runs with noise at prompt" in text
    assert (folder / "figures/theory-beside-measurement.png").exists()


def test_the_audit_shows_by_difficulty_and_over_time_where_rewards_were_wrong(tmp_path):
    folder = write_study(tmp_path / "flawed", FLAWED, questions=40, rewards_log=True)
    shown = execute(NOTEBOOK.parent / "appendix/audit.ipynb", study=str(folder))
    tables = [data["text/html"] for data in shown["flawed"] if "text/html" in data]
    assert len(tables) == 2 and all(name in table for table in tables for name in HAVE_NO_J)
    assert all("mask 0.4" not in table for table in tables) and "Level 2" in tables[0] and "<th>10</th>" in tables[1]
    assert "Of 24 realised rates" in paragraphs(shown)  # four arms; a mask by difficulty has more than two rates
    (folder / "rates.csv").unlink()
    assert "were not counted: run 03_eval again" in audit(folder)


def test_the_audit_says_where_theory_and_the_log_are_wrong(tmp_path):
    folder = write_study(tmp_path / "off", [{}, {"label_flip_rate": 0.3}], questions=40, steps=20, rewards_log=True)
    signals = pd.read_parquet(folder / "signals.parquet")
    flipped = signals["run_id"].str.startswith("flip") & (signals["quantity"] == "energy")
    signals.loc[flipped, "measured"] += 0.1
    signals.to_parquet(folder / "signals.parquet")
    pd.read_csv(folder / "replay.csv").assign(not_replayed=2).to_csv(folder / "replay.csv", index=False)
    text = audit(folder)
    assert "**disagree** after Holm for flip 0.3, mean squared advantage" in text
    assert re.search(r"12 of [\d,]+ logged rewards are \*\*not\*\* what the channels draw", text)


def test_analysis_without_tables_says_what_to_run(tmp_path):
    says = "run 03_eval first: .* has no runs.csv, summary.csv"
    with pytest.raises(FileNotFoundError, match=says) as e:
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


def test_the_site_opens_a_study_with_its_computed_title_and_answer():
    page = "outputs/language-model-smol/04_analysis.ipynb"
    conf = runpy.run_path(str(NOTEBOOK.parents[1] / "docs/conf.py"))
    cells = json.loads(conf["notebook"]((NOTEBOOK.parents[1] / page).read_text(), page))["cells"]
    assert cells[0]["source"] == "# SmolLM2-135M under reward noise"
    answer = "".join(cells[1]["outputs"][0]["data"]["text/markdown"])
    assert answer.startswith("**Clean training lifts accuracy from 41.4 %")
    assert not any("about-code" in c["metadata"].get("tags", []) for c in cells)
