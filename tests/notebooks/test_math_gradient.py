"""math_parts/gradient_pass.py: scores of sequences of unlike length, and the table of every arm."""

import importlib.util
import random

import numpy as np
import pandas as pd
import pytest
import torch

from lib import gradient
from runner import ROOT, parameters
from runner.policies import tiny_model

SCRIPT = ROOT / "notebooks/appendix/math_parts/gradient_pass.py"
spec = importlib.util.spec_from_file_location("gradient_pass", SCRIPT)
gradient_pass = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gradient_pass)


def test_scores_do_not_depend_on_what_they_are_computed_with():
    params = parameters.resolve("tiny", lora_rank=4)
    model = gradient_pass.adapted(tiny_model(0), params, None)
    draw = random.Random(0)
    pairs = [([draw.randrange(5, 15) for _ in range(draw.randint(1, 5))],
              [draw.randrange(5, 15) for _ in range(draw.randint(1, 9))]) for _ in range(11)]
    together = gradient_pass.scores_of(model, pairs, 0.8, 0, at_once=4)
    for (prompt, completion), ours in zip(pairs, together, strict=True):
        ids = torch.tensor([prompt + completion])
        written = torch.tensor([[0] * len(prompt) + [1] * len(completion)])
        alone = gradient.score_vectors(model, ids, torch.ones_like(ids), written, temperature=0.8)[0].numpy()
        np.testing.assert_allclose(ours, alone, rtol=1e-3, atol=1e-5)
    assert len(together[0]) == sum(w.numel() for name, w in model.named_parameters() if "lora_B" in name)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The table of made-up scores in which right answers have a common direction and wrong ones have none."""
    rng = np.random.default_rng(0)
    t = (rng.random((200, 8)) < rng.beta(1, 2, (200, 1))).astype(int)
    scores = rng.normal(size=(200, 8, 60))
    scores[..., 0] += 2 * t
    tiny = parameters.resolve("tiny")
    arms = {name: tiny.model_copy(update=given) for name, given in {
        "clean": {}, "mask": {"mask_rate": 0.6}, "flip": {"label_flip_rate": 0.3},
        "same mask": {"mask_rate_by_difficulty": "0.6,0.6"}, "other mask": {"mask_rate_by_difficulty": "0.6,0.0"},
        "flawed": {"reward": "integer"}}.items()}
    out = tmp_path_factory.mktemp("gradient") / "table.csv"
    gradient_pass.write_table(out, arms, {"integer": t}, scores, t, 1 + np.arange(200) % 2, t.sum(1))
    return pd.read_csv(out).set_index(["arm", "part"])


def test_a_group_whose_scores_are_no_numbers_is_left_out_and_counted(capsys):
    scores = np.zeros((3, 2, 4))
    scores[1, 0, 2] = np.nan
    assert gradient_pass.finite_groups(scores).tolist() == [True, False, True]
    assert "1 of 3 groups" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no group has finite scores"):
        gradient_pass.finite_groups(scores[1:2])


def test_the_table_of_groups_counts_completions_by_problem(tmp_path):
    texts = [r"Thus, the \boxed{1}", "cut off", r"Thus, the \boxed{2}", r"\boxed{1}"]
    params = parameters.resolve("tiny", max_completion_length=5)
    problems = {"level": ["Level 2", "Level 5"]}
    tokens = [[[1] * 4, [1] * 5], [[1] * 3, [1] * 3]]
    gradient_pass.write_groups(tmp_path / "g.csv", problems, tokens, texts, np.array([[1, 0], [0, 1]]), params)
    rows = pd.read_csv(tmp_path / "g.csv").to_dict("list")
    assert rows == {"difficulty": [2, 5], "right": [1, 1], "of": [2, 2], "boxed": [1, 2], "cut": [1, 0], "cue": [1, 1],
                    "cue_in_wrong": [0, 1]}


def test_noise_lowers_the_cosine_and_shortens_the_gradient(table):
    whole = table.xs("all", level="part")
    assert whole.loc["clean", "length"] > whole.loc["mask", "length"]
    assert whole.loc["clean", "cosine"] > whole.loc["mask", "cosine"] > whole.loc["flip", "cosine"]
    assert ((whole["low"] < whole["cosine"]) & (whole["cosine"] < whole["high"])).all()


def test_a_checker_that_makes_no_mistake_is_the_clean_arm(table):
    numbers = ["problems", "cosine", "length", "signal_to_noise"]
    pd.testing.assert_frame_equal(table.loc["flawed", numbers], table.loc["clean", numbers], rtol=1e-3)


def test_a_mask_by_difficulty_is_that_of_each_difficulty(table):
    pd.testing.assert_frame_equal(table.loc["same mask"], table.loc["mask"])
    for part, like in (("difficulty 1", "mask"), ("difficulty 2", "clean")):
        assert table.loc[("other mask", part), "cosine"] == pytest.approx(table.loc[(like, part), "cosine"])
    sizes = table.loc["clean", "problems"]
    assert sizes["all"] == 200 and sizes["difficulty 1"] == sizes["difficulty 2"] == 100
    assert sizes["short answers"] + sizes["long answers"] == 200
