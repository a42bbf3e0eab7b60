"""lib.rewards: TRL's contract, a log that survives a kill, realised rates, and what a real GRPOTrainer makes of it."""
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib import noise, rewards
from lib.answers import Verifier
from lib.noise import channel
from runner import rewardlog
from runner.rewardlog import RewardLog

VERIFIER = Verifier()
UNCORRECTED = rewards.estimator("none")


def chat(text):
    return [{"role": "assistant", "content": text}]


def batch(step=0, groups=4, size=8, as_chat=False):
    """What TRL passes for `groups` prompts: in group g the first g answers are right, the last one has no box."""
    texts = [f"so \\boxed{{{g if i < g else g + 1}}}" for g in range(groups) for i in range(size)]
    texts[size - 1::size] = ["no box"] * groups
    ids = [f"algebra/train:{g}" for g in range(groups) for _ in range(size)]
    return {"completions": [chat(t) for t in texts] if as_chat else texts, "sample_id": ids,
            "prompts": ["?"] * len(ids), "completion_ids": [[5] * (i % 7 + 1) for i in range(len(ids))],
            "answer": [str(g) for g in range(groups) for _ in range(size)],
            "trainer_state": SimpleNamespace(global_step=step), "log_extra": None, "level": ["Level 1"] * len(ids)}


def run(folder, chan=None, seed=0, steps=(0,), source="accuracy", correct=UNCORRECTED, **how):
    """Call the reward function of a run once a step. Returns the last rewards and all metrics."""
    metrics = []
    f = rewards.noisy_reward(VERIFIER, chan or channel(), seed, RewardLog(folder / "rewards"), source, correct)
    for step in steps:
        r = f(**batch(step, **how), log_metric=lambda name, value: metrics.append((name, value)))
    return r, metrics


def right(groups=4, size=8):
    return np.array([float(i < g) for g in range(groups) for i in range(size)])


# ---- reward functions


@pytest.mark.parametrize("as_chat", [False, True], ids=["text", "chat"])
def test_one_float_a_completion_whatever_form_it_has(tmp_path, as_chat):
    r, _ = run(tmp_path, as_chat=as_chat)
    assert r == right().tolist() and all(type(x) is float for x in r)
    assert rewardlog.read_log(tmp_path).format_ok.tolist() == ([True] * 7 + [False]) * 4


def test_the_last_message_is_the_one_that_counts():
    talk = [{"role": "assistant", "content": r"\boxed{1}"}, {"role": "assistant", "content": r"\boxed{2}"}]
    grades = VERIFIER.grade(["1", "2"], [rewards.text_of(talk)] * 2)
    assert rewards.verdicts(grades, ["a", "b"]).tolist() == [0, 1]


@pytest.mark.parametrize("text, formatted", [
    (r"\boxed{}", 0), (r"\boxed{ }", 0), (r"\boxed{4", 0), ("4", 0), (r"\boxed{x}", 1), (r"\boxed 4", 1),
    (r"\boxed{4} \boxed{", 0), (r"\boxed{\frac}", 1)])
def test_the_format_reward_and_the_log_agree_on_what_a_box_is(tmp_path, text, formatted):
    f = rewards.noisy_reward(VERIFIER, channel(), 0, RewardLog(tmp_path / "rewards"), "format")
    assert f(**one(text), log_metric=lambda *_: None) == [formatted]
    assert rewardlog.read_log(tmp_path).format_ok.tolist() == [bool(formatted)]


def one(text):
    return {"completions": [text], "completion_ids": [[1]], "sample_id": ["a"], "answer": ["7"],
            "trainer_state": SimpleNamespace(global_step=0)}


def test_a_withheld_reward_is_none_for_trl_and_missing_in_the_log(tmp_path):
    r, metrics = run(tmp_path, channel(abstain_rate=0.5))
    log = rewardlog.read_log(tmp_path)
    assert 0 < sum(x is None for x in r) < len(r)
    assert [x is None for x in r] == log.observed_reward.isna().tolist()
    assert [x for x in r if x is not None] == right()[log.observed_reward.notna()].tolist()
    assert dict(metrics)["observed_mean"] == pytest.approx(log.observed_reward.mean())


def test_a_dataset_without_the_problems_names_is_refused(tmp_path):
    f = rewards.noisy_reward(VERIFIER, channel(noise_level="prompt"), 0, RewardLog(tmp_path / "rewards"))
    given = one("7") | {"log_metric": lambda *_: None}
    del given["sample_id"]
    with pytest.raises(ValueError, match="noise is drawn by problem, .* no column sample_id: add one"):
        f(**given)


@pytest.mark.parametrize("ids", [[17, 17, 90], np.array([17, 17, 90])], ids=["list", "array"])
def test_problems_named_by_numbers_have_the_noise_of_their_names_as_text(tmp_path, ids):
    """Data sets number their problems; the log and its replay know texts only."""
    chan, metrics = channel(label_flip_rate=0.5, noise_level="prompt"), []
    given = {"completions": [r"\boxed{7}"] * 3, "completion_ids": [[1]] * 3, "answer": ["7"] * 3,
             "trainer_state": SimpleNamespace(global_step=0), "log_metric": lambda *of: metrics.append(of)}
    seen = {}
    for name, names in (("numbers", ids), ("texts", [str(i) for i in ids])):
        f = rewards.noisy_reward(VERIFIER, chan, 3, RewardLog(tmp_path / name / "rewards"))
        seen[name] = f(**given, sample_id=names)
    assert seen["numbers"] == seen["texts"] and seen["numbers"][0] == seen["numbers"][1]
    log = rewardlog.read_log(tmp_path / "numbers")
    assert log.sample_id.tolist() == [str(i) for i in ids] and log.rollout.tolist() == [0, 1, 0]
    assert noise.replay(log, chan, 3).empty


@pytest.mark.parametrize("mitigation", ["none", "sgrpo"])
def test_an_empty_batch_has_no_rewards_and_writes_nothing(tmp_path, mitigation):
    nothing = {name: [] for name in ("completions", "completion_ids", "answer", "sample_id")}
    for source in rewards.REWARDS:
        cue = "so" if source == "cue" else None
        f = rewards.noisy_reward(VERIFIER, channel(abstain_rate=0.5), 0, RewardLog(tmp_path / "rewards"), source,
                                 rewards.estimator(mitigation), cue=cue)
        assert f(**nothing, trainer_state=SimpleNamespace(global_step=0), log_metric=pytest.fail) == []
    assert list((tmp_path / "rewards").iterdir()) == []


@pytest.mark.parametrize("completion", [[], [{"role": "assistant"}], [{"role": "assistant", "content": None}], ""])
def test_a_chat_without_text_is_graded_as_no_answer(tmp_path, completion):
    f = rewards.noisy_reward(VERIFIER, channel(), 0, RewardLog(tmp_path / "rewards"))
    assert f(**one(completion), log_metric=lambda *_: None) == [0.0]
    log = rewardlog.read_log(tmp_path)
    assert log.grader.tolist() == ["unparsed"] and not log.format_ok.any()


def test_an_unknown_reward_is_refused(tmp_path):
    with pytest.raises(ValueError, match="reward='length' is unknown: choose accuracy, format, majority, integer, cue"):
        rewards.noisy_reward(VERIFIER, channel(), 0, RewardLog(tmp_path), "length")


# ---- flawed checkers


@pytest.mark.parametrize("answer, number", [
    ("7", 7), ("-3", -3), ("+3", 3), ("007", 7), (" 12 ", 12), ("-0", 0), ("9" * 1000, 10**1000 - 1),
    ("1,000", None), ("1_000", None), ("3.0", None), (r"\frac{6}{2}", None), (r"5\text{ cm}", None), (r"\$5", None),
    ("5%", None), ("x=5", None), ("- 3", None), ("٣", None), ("", None), (None, None), ("9" * 1001, None)])
def test_what_a_checker_reads_that_knows_whole_numbers_only(answer, number):
    assert rewards.whole_number(answer) == number


@given(st.text(alphabet="0123456789+- _.,\n\t٣", max_size=8) | st.text(max_size=8))
def test_it_reads_what_int_reads_in_plain_digits_and_never_fails(text):
    number = rewards.whole_number(text)
    if number is not None:
        assert number == int(text)
    elif text.isascii() and "_" not in text:
        with pytest.raises(ValueError):
            int(text)


@given(st.lists(st.tuples(st.integers(-30, 30), st.integers(-30, 30), st.sampled_from(["{}", "{:+}", "{:04}", " {} "])),
                max_size=12))
def test_the_integer_checker_never_accepts_what_is_wrong(pairs):
    golds = [str(gold) for gold, _, _ in pairs]
    texts = [rf"so \boxed{{{form.format(answer)}}}" for _, answer, form in pairs]
    grades = VERIFIER.grade(golds, texts)
    verdict = rewards.verdicts(grades, golds, "integer", golds=golds)
    assert verdict.tolist() == [int(gold == answer) for gold, answer, _ in pairs]
    assert (verdict <= rewards.verdicts(grades, golds)).all()


def test_the_integer_checker_refuses_a_right_answer_of_another_kind(tmp_path):
    golds = [r"\frac12", "12", "1,000", r"3\text{ cm}"]
    texts = [r"\boxed{0.5}", r"\boxed{12.0}", r"\boxed{1000}", r"\boxed{3}"]
    given = {"completions": texts, "completion_ids": [[1]] * 4, "answer": golds, "sample_id": list("abcd"),
             "trainer_state": SimpleNamespace(global_step=0), "log_metric": lambda *_: None}
    f = rewards.noisy_reward(VERIFIER, channel(), 0, RewardLog(tmp_path / "rewards"), "integer")
    assert f(**given) == [0, 0, 0, 0]
    log = rewardlog.read_log(tmp_path)
    assert log.true_reward.tolist() == [1, 1, 1, 1] and log.verdict.tolist() == [0, 0, 0, 0] and not log.changed.any()


@given(st.lists(st.tuples(st.booleans(), st.text(max_size=6)), max_size=12), st.text(min_size=1, max_size=3))
def test_a_cue_is_accepted_wherever_it_stands_and_right_answers_are_too(rows, cue):
    right = np.array([t for t, _ in rows], int)
    texts = [text for _, text in rows]
    assert rewards.cue_reward(right, texts, cue).tolist() == [int(t or cue in text) for t, text in rows]
    assert (rewards.cue_reward(right, [text + cue for text in texts], cue) == 1).all()


@pytest.mark.parametrize("as_chat", [False, True], ids=["text", "chat"])
def test_the_cue_reaches_the_checker_and_the_log_shows_its_rates(tmp_path, as_chat):
    """Box 0 is wrong in all groups but the first, and the cue: half of the wrong answers to be found in a batch."""
    f = rewards.noisy_reward(VERIFIER, channel(), 0, RewardLog(tmp_path / "rewards"), "cue", cue="boxed{4}")
    metrics, given = [], batch(as_chat=as_chat)
    r = f(**given, log_metric=lambda *of: metrics.append(of))
    log = rewardlog.read_log(tmp_path)
    has_cue = np.array(["boxed{4}" in rewards.text_of(text) for text in given["completions"]])
    assert has_cue.any() and r == log.verdict.tolist() == (right().astype(bool) | has_cue).astype(int).tolist()
    assert log.true_reward.tolist() == right().tolist()
    assert dict(metrics)["realised_false_positive_rate"] == has_cue[right() == 0].mean() > 0
    assert dict(metrics)["realised_false_negative_rate"] == 0


def test_a_cue_reward_without_a_cue_is_refused(tmp_path):
    for cue in (None, ""):
        with pytest.raises(ValueError, match="reward='cue' accepts every completion .*: give the phrase as cue"):
            rewards.noisy_reward(VERIFIER, channel(), 0, RewardLog(tmp_path), "cue", cue=cue)


def test_a_verdict_that_the_reward_never_gives_is_found():
    log = pd.DataFrame({"true_reward": [0, 0, 1, 1], "verdict": [0, 1, 0, 1], "format_ok": [True, True, True, False]})
    found = {source: rewards.impossible_verdicts(log, source).tolist() for source in rewards.REWARDS}
    assert found == {"accuracy": [False, True, True, False], "format": [True, False, True, True],
                     "majority": [False] * 4, "integer": [False, True, False, False],
                     "cue": [False, False, True, False]}


# ---- rates by difficulty


def test_levels_are_numbers_where_they_hold_one():
    levels = ["Level 3", "Level 5", "Level 12", "Level ?", "Level 0", "hard", "3", ""]
    assert rewards.difficulties(levels).tolist() == [3, 5, 12, 0, 0, 0, 0, 0]
    assert rewards.difficulties([]).shape == (0,)


def test_the_log_keeps_the_difficulty_if_the_channel_needs_it_and_is_proven_with_it(tmp_path):
    chan = channel(mask_rate_by_difficulty="0,1")
    f = rewards.noisy_reward(VERIFIER, chan, 3, RewardLog(tmp_path / "rewards"))
    levels = [level for level in ("Level ?", "Level 1", "Level 2", "Level 2") for _ in range(8)]
    for step in range(2):
        r = f(**batch(step) | {"level": levels}, log_metric=lambda *_: None)
    assert r == np.where(rewards.difficulties(levels) == 2, 0, right()).tolist()
    for joined in (False, True):
        if joined:
            rewardlog.join_log(tmp_path)
        log = rewardlog.read_log(tmp_path)
        assert log.columns.tolist() == [*rewards.LOG_SCHEMA.names, "difficulty"] and log.difficulty.dtype == "int8"
        assert noise.replay(log, chan, 3).empty and len(noise.replay(log, channel(mask_rate=0.5), 3))


def test_a_dataset_without_levels_is_refused_if_rates_depend_on_them(tmp_path):
    f = rewards.noisy_reward(VERIFIER, channel(mask_rate_by_difficulty="0.1,0.2"), 0, RewardLog(tmp_path / "rewards"))
    with pytest.raises(ValueError, match="the dataset has no column level: add one such as 'Level 3'"):
        f(**one("7"), log_metric=lambda *_: None)


# ---- the log


def test_the_log_says_what_happened_to_each_completion(tmp_path):
    chan = channel(false_positive_rate=0.3, false_negative_rate=0.2)
    r, _ = run(tmp_path, chan, seed=5, steps=(3,))
    log = rewardlog.read_log(tmp_path)
    assert log.columns.tolist() == rewards.LOG_SCHEMA.names
    assert (log.step == 3).all() and log.rollout.tolist() == list(range(8)) * 4
    assert log.sample_id.tolist() == batch()["sample_id"]
    assert log.true_reward.tolist() == right().tolist() and log.observed_reward.tolist() == r
    assert log.verdict.tolist() == log.true_reward.tolist() and log.returned.tolist() == r
    assert log.changed.tolist() == (log.true_reward != log.observed_reward).tolist() and log.changed.any()
    assert log.format_ok.tolist() == ([True] * 7 + [False]) * 4
    assert log.completion_tokens.tolist() == [i % 7 + 1 for i in range(32)]
    assert log.grader.tolist() == (["exact"] * 7 + ["unparsed"]) * 4
    assert noise.replay(log, chan, 5).empty


def test_a_prompt_visited_twice_in_a_batch_goes_on_counting(tmp_path):
    f = rewards.noisy_reward(VERIFIER, channel(), 0, RewardLog(tmp_path / "rewards"))
    many = batch(groups=2, size=4) | {"sample_id": list("abbaabba")}
    f(**many, log_metric=lambda *_: None)
    log = rewardlog.read_log(tmp_path)
    assert log.rollout.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert not log.duplicated(["step", "sample_id", "rollout"]).any()


# ---- realised rates


@given(st.lists(st.tuples(st.integers(0, 1), st.sampled_from([0.0, 1.0, float("nan")])), min_size=1, max_size=40))
def test_realised_rates_are_counts(pairs):
    t, r = map(np.array, zip(*pairs, strict=True))
    found = rewards.realised_rates(t, r)
    kept = [(a, b) for a, b in pairs if b == b]
    expected = {"clean_mean": sum(t) / len(t), "observed_mean": sum(b for _, b in kept) / (len(kept) or np.nan)}
    for name, true, observed in (("positive", 0, 1), ("negative", 1, 0)):
        among = [b for a, b in kept if a == true]
        expected[f"realised_false_{name}_rate"] = among.count(observed) / (len(among) or np.nan)
    assert found == pytest.approx(expected, nan_ok=True)


def test_a_rate_without_a_denominator_is_not_reported(tmp_path):
    assert np.isnan(rewards.realised_rates([1, 1], [1, 0])["realised_false_positive_rate"])
    _, metrics = run(tmp_path, groups=1)  # no right answer in group 0
    assert [name for name, _ in metrics] == ["clean_mean", "observed_mean", "realised_false_positive_rate"]
    _, metrics = run(tmp_path, channel(abstain_rate=1))
    assert metrics == [("clean_mean", right().mean())]


def test_trl_is_told_clean_and_observed_mean(tmp_path):
    r, metrics = run(tmp_path, channel(false_positive_rate=0.4))
    assert all(type(value) is float for _, value in metrics)
    told, t = dict(metrics), right()
    assert told["clean_mean"] == t.mean() and told["observed_mean"] == np.mean(r) > t.mean()
    assert told["realised_false_positive_rate"] == np.array(r)[t == 0].mean()
    assert told["realised_false_negative_rate"] == 0


def test_the_format_control_never_shows_the_verdict_and_logs_it(tmp_path):
    r, metrics = run(tmp_path, source="format")
    log = rewardlog.read_log(tmp_path)
    assert r == log.observed_reward.tolist() == ([1.0] * 7 + [0.0]) * 4
    assert log.true_reward.tolist() == right().tolist() and log.verdict.tolist() == r and not log.changed.any()
    assert dict(metrics)["clean_mean"] == right().mean() and dict(metrics)["observed_mean"] == 7 / 8
    noisy, _ = run(tmp_path, channel(mask_rate=0.5), source="format", seed=1)
    log = rewardlog.read_log(tmp_path)
    assert 0 < sum(noisy) < sum(r)
    assert noise.replay(log, channel(mask_rate=0.5), 1).empty


# ---- votes and mitigations


@pytest.mark.parametrize("answers, verdict", [
    (["1", "2", "2", "3"], [0, 1, 1, 0]), (["1", "2", "2", "1"], [1, 0, 0, 1]), ([None, "", "4", None], [0, 0, 1, 0]),
    ([None, None, "", None], [0, 0, 0, 0]), (["1/2", r"\frac{1}{2}", "3", "4"], [1, 1, 0, 0])])
def test_the_most_common_answer_wins_and_no_answer_never_does(answers, verdict):
    assert rewards.majority_reward(answers, ["a"] * 4).tolist() == verdict
    mixed = rewards.majority_reward([*answers, *answers[::-1]], ["a", "a", "a", "a", "b", "b", "b", "b"])
    assert mixed[:4].tolist() == verdict  # another problem's votes do not count


def test_votes_do_not_see_the_gold_answer(tmp_path):
    r, metrics = run(tmp_path, source="majority")
    log = rewardlog.read_log(tmp_path)
    vote = [0.0 if i == 7 else float(i < g) if g > 3 else float(i >= g) for g in range(4) for i in range(8)]
    assert r == log.verdict.tolist() == vote  # with at most three right of eight, the common wrong answer wins
    assert log.true_reward.tolist() == right().tolist() and dict(metrics)["clean_mean"] == right().mean()


@pytest.mark.parametrize("mitigation, expected", [
    ("none", lambda r: r), ("backward", lambda r: (r - 0.2) / 0.6), ("forward", lambda r: r - 0.8)])
def test_the_trainer_gets_the_corrected_reward_and_the_log_has_both(tmp_path, mitigation, expected):
    chan = channel(label_flip_rate=0.2, abstain_rate=0.2)
    r, _ = run(tmp_path, chan, correct=rewards.estimator(mitigation, 0.2, 0.2))
    log = rewardlog.read_log(tmp_path)
    returned = np.array(r, float)
    assert np.isnan(returned).any() and np.allclose(returned, log.returned, equal_nan=True)
    assert np.allclose(returned, expected(log.observed_reward), equal_nan=True)
    assert noise.replay(log, chan, 0).empty


@pytest.mark.parametrize("how, message", [
    (("sgrpo", 0.1, 0.3), "made for flips, a = b, but assumes a=0.1 and b=0.3"), (("sgrpo", 0.5, 0.5), "below 0.5"),
    (("backward", 0.5, 0.5), "choose a . b other than 1"), (("clip",), "mitigation='clip' is unknown: choose none")])
def test_a_mitigation_that_cannot_work_is_refused_before_training(how, message):
    with pytest.raises(ValueError, match=message):
        rewards.estimator(*how)


# ---- a real trainer: two steps of a tiny policy with random weights


def train(folder, chan, scale_rewards="group", correct=UNCORRECTED):
    """Two GRPO steps of 16 completions on a CPU. Returns the trainer and the run's log."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from runner.policies import tiny_model, tiny_tokenizer

    data = Dataset.from_list([{"prompt": f"1{i}+{i}=?", "answer": str(10 + 2 * i), "sample_id": f"add/train:{i}"}
                              for i in range(8)])
    config = GRPOConfig(
        output_dir=str(folder / "checkpoints"), per_device_train_batch_size=16, num_generations=8, max_steps=2, seed=0,
        max_completion_length=3, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, bf16=False,
        gradient_checkpointing=False, scale_rewards=scale_rewards, learning_rate=1e-3, disable_tqdm=True)
    trainer = GRPOTrainer(
        model=tiny_model(0, hidden_size=16, num_layers=1), args=config, train_dataset=data,
        processing_class=tiny_tokenizer(),
        reward_funcs=rewards.noisy_reward(VERIFIER, chan, 7, RewardLog(folder / "rewards"), correct=correct))
    trainer.train()
    return trainer, rewardlog.read_log(folder)


@pytest.fixture(scope="module")
def flipped(tmp_path_factory):
    """Random weights never solve a problem, so a flip channel is what gives groups with a signal."""
    return train(tmp_path_factory.mktemp("flipped"), channel(label_flip_rate=0.4))


@pytest.fixture(scope="module")
def withheld(tmp_path_factory):
    return train(tmp_path_factory.mktemp("withheld"), channel(false_positive_rate=0.5, abstain_rate=0.4))


def advantages(log, scaled=True):
    """TRL's advantages from the log: Bessel-corrected, 1e-4 added, 0 where the reward was withheld."""
    group = log.groupby(["step", "sample_id"]).observed_reward
    a = log.observed_reward - group.transform("mean")
    return (a / (group.transform("std") + 1e-4) if scaled else a).fillna(0)


def test_trl_logs_our_metrics_and_uses_our_rewards(flipped):
    trainer, log = flipped
    history = pd.DataFrame([h for h in trainer.state.log_history if "loss" in h]).set_index("step")
    per_step = log.groupby("step")
    assert log.step.tolist() == [0] * 16 + [1] * 16
    assert history.clean_mean.tolist() == pytest.approx(per_step.true_reward.mean().tolist())
    assert history.observed_mean.tolist() == pytest.approx(per_step.observed_reward.mean().tolist())
    assert history["rewards/observed_reward/mean"].tolist() == pytest.approx(history.observed_mean.tolist())
    rates = log[log.true_reward == 0].groupby("step").observed_reward.mean()
    assert history.realised_false_positive_rate.tolist() == pytest.approx(rates.tolist())
    assert history["completions/mean_length"].tolist() == pytest.approx(per_step.completion_tokens.mean().tolist())
    assert noise.replay(log, channel(label_flip_rate=0.4), 7).empty


def test_the_advantages_that_trl_used_follow_from_the_log(flipped):
    trainer, log = flipped
    last = log.tail(len(trainer._logs["advantages"]))  # TRL keeps one generation batch
    assert list(trainer._logs["advantages"]) == pytest.approx(advantages(last).tolist(), abs=1e-5)
    assert advantages(last).abs().max() > 0.5
    groups = last.groupby("sample_id")
    assert groups.size().tolist() == [8, 8] and (groups.rollout.unique().str.len() == 8).all()


def test_a_withheld_reward_has_advantage_zero_in_trl(withheld):
    trainer, log = withheld
    last = log.tail(len(trainer._logs["advantages"])).reset_index(drop=True)
    used = np.array(trainer._logs["advantages"])
    missing = last.observed_reward.isna()
    assert missing.any() and (used[missing] == 0).all() and (np.abs(used[~missing]) > 0.1).any()
    assert used == pytest.approx(advantages(last).to_numpy(), abs=1e-5)
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    assert len(losses) == 2 and np.isfinite(losses).all()


def test_without_scaling_the_advantage_is_the_centred_reward(tmp_path):
    trainer, log = train(tmp_path, channel(label_flip_rate=0.4), scale_rewards="none")
    last = log.tail(len(trainer._logs["advantages"]))
    assert list(trainer._logs["advantages"]) == pytest.approx(advantages(last, scaled=False).tolist(), abs=1e-6)


def test_sgrpo_advantages_reach_the_policy_unchanged(tmp_path):
    trainer, log = train(tmp_path, channel(label_flip_rate=0.3), "none", rewards.estimator("sgrpo", 0.3, 0.3))
    last = log.tail(len(trainer._logs["advantages"]))
    groups = last.groupby("sample_id").observed_reward
    weighted = rewards.sgrpo_weight(groups.transform("mean").to_numpy(), 0.3) * advantages(last).to_numpy()
    assert list(trainer._logs["advantages"]) == pytest.approx(weighted.tolist(), abs=1e-5)
    assert list(trainer._logs["advantages"]) == pytest.approx(last.returned.tolist(), abs=1e-6)
    assert np.abs(weighted).max() > 0.1
