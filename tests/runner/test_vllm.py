"""Evaluation through real vLLM, which also runs on a CPU: `make test-vllm` (skipped where vLLM is not installed)."""

import os
import subprocess
import sys

import pandas as pd
import pytest
import torch
import yaml
from conftest import papermill
from peft import get_peft_model

from runner import ROOT, engines, parameters, policies

pytest.importorskip("vllm")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
PROMPTS = ["47+8=", "12-5=", "7+?=9", "100+23=", "95-6=", "31+7="]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A random policy whose attention heads are of a size that vLLM knows (32; the tiny one's is 24)."""
    folder = tmp_path_factory.mktemp("policies") / "head32"
    policies.tiny_model(0, hidden_size=128).save_pretrained(folder)
    policies.tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def params(base):
    return parameters.resolve("tiny", model=str(base))


@pytest.fixture(scope="session")
def adapters(params, tmp_path_factory):
    """Two adapters that change the policy."""
    folders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = get_peft_model(policies.load_policy(params)[0], policies.lora(params))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
        folders.append(tmp_path_factory.mktemp("adapters") / str(seed))
        model.save_pretrained(folders[-1])
    return folders


@pytest.fixture(scope="session")
def llm(params, base, adapters):
    return engines.vllm_engine(str(base), params, len(adapters))


def test_one_engine_answers_as_each_adapter_alone_does(llm, params, adapters):
    model, tokenizer = policies.load_policy(params)
    stop, answers = model.generation_config.eos_token_id, []
    for adapter in (None, *enumerate(adapters, 1)):
        texts = engines.vllm_sample(llm, PROMPTS, 8, temperature=0, stop_token_ids=stop, adapter=adapter)
        with policies.adapted(model, adapter and adapter[1]) as alone:
            assert texts == policies.sample(alone, tokenizer, PROMPTS, 8, temperature=0)
        answers.append(texts)
    assert answers[0] != answers[1] != answers[2] != answers[0]


def test_an_adapter_changes_the_log_probabilities_and_they_are_the_policys_own(llm, params, adapters):
    model, tokenizer = policies.load_policy(params)
    seen = {}
    for adapter in (None, *enumerate(adapters, 1)):
        found = torch.tensor(engines.vllm_logprobs(llm, PROMPTS[3], adapter))
        ids = torch.tensor([tokenizer(PROMPTS[3])["input_ids"]])
        with policies.adapted(model, adapter and adapter[1]) as alone, torch.inference_mode():
            logprobs = alone(ids).logits[0, :-1].log_softmax(-1)
        expected = logprobs.gather(1, ids[0, 1:, None])[:, 0]
        assert torch.allclose(found, expected, atol=1e-3)
        seen[adapter and adapter[0]] = found
    assert not torch.allclose(seen[None], seen[1], atol=1e-3) and not torch.allclose(seen[1], seen[2], atol=1e-3)


def test_samples_follow_the_seed_and_differ_within_a_question(llm):
    first = engines.vllm_sample(llm, PROMPTS, 8, k=4, seed=7)
    assert first == engines.vllm_sample(llm, PROMPTS, 8, k=4, seed=7)
    assert first != engines.vllm_sample(llm, PROMPTS, 8, k=4, seed=1007)
    assert first[2] == engines.vllm_sample(llm, PROMPTS[2:3], 8, k=4, seed=7 + 2 * 4)[0]  # whatever else is asked for
    assert all(len(set(texts)) > 1 for texts in first)


def test_the_notebook_evaluates_a_study_through_one_engine(base, workspace, tmp_path):
    study = workspace / "two.yaml"
    study.write_text(yaml.safe_dump({
        "title": "Two runs", "arms": [{"label_flip_rate": [0.25, 0.5]}], "seeds": [0], "use_selected": False,
        "eval_limit": 30, "fixed": {"model": str(base), "max_steps": 4, "save_steps": 4, "learning_rate": 0.02,
                                    "eval_interval": 0}}))
    done = subprocess.run([sys.executable, "-m", "runner", str(study), "--profile", "tiny"], cwd=ROOT,
                          env=os.environ | {"GRPO_NOISE_WORK": str(workspace)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    tables = {}
    for engine in ("transformers", "vllm"):
        papermill(workspace, "03_eval", tmp_path / f"{engine}.ipynb", study=study, engine=engine)
        tables[engine] = pd.read_parquet(workspace / "outputs/two/eval.parquet")
    greedy = [t[t.decoding == "greedy"].reset_index(drop=True).astype(str) for t in tables.values()]
    pd.testing.assert_frame_equal(*greedy)
    assert tables["vllm"].run_id.nunique() == 3
