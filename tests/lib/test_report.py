"""lib.report: graded answers are counted right, and tables say what is wrong with them."""
import numpy as np
import pandas as pd
import pytest

from lib import report
from lib.report import accuracy_matrix, count_answers
from lib.stats import pair, paired_difference

# ---- graded answers

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


# ---- arms that are one

def a_study(arms, accuracy, seeds=2):
    """A study whose runs have the given accuracies: arm -> (parameters that differ, accuracies of its seeds)."""
    runs, rows = [], []
    questions = [f"q{i}" for i in range(20)]
    for name, given in arms.items():
        for seed in range(seeds):
            run_id = f"{name}-{seed}"
            params = dict.fromkeys(report.NOISE, 0.0) | {"noise_level": "rollout", "reward": "accuracy", "model": "m",
                                                         "prompt_template": "none", "seed": seed, "base_seed": 0}
            runs.append({"run_id": run_id, "arm": name, "channel": name.split()[0], "rate": 0.0, "reference": "clean",
                         "named": False, "status": "done", "J": 1.0} | params | given)
            right = np.random.default_rng([seed, accuracy[name][0]]).random(20) < accuracy[name][1]
            rows += [(run_id, q, "Level 1", "sampled", 0, r, r) for q, r in zip(questions, right.tolist(), strict=True)]
    columns = ["run_id", "sample_id", "level", "decoding", "sample", "exact", "symbolic"]
    return pd.DataFrame(runs), pd.DataFrame(rows, columns=columns)


def assembled(tmp_path, arms, accuracy):
    runs, rows = a_study(arms, accuracy)
    rows.to_parquet(tmp_path / "eval.parquet")
    summary = runs[["run_id", "arm", "channel", "rate", "reference", "J", "seed", "base_seed"]]
    return report.assemble(count_answers(tmp_path / "eval.parquet"), runs, summary)


def test_equal_runs_are_one_arm_and_shared_noise_is_one_if_no_prompt_comes_twice(tmp_path):
    arms = {"clean": {}, "flip (group)": {"label_flip_rate": 0.3, "noise_level": "group"},
            "flip (prompt)": {"label_flip_rate": 0.3, "noise_level": "prompt"},
            "mask (group)": {"mask_rate": 0.3, "noise_level": "group"},
            "false positives (group)": {"false_positive_rate": 0.3, "noise_level": "group"}}
    draws = {"clean": (0, 0.8), "flip (group)": (1, 0.6), "flip (prompt)": (2, 0.6), "mask (group)": (3, 0.5),
             "false positives (group)": (3, 0.5)}  # the last two are the very same runs
    study = assembled(tmp_path, arms, draws)
    twins = [sorted(names) for names in report.same_arms(study, set(study.trained["run_id"])) if len(names) > 1]
    assert sorted(twins) == [["false positives (group)", "mask (group)"], ["flip (group)", "flip (prompt)"]]
    unknown = [sorted(names) for names in report.same_arms(study, set()) if len(names) > 1]
    assert unknown == [["false positives (group)", "mask (group)"]]


def test_an_arm_that_equals_two_groups_joins_them(tmp_path):
    arms = {"mask (group)": {"mask_rate": 0.3, "noise_level": "group"},
            "false positives (prompt)": {"false_positive_rate": 0.3, "noise_level": "prompt"},
            "false positives (group)": {"false_positive_rate": 0.3, "noise_level": "group"}}
    draws = {"mask (group)": (3, 0.5), "false positives (prompt)": (4, 0.5), "false positives (group)": (3, 0.5)}
    study = assembled(tmp_path, arms, draws)
    assert [sorted(names) for names in report.same_arms(study, set(study.trained["run_id"]))] == [sorted(arms)]


def test_two_cues_are_two_arms(tmp_path):
    arms = {"clean": {}, "cue (a)": {"reward": "cue", "cue": "a"}, "cue (b)": {"reward": "cue", "cue": "b"}}
    study = assembled(tmp_path, arms, {"clean": (0, 0.8), "cue (a)": (1, 0.6), "cue (b)": (2, 0.6)})
    assert sorted(report.same_arms(study, set())) == [["clean"], ["cue (a)"], ["cue (b)"]]
    assert study.arms["setting"].eq("").all() and study.results["J"].isna().tolist() == [False, True, True]


def test_losses_are_those_of_runs_of_one_seed(tmp_path):
    study = assembled(tmp_path, {"clean": {}, "mask": {"mask_rate": 0.3}}, {"clean": (0, 0.9), "mask": (1, 0.3)})
    found = report.losses(study)
    assert list(found.index) == ["mask"] and list(found.columns) == [(0, 0), (0, 1)]
    own, clean = (study.matrices[arm].mean(axis=1) for arm in ("mask", "clean"))
    assert found.loc["mask"].to_numpy() == pytest.approx((own - clean).to_numpy())
    mean = report.mean_of_names(pd.concat([found, found.rename(index={"mask": "twin"}) + 1]), [["mask", "twin"]])
    assert mean.loc["mask"].to_numpy() == pytest.approx(found.loc["mask"].to_numpy() + 0.5)


# ---- in words

def test_numbers_in_words():
    assert report.between(0.817, 0.773, 0.8604) == "81.7 (77.3 to 86.0)"
    assert report.between(-0.0301, -0.05, 0.0001, "+") == "−3.0 (−5.0 to +0.0)"
    assert report.between(0.5, np.nan, np.nan) == "50.0" and report.between(np.nan, 0, 1) == ""
    assert report.percent(-0.0002) == "0.0"
    assert report.over_runs(pd.Series([0.1, 0.3])) == "20.0 (−107.1 to 147.1)"  # t = 12.7
    assert report.over_runs(pd.Series([0.2, 0.2, np.nan])) == "20.0 (20.0 to 20.0)"
    assert report.over_runs(pd.Series([0.2])) == "20.0"
    assert [report.counted(n, "arm") for n in (1, 2, 2048)] == ["1 arm", "2 arms", "2,048 arms"]
    assert [report.listed(x) for x in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]


def results_of(rows):
    """A study that holds a table of results only: (arm, channel, rate, named, estimate, difference, Holm p)."""
    columns = ["arm", "channel", "rate", "named", "estimate", "difference", "p_holm"]
    table = pd.DataFrame(rows, columns=columns).assign(reference="clean", J=1.0)
    table["difference_low"] = table["difference"] - 0.05
    return report.Study(*[None] * 6, results=table)


def answer(rows, before=0.4):
    study = results_of(rows)
    return report.answer(study, before, list(study.results["arm"]))


CLEAN = ("clean", "clean", 0.0, False, 0.8, np.nan, np.nan)


def test_the_answer_of_a_grid_says_what_is_tolerated_and_what_costs_most():
    flips = [(f"flip {r}", "flip", r, False, 0.8 + d, d, p) for r, d, p in
             ((0.1, -0.01, 1.0), (0.2, -0.02, 0.2), (0.3, -0.1, 0.01), (0.4, -0.3, 0.2))]
    assert answer([CLEAN, *flips]) == [
        "Clean training lifts accuracy from 40.0 % to 80.0 %.",
        "No loss is significant up to flip 0.2; losses of 7.0 points remain possible there.",
        "Flip 0.4 loses most: 30.0 points, 75 % of the gain."]  # .4 lies beyond the first significant loss


def test_the_answer_of_named_arms_counts_them():
    named = [(n, n, 0.3, True, 0.8 + d, d, p) for n, d, p in
             (("a", -0.5, 0.01), ("b", -0.1, 0.3), ("c", 0.1, 0.04))]
    assert answer([CLEAN, *named])[1:] == [
        "Significantly below clean: 1 of 3 different arms. Significantly above: c.",
        "A loses most: 50.0 points, 125 % of the gain."]
    assert answer([CLEAN, named[1]])[1] == (
        "Significantly below clean: 0 of 1 different arm. Significantly above: none.")


def test_the_answer_without_a_test_or_a_comparison_says_so():
    untested = ("mask 0.5", "mask", 0.5, False, 0.7, -0.1, np.nan)
    assert answer([CLEAN, untested])[1] == "No difference can be tested, because every arm has a single seed."
    assert answer([CLEAN]) == ["No noisy arm is compared with a clean one here, so nothing is said about noise.",
                               "Accuracy rises from 40.0 % to 80.0 %."]
    assert answer([CLEAN], before=0.9)[1] == "Accuracy falls from 90.0 % to 80.0 %."


def test_cosines_of_a_study_are_means_over_base_policies_from_all_tables_beside_it(tmp_path):
    assert report.step_cosines(tmp_path / "channels").empty
    rows = [("channels", "clean", 0, 0.3), ("channels", "clean", 1, 0.5), ("tiny", "clean", 0, 0.9)]
    for name, some in (("gradient", rows), ("gradient-smol", [("language-model-smol", "flip 0.1", 0, 0.2)])):
        (tmp_path / name).mkdir()
        table = pd.DataFrame(some, columns=["study", "arm", "base_seed", "cosine"])
        table.to_csv(tmp_path / name / "cosines.csv", index=False)
    assert report.step_cosines(tmp_path / "channels").to_dict() == pytest.approx({"clean": 0.4})
    assert report.step_cosines(tmp_path / "language-model-smol").to_dict() == pytest.approx({"flip 0.1": 0.2})
    assert report.step_cosines(tmp_path / "seeds-smol").empty
