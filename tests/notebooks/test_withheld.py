"""Runs in which rewards are withheld: few or none are left to learn from, and that is no error.

Which rewards are withheld does not depend on the policy, so neither do these tests.
"""

import pandas as pd
import pytest

from runner import parameters, rewardlog, runs

FEW = dict(abstain_rate=0.6, noise_level="group", per_device_train_batch_size=8, max_steps=8, eval_interval=0)
ONE_A_GROUP = dict(abstain_rate=0.9, num_generations=2, per_device_train_batch_size=32, max_steps=1, eval_interval=0)
NONE = dict(abstain_rate=1.0, max_steps=1, eval_interval=0)


@pytest.fixture(scope="module")
def shown(kernel, workspace):
    """What the notebook shows of each run."""
    return [kernel.execute("02_train", workspace / "withheld.ipynb", **run) for run in (FEW, ONE_A_GROUP, NONE)]


@pytest.fixture(params=[FEW, ONE_A_GROUP, NONE], ids=["few", "one a group", "none"])
def run(workspace, shown, request):
    """(settings, what the notebook shows, log, metrics) of a run that was executed."""
    params = parameters.resolve("tiny", **request.param)
    folder = workspace / params.output_dir / "runs" / parameters.run_id(params)
    assert runs.status(folder) == "done" and runs.prove(folder)[1].empty
    own = shown[[FEW, ONE_A_GROUP, NONE].index(request.param)]
    return request.param, own, rewardlog.read_log(folder), pd.read_parquet(folder / "metrics.parquet")


def test_a_step_without_a_reward_has_no_observed_mean(run):
    settings, shown, log, metrics = run
    kept = log.groupby("step").observed_reward.count()
    if settings is not ONE_A_GROUP:
        assert (kept == 0).any() and "observed withheld" in shown
    assert metrics["observed_mean"].notna().tolist() == (kept > 0).tolist()


def test_without_two_rewards_in_a_group_there_is_nothing_to_learn(run):
    settings, shown, log, _ = run
    kept = log.groupby(["step", "sample_id"]).observed_reward.count()
    if settings is not FEW:
        assert kept.max() < 2 and "so there was nothing to learn from" in shown
