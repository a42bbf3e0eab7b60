"""The reward log of a run: a file a step, joined at the end, and whole after a kill at any moment."""

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.rewards import LOG_SCHEMA
from runner import rewardlog


def write(folder, steps, observed=1.0):
    """Write steps of two groups of two completions. observed: the reward of all of them, None if withheld."""
    log = rewardlog.RewardLog(folder / "rewards")
    for step in steps:
        log.write(pa.table({
            "step": [step] * 4, "sample_id": ["a", "a", "b", "b"], "rollout": [0, 1, 0, 1], "true_reward": [1] * 4,
            "verdict": [1] * 4, "observed_reward": [observed] * 4, "returned": [observed] * 4,
            "changed": [observed != 1] * 4, "format_ok": [True] * 4, "completion_tokens": [5] * 4,
            "grader": ["exact"] * 4}, schema=LOG_SCHEMA))


def test_one_file_a_step_and_a_repeated_step_replaces_itself(tmp_path):
    write(tmp_path, steps=(2, 0, 1))
    assert sorted(p.name for p in (tmp_path / "rewards").iterdir()) == [f"step-00000{i}.parquet" for i in range(3)]
    before = rewardlog.read_log(tmp_path)
    assert before.step.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    write(tmp_path, observed=0, steps=(1,))
    after = rewardlog.read_log(tmp_path)
    assert len(after) == len(before)
    assert (before.observed_reward != after.observed_reward).tolist() == (after.step == 1).tolist()


def test_many_steps_keep_their_order(tmp_path):
    write(tmp_path, steps=(9, 10, 99, 100, 999_999, 1_000_000))
    assert rewardlog.read_log(tmp_path).step.unique().tolist() == [9, 10, 99, 100, 999_999, 1_000_000]
    rewardlog.drop_steps_from(tmp_path, 100)
    assert rewardlog.read_log(tmp_path).step.unique().tolist() == [9, 10, 99]


def test_joining_changes_nothing_but_the_number_of_files(tmp_path):
    write(tmp_path, observed=None, steps=range(5))
    before = rewardlog.read_log(tmp_path)
    rewardlog.join_log(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["rewards.parquet"]
    pd.testing.assert_frame_equal(rewardlog.read_log(tmp_path), before)
    stored = pq.read_schema(tmp_path / "rewards.parquet")
    assert [(f.name, f.type) for f in stored] == [(f.name, f.type) for f in LOG_SCHEMA]
    assert {f.name: f.type for f in stored}["observed_reward"] == pa.float32()
    rewardlog.join_log(tmp_path)
    pd.testing.assert_frame_equal(rewardlog.read_log(tmp_path), before)


def test_a_kill_while_writing_leaves_half_a_file_that_nobody_reads(tmp_path):
    write(tmp_path, steps=range(3))
    half = (tmp_path / "rewards/step-000002.parquet").read_bytes()[:500]
    (tmp_path / "rewards/step-000003.part").write_bytes(half)
    (tmp_path / "rewards.parquet.part").write_bytes(half)
    assert rewardlog.read_log(tmp_path).step.unique().tolist() == [0, 1, 2]
    rewardlog.drop_steps_from(tmp_path, 2)
    write(tmp_path, steps=(2, 3))
    rewardlog.join_log(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["rewards.parquet"]
    assert rewardlog.read_log(tmp_path).groupby("step").size().tolist() == [4] * 4


@pytest.mark.parametrize("removed", [0, 2, 5])
def test_a_kill_while_the_joined_log_replaces_its_steps_loses_and_repeats_nothing(tmp_path, removed):
    write(tmp_path, steps=range(5))
    log, files = rewardlog.read_log(tmp_path), sorted((tmp_path / "rewards").iterdir())
    kept = [(f, f.read_bytes()) for f in files[removed:]]
    rewardlog.join_log(tmp_path)
    (tmp_path / "rewards").mkdir()
    for file, content in kept:
        file.write_bytes(content)
    pd.testing.assert_frame_equal(rewardlog.read_log(tmp_path), log)
    rewardlog.drop_steps_from(tmp_path, 3)  # the checkpoint that the run goes on from is older than its log
    assert rewardlog.read_log(tmp_path).step.unique().tolist() == [0, 1, 2]
    write(tmp_path, observed=0, steps=(3, 4))
    rewardlog.join_log(tmp_path)
    again = rewardlog.read_log(tmp_path)
    assert (again.observed_reward != log.observed_reward).tolist() == (log.step >= 3).tolist()


def test_a_run_without_a_log_is_named(tmp_path):
    (tmp_path / "flip-0.2").mkdir()
    with pytest.raises(FileNotFoundError, match="^flip-0.2 has no reward log"):
        rewardlog.read_log(tmp_path / "flip-0.2")


# --- whether there was anything to learn


@pytest.mark.parametrize("returned, differ", [
    ([1, 1, 0, 0], False), ([1, 0, 0, 0], True), ([None] * 4, False),
    ([1, None, 0, None], False),  # in TRL's frac_reward_zero_std these two groups are not silent
    ([0.5, -0.5, None, None], True),
])
def test_a_group_teaches_if_two_rewards_in_it_differ(tmp_path, returned, differ):
    write(tmp_path, steps=[0, 1])
    table = pq.read_table(tmp_path / "rewards/step-000001.parquet")
    column = table.schema.get_field_index("returned")
    pq.write_table(table.set_column(column, "returned", pa.array(returned, pa.float32())),
                   tmp_path / "rewards/step-000001.parquet")
    assert rewardlog.rewards_differed(tmp_path) == differ
