"""runner.trainer: the same gradient as TRL's from fewer completions and less padding."""

import random

import hypothesis.strategies as st
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from peft import LoraConfig, get_peft_model_state_dict
from transformers import set_seed
from trl import GRPOConfig, GRPOTrainer

from runner import trainer
from runner.policies import tiny_model, tiny_tokenizer

GROUP, GROUPS = 4, 4
PROMPTS = ["1+2=", "3+4=", "5+6=", "17+28="]


def rollout(prompts, owner):
    """Made-up completions of very different lengths, the same in each trainer."""
    draw = random.Random(owner.state.global_step)
    completions = [[draw.randrange(5, 15) for _ in range(draw.choice([1, 2, 3, 12]))] for _ in prompts]
    return {"prompt_ids": [owner.processing_class(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": completions, "logprobs": None}


def trained(folder, kind, rewarded: str, **options) -> tuple[dict[str, torch.Tensor], list[int], list[dict]]:
    """Adapter after three steps, completions of each micro-batch that reached the model, and the log.

    The optimiser is SGD, since Adam enlarges rounding.
    rewarded: "some" gives two groups of four a signal, "none" gives no group one.
    """
    rows: list[int] = []

    def reward(completions, **_):
        signal = [i % GROUP == 0 and i < 2 * GROUP for i in range(len(completions))]
        return [float(s and rewarded == "some") for s in signal]

    class Counting(kind):
        def _compute_loss(self, model, inputs):
            rows.append(len(inputs["advantages"]))
            return super()._compute_loss(model, inputs)

    set_seed(1)
    config = GRPOConfig(
        output_dir=str(folder), report_to="none", use_cpu=True, max_steps=3, learning_rate=1.0, optim="sgd",
        logging_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=GROUP * GROUPS // 2,
        num_generations=GROUP, max_completion_length=12, save_strategy="no", disable_tqdm=True, bf16=False, **options)
    lora = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    owner = Counting(model=tiny_model(0), args=config, reward_funcs=reward, peft_config=lora, rollout_func=rollout,
                     train_dataset=Dataset.from_dict({"prompt": PROMPTS * 3}), processing_class=tiny_tokenizer())
    owner.train()
    return get_peft_model_state_dict(owner.model), rows, owner.state.log_history


@pytest.fixture(autouse=True)
def widths_of_single_tokens(monkeypatch):
    """Batches here are narrower than WIDTH_STEP. As published, they would keep all their padding."""
    monkeypatch.setattr(trainer, "WIDTH_STEP", 1)


@pytest.mark.parametrize("options", [{}, {"num_iterations": 2}, {"beta": 0.1}, {"scale_rewards": "none"}], ids=str)
def test_the_weights_are_those_of_trls_own_trainer(options, tmp_path):
    ours, rows, log = trained(tmp_path, trainer.Trainer, "some", **options)
    theirs, their_rows, their_log = trained(tmp_path, GRPOTrainer, "some", **options)
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=1e-6, msg=name)
    moved = max(weight.abs().max() for name, weight in theirs.items() if "lora_B" in name)
    assert moved > 1e-3
    assert len(rows) < len(their_rows)  # fewer passes of the model
    teaches = GROUP * GROUPS if "beta" in options else GROUP * GROUPS // 2
    assert sum(rows) == 3 * teaches and sum(their_rows) == 3 * GROUP * GROUPS
    assert [row["grad_norm"] for row in log[:3]] == pytest.approx([row["grad_norm"] for row in their_log[:3]], rel=1e-3)


def test_a_step_in_which_no_group_has_a_signal_changes_nothing_and_does_not_stop(tmp_path):
    weights, rows, log = trained(tmp_path, trainer.Trainer, "none")
    assert all(weight.abs().max() == 0 for name, weight in weights.items() if "lora_B" in name)
    assert rows == [1, 1, 1]
    assert [row["grad_norm"] for row in log[:3]] == [0, 0, 0]


def test_another_loss_is_trained_by_trl_alone(tmp_path):
    _, rows, _ = trained(tmp_path, trainer.Trainer, "some", loss_type="dr_grpo")
    assert rows == [2] * (3 * GROUP * GROUPS // 2)


@given(lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 20)), min_size=1, max_size=40),
       batch=st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_micro_batches_take_no_more_room_and_are_no_more_than_trls(lengths, batch):
    longest_first = sorted(lengths, key=sum, reverse=True)
    positions = batch * (max(p for p, _ in lengths) + max(c for _, c in lengths))
    counts = trainer.sizes(longest_first, positions)
    assert sum(counts) == len(lengths)
    assert len(counts) <= -(-len(lengths) // batch)
    start = 0
    for count in counts:
        part = longest_first[start:start + count]
        assert count * (max(p for p, _ in part) + max(c for _, c in part)) <= positions
        start += count


def test_widths_are_multiples_that_hold_every_token(monkeypatch):
    monkeypatch.setattr(trainer, "WIDTH_STEP", 4)
    mask = (torch.arange(11) < torch.tensor([[1], [4], [5], [9], [11]])).long()
    assert trainer.rounded_up(mask).tolist() == [4, 4, 8, 11, 11]


def test_nothing_but_padding_is_cut_off():
    prompt_mask = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 1]])
    completion_mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    whole = {"prompt_ids": torch.arange(9).view(3, 3), "prompt_mask": prompt_mask,
             "completion_ids": torch.arange(12).view(3, 4), "completion_mask": completion_mask,
             "ref_per_token_logps": torch.arange(12.0).view(3, 4), "advantages": torch.arange(3.0),
             "num_items_in_batch": torch.tensor(8)}
    part = trainer.trimmed(whole, torch.tensor([1, 0]))
    assert part["prompt_ids"].tolist() == [[4, 5], [1, 2]]
    assert part["completion_ids"].tolist() == [[4, 5, 6], [0, 1, 2]]
    assert part["ref_per_token_logps"].tolist() == [[4, 5, 6], [0, 1, 2]]
    assert part["advantages"].tolist() == [1, 0] and part["num_items_in_batch"] == 8
