"""The rollout server with vLLM itself, which also runs on a CPU: `make test-vllm` (skipped where vLLM is missing).

`test_server.py` says the same of the small stand-in; here are the things that only vLLM can show.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from conftest import processes
from peft import get_peft_model

from runner import ROOT, evaluate, parameters, policies, rollouts, runs, server
from runner.engines import BASE

pytest.importorskip("vllm")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
PROMPTS = ["47+8=", "12-5=", "7+?=9", "100+23=", "95-6=", "31+7="]


@pytest.fixture(scope="session")
def params(tmp_path_factory):
    """A run from a random policy whose attention heads have a size that vLLM knows (32; the tiny one's is 24)."""
    folder = tmp_path_factory.mktemp("policies") / "head32"
    policies.tiny_model(0, hidden_size=128).save_pretrained(folder)
    policies.tiny_tokenizer().save_pretrained(folder)
    return parameters.resolve("tiny", model=str(folder), engine="server")


@pytest.fixture(scope="session")
def adapters(params, tmp_path_factory):
    """Two adapters that change the policy, in folders as of two runs."""
    folders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = get_peft_model(policies.load_policy(params)[0], policies.lora(params))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
        folders.append(tmp_path_factory.mktemp(f"run{seed}") / "adapter")
        model.save_pretrained(folders[-1])
    return folders


@pytest.fixture(scope="session")
def served(params, tmp_path_factory):
    started = server.Server(server.Serving.of([params], 2), tmp_path_factory.mktemp("log") / "s.log", 0.2).wait()
    yield started
    started.stop()


@pytest.fixture
def client(served):
    return rollouts.Client(served.url, served.key)


@pytest.fixture
def engine(served, params, monkeypatch):
    """The evaluation's engine, on that server."""
    monkeypatch.setenv("GRPO_NOISE_ROLLOUT_URL", served.url)
    monkeypatch.setenv("GRPO_NOISE_ROLLOUT_KEY", served.key)
    model, tokenizer = policies.load_policy(params, "transformers")
    started = evaluate.Served([params], tokenizer, model.generation_config.eos_token_id, seed=7)
    yield started
    started.close()


def test_one_server_answers_as_each_adapter_alone_does(engine, params, adapters):
    model, tokenizer = policies.load_policy(params, "transformers")
    answers = []
    for adapter in (None, *adapters):
        texts = engine.ask(adapter, PROMPTS, 1, 0.0)
        with policies.adapted(model, adapter) as alone:
            assert texts == policies.sample(alone, tokenizer, PROMPTS, params.max_completion_length, temperature=0)
        answers.append(texts)
    assert answers[0] != answers[1] != answers[2] != answers[0]


def test_its_log_probabilities_are_the_policys_own(engine, params, adapters):
    model, tokenizer = policies.load_policy(params, "transformers")
    seen = {}
    for adapter in (None, *adapters):
        found = torch.tensor(engine.numbers(adapter, PROMPTS[3]))
        ids = torch.tensor([tokenizer(PROMPTS[3])["input_ids"]])
        with policies.adapted(model, adapter) as alone, torch.inference_mode():
            logprobs = alone(ids).logits[0, :-1].log_softmax(-1)
        assert torch.allclose(found, logprobs.gather(1, ids[0, 1:, None])[:, 0], atol=1e-3)
        seen[adapter] = found
    assert not torch.allclose(seen[None], seen[adapters[0]], atol=1e-3)
    assert not torch.allclose(seen[adapters[0]], seen[adapters[1]], atol=1e-3)


def test_samples_follow_the_seed_and_differ_within_a_question(engine):
    first = engine.ask(None, PROMPTS, 4, 1.0)
    assert first == engine.ask(None, PROMPTS, 4, 1.0)
    assert all(len(set(texts)) > 1 for texts in first)
    assert first[:2] == engine.ask(None, PROMPTS[:2], 4, 1.0)  # whatever else is asked for


def test_completions_that_end_at_different_times_all_come_back(client, params):
    """Left alone, vLLM answers with those that end last."""
    model, tokenizer = policies.load_policy(params, "transformers")
    stops = list(range(8))  # about half of the vocabulary: completions end early, and not together
    found = client.complete(BASE, tokenizer(PROMPTS[0])["input_ids"], n=16, seed=1, max_tokens=8, temperature=1.0,
                            stop_token_ids=stops)
    assert len(found) == 16 and len({len(completion.ids) for completion in found}) > 2
    assert all(completion.ids[-1] in stops for completion in found if len(completion.ids) < 8)


def test_what_vllm_refuses_is_said_in_words(served, client, params, adapters, tmp_path):
    with pytest.raises(RuntimeError, match="refuses the key: set GRPO_NOISE_ROLLOUT_KEY"):
        rollouts.Client(served.url, "wrong").models()
    client.load("twice@1", adapters[0])
    with pytest.raises(rollouts.RequestRefused, match="already been loaded"):
        client.load("twice@1", adapters[0])
    client.unload("twice@1")
    client.unload("twice@1")
    with pytest.raises(rollouts.RequestRefused, match="404"):
        client.score("twice@1", [1, 2, 3])
    model = get_peft_model(policies.load_policy(params)[0], policies.lora(params.model_copy(update={"lora_rank": 64})))
    model.save_pretrained(tmp_path)
    with pytest.raises(rollouts.RequestRefused, match="64.*is greater than"):
        client.load("large@1", tmp_path)


def study_file(workspace, params, name, **fixed):
    file = workspace / f"{name}.yaml"
    file.write_text(json.dumps({
        "title": "Two runs", "arms": [{"label_flip_rate": [0.25, 0.5]}], "seeds": [0], "use_selected": False,
        "eval_samples": 1, "eval_limit": 30,
        "fixed": {"model": params.model, "engine": "server", "max_steps": 4, "save_steps": 2, "eval_interval": 0,
                  "learning_rate": 0.02, **fixed}}))
    return file


def test_a_killed_server_and_a_killed_run_cost_a_study_nothing(workspace, params):
    """Two runs on one server; the server's engine and then one run are killed. All ends well, from the checkpoint."""
    study = study_file(workspace, params, "killed", max_steps=12)
    sweep = subprocess.Popen([sys.executable, "-m", "runner", str(study)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE,
                             env=os.environ | {"GRPO_NOISE_WORK": str(workspace), "RAY_worker_niceness": "0"})
    grid = studies_runs(workspace)
    wait_for(lambda: any(list(run.glob("checkpoints/checkpoint-2")) for run in grid()), sweep)
    kill("api_server", workspace)
    wait_for(lambda: any(list(run.glob("checkpoints/checkpoint-4")) for run in grid()), sweep)
    kill("ipykernel_launcher", workspace)
    out, errors = sweep.communicate(timeout=900)
    assert sweep.returncode == 0, errors[-2000:] + out[-2000:]
    resumed = []
    for run in grid():
        assert runs.status(run) == "done"
        metrics = pd.read_parquet(run / "metrics.parquet")
        assert metrics["engine/logprob_difference_max"].max() < 1e-2
        resumed.append(json.loads((run / "provenance.json").read_text()).get("resumed_from"))
    assert any(resumed)
    assert not [p for p in processes(workspace) if "VLLM" in " ".join(p.cmdline())]  # the killed server's engine too
    assert pd.read_parquet(workspace / "outputs/killed/eval.parquet").run_id.nunique() == 3


def studies_runs(workspace):
    return lambda: sorted((workspace / "outputs/runs").glob("flip-*"))


def wait_for(happened, sweep, seconds=1800):
    until = time.monotonic() + seconds
    while not happened():
        assert sweep.poll() is None and time.monotonic() < until, "the sweep ended, or nothing happened"
        time.sleep(0.2)


def kill(word, workspace):
    for process in processes(workspace):
        if word in " ".join(process.cmdline()):
            process.send_signal(signal.SIGKILL)
            return
    raise AssertionError(f"no {word} is running")


def test_a_thousand_adapters_leave_the_servers_memory_flat(client, served, adapters):
    """vLLM was reported to keep memory of adapters that it had unloaded."""
    import psutil

    def memory():
        parent = psutil.Process(served.process.pid)
        return sum(process.memory_info().rss for process in [parent, *parent.children(recursive=True)]) / 2**20

    def load(number):
        client.load(f"load@{number}", adapters[number % 2])
        client.score(f"load@{number}", [1, 2, 3])
        client.unload(f"load@{number}")

    for number in range(100):
        load(number)
    before = memory()
    for number in range(100, 1000):
        load(number)
    grown = memory() - before
    print(f"\n900 adapters: {grown:.1f} MiB more, after {before:.0f}")
    assert grown < 0.05 * before
    assert set(client.models()) == {BASE}
