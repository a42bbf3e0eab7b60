"""Runs with a flawed checker, and with a mask whose rate depends on the difficulty: the log shows what each did."""

import json

import numpy as np
import pandas as pd
import pytest

from lib import noise, rewards
from runner import dataset, parameters, rewardlog, runs

FEW = dict(max_steps=3, eval_interval=0)
INTEGER = dict(reward="integer")
CUE = dict(reward="cue", cue="1}")  # an answer that ends in 1, in a box
BY_DIFFICULTY = dict(mask_rate_by_difficulty="0,0.5,0.5,0.5,1.0", noise_level="prompt")


@pytest.fixture(scope="module")
def mixed(workspace):
    """The workspace's problems, but every second gold is no whole number as written: 34.0."""
    rows = [json.loads(line) for line in (workspace / "data/arithmetic/train_split.jsonl").read_text().splitlines()]
    for row in rows[::2]:
        row["answer"] += ".0"
    kept = [{name: row[name] for name in ("problem", "answer", "level", "type")} for row in rows]
    (workspace / "mixed.jsonl").write_text("\n".join(map(json.dumps, kept)))
    folder, _ = dataset.make_dataset(str(workspace / "mixed.jsonl"), workspace / "data/mixed", level_field="level",
                                     type_field="type")
    return folder


@pytest.fixture(scope="module")
def shown(kernel, workspace, mixed):
    """The executed notebook of each run, as JSON."""
    return {str(given): kernel.execute("02_train", workspace / "checkers.ipynb", **given, **FEW, data_dir=str(mixed))
            for given in (INTEGER, CUE, BY_DIFFICULTY)}


@pytest.fixture(scope="module")
def run(workspace, mixed, shown):
    """A function of a run's settings: its folder, what its audit shows, its log with each problem's row."""
    problems = dataset.load_split(mixed, "train").to_pandas().set_index("sample_id")

    def executed(**settings):
        params = parameters.resolve("tiny", **settings, **FEW, data_dir=str(mixed))
        folder = workspace / params.output_dir / "runs" / parameters.run_id(params)
        assert runs.status(folder) == "done"
        logged, wrong = runs.prove(folder)
        assert wrong.empty and logged == 3 * 128
        outputs = {cell["id"]: cell.get("outputs", []) for cell in json.loads(shown[str(settings)])["cells"]}
        table = "".join(outputs["audit"][-1]["data"]["text/html"])
        log = rewardlog.read_log(folder)
        return folder, table, log.join(problems[["answer", "level"]], on="sample_id")

    return executed


def test_a_checker_of_whole_numbers_refuses_all_other_golds(run):
    folder, table, log = run(**INTEGER)
    is_whole = log["answer"].str.isdigit()
    assert (log["verdict"] == log["true_reward"])[is_whole].all() and (log["verdict"] == 0)[~is_whole].all()
    assert log["true_reward"][~is_whole].any() and log["verdict"].any()  # some were right and refused, some accepted
    assert (log["observed_reward"] == log["verdict"]).all()
    assert "Level 5" in table and "false negatives" in table and folder.name.startswith("whole-numbers-only-s0-")


def test_a_cue_is_rewarded_in_wrong_answers(run):
    folder, _, log = run(**CUE)
    accepted = (log["verdict"] == 1) & (log["true_reward"] == 0)
    assert accepted.any() and (log["verdict"] >= log["true_reward"]).all() and (log["verdict"] == 0).any()
    metrics = pd.read_parquet(folder / "metrics.parquet")
    share = accepted[log["true_reward"] == 0].groupby(log["step"]).mean()
    assert metrics["realised_false_positive_rate"].dropna().to_numpy() == pytest.approx(share.to_numpy())


def test_a_mask_by_difficulty_is_proven_from_its_log_alone(run):
    folder, table, log = run(**BY_DIFFICULTY)
    assert (log["difficulty"] == rewards.difficulties(log["level"])).all()
    right = log["true_reward"] == 1
    seen = log["observed_reward"].where(right)
    assert seen[log["difficulty"] == 1].dropna().eq(1).all() and seen[log["difficulty"] == 5].dropna().eq(0).all()
    assert (seen.groupby([log["sample_id"]]).nunique() <= 1).all()  # one draw a prompt
    assert log["observed_reward"][~right].eq(0).all() and "Level 5" in table
    chan = noise.channel(mask_rate_by_difficulty="0,0.5,0.5,0.5,1.0", noise_level="prompt")
    moved = log.assign(difficulty=np.where(log["difficulty"] == 1, 5, 1).astype("int8"))
    assert noise.replay(log, chan, 0).empty and not noise.replay(moved, chan, 0).empty
