"""runner.policies: prompts, what ends an answer, sampling, adapters, frozen weights."""

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model

from runner import parameters, policies

PROBLEMS = ["47+8=", "52-7=", "9+1=", "47+?=55"]


@pytest.fixture(scope="module")
def tiny():
    return policies.tiny_model(0), policies.tiny_tokenizer()


@pytest.mark.parametrize("template, text", [
    ("none", "What is 100 % of {3}?"),
    ("r1-zero", "within \\boxed{}.\nUser: What is 100 % of {3}?\nAssistant:"),
    ("chat", f"<user>What is 100 % of {{3}}?\n{policies.INSTRUCTION}<assistant>"),
    ("qwen-math", f"<system>{policies.INSTRUCTION}<user>What is 100 % of {{3}}?<assistant>")])
def test_the_text_that_the_policy_continues(template, text):
    tokenizer = policies.tiny_tokenizer()
    tokenizer.chat_template = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
                               "{% if add_generation_prompt %}<assistant>{% endif %}")
    prompt = policies.format_prompt("What is 100 % of {3}?", template, tokenizer)
    assert prompt.endswith(text) and (template == "r1-zero" or prompt == text)


def test_long_prompts_are_dropped_and_counted_and_too_short_a_limit_is_refused():
    rows, tokenizer = Dataset.from_dict({"problem": PROBLEMS}), policies.tiny_tokenizer()
    kept, dropped = policies.as_prompts(rows, parameters.resolve("tiny", max_prompt_length=5), tokenizer)
    assert kept["prompt"] == PROBLEMS[:3] and dropped == 1
    with pytest.raises(ValueError, match="more than max_prompt_length=3 tokens: the shortest has 4. Set max_prompt"):
        policies.as_prompts(rows, parameters.resolve("tiny", max_prompt_length=3), tokenizer)


def test_the_seed_decides_what_is_sampled(tiny):
    drawn = [policies.sample(*tiny, PROBLEMS, 6, k=3, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [len(completions) for completions in drawn[0]] == [3] * len(PROBLEMS)


def test_greedy_answers_are_the_most_likely_tokens_in_any_batch(tiny):
    model, tokenizer = tiny
    model.train()
    together = policies.sample(model, tokenizer, PROBLEMS, 1, temperature=0)
    assert model.training  # as it was before
    assert together == policies.sample(model, tokenizer, PROBLEMS, 1, temperature=0, batch_size=1)
    model.eval()
    for problem, (text,) in zip(PROBLEMS, together, strict=True):
        with torch.inference_mode():
            logits = model(**tokenizer(problem, return_tensors="pt")).logits[0, -1]
        assert text == tokenizer.decode(logits.argmax(), skip_special_tokens=True)


def test_an_adapter_is_used_and_taken_out_again(tmp_path):
    params, tokenizer = parameters.resolve("tiny"), policies.tiny_tokenizer()
    changed = get_peft_model(policies.tiny_model(0), policies.lora(params))
    for name, weight in changed.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(weight)
    changed.save_pretrained(tmp_path)
    base = policies.tiny_model(0).eval()
    inputs = tokenizer("47+8=", return_tensors="pt")
    before = base(**inputs).logits
    with policies.adapted(base, tmp_path) as adapted:
        assert not torch.allclose(adapted(**inputs).logits, before)
    assert torch.equal(base(**inputs).logits, before)


def test_the_hash_of_weights_does_not_depend_on_how_bf16_is_held():
    model = policies.tiny_model(0).bfloat16()
    assert policies.weights_hash(model) == policies.weights_hash(policies.tiny_model(0).bfloat16().float())
    assert policies.weights_hash(model) != policies.weights_hash(policies.tiny_model(0))


def test_the_frozen_weights_are_put_back():
    params = parameters.resolve("tiny")
    model = get_peft_model(policies.tiny_model(0), policies.lora(params))
    frozen = policies.frozen_weights(model)
    before = policies.weights_hash(model)
    for _, p in model.named_parameters():
        p.data += 0.25 * (not p.requires_grad)
    assert policies.weights_hash(model) != before
    policies.restore(model, frozen)
    assert policies.weights_hash(model) == before


def test_a_turn_of_chat_ends_an_answer():
    tokenizer = policies.tiny_tokenizer()
    assert policies.end_of_turn(tokenizer, "chat") == tokenizer.eos_token_id  # no turns in its vocabulary
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    assert policies.end_of_turn(tokenizer, "none") == tokenizer.eos_token_id
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = policies.tiny_model(0)
    assert policies.end_of_turn(tokenizer, "qwen-math") == end
    assert policies.stop_tokens(tokenizer, "qwen-math", model) == sorted({tokenizer.eos_token_id, end})
