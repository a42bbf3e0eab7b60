"""Runs that share a rollout server, which is a small stand-in here. With vLLM itself: `make test-vllm`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import processes
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model

from runner import ROOT, engines, evaluate, parameters, plan, policies, rollouts, runs, server, task
from runner.engines import BASE
from runner.rollouts import Client, RequestRefused, request_seed

STAND_IN = {engines.SERVER_MODULE: "stand_in_server",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/runner")])}
STUDY = """
title: Served runs
arms: [{label_flip_rate: [0.0, 0.25]}]
fixed: {engine: server, max_steps: 3, save_steps: 3, eval_interval: 0, per_device_train_batch_size: 32}
seeds: [0]
use_selected: false
eval_samples: 1
eval_limit: 20
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random policy in a folder, and the parameters of a run that starts from it."""
    folder = tmp_path_factory.mktemp("policies") / "random"
    policies.tiny_model(0).save_pretrained(folder)
    policies.tiny_tokenizer().save_pretrained(folder)
    return parameters.resolve("tiny", model=str(folder), engine="server", lora_rank=8)


def save_adapter(params, folder, seed):
    """Save an adapter that changes the policy."""
    torch.manual_seed(seed)
    model = get_peft_model(policies.load_policy(params)[0], policies.lora(params))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(base, tmp_path_factory):
    """A server for that policy."""
    with pytest.MonkeyPatch.context() as patched:
        for name, value in STAND_IN.items():
            patched.setenv(name, value)
        started = server.Server(server.Serving.of([base], 2), tmp_path_factory.mktemp("log") / "s.log").wait()
    yield started
    started.stop()
    assert started.process.poll() is not None


@pytest.fixture
def client(served):
    client = Client(served.url, served.key)
    yield client
    for name in client.models():
        if name != BASE:
            client.unload(name)


def test_an_adapter_answers_under_its_own_name_and_is_forgotten(client, base, tmp_path):
    prompt = policies.tiny_tokenizer()("12+30=")["input_ids"]
    of_base = client.score(BASE, prompt)
    for seed in (1, 2):
        client.load(f"run@{seed}", save_adapter(base, tmp_path / str(seed), seed))
    scores = [of_base, client.score("run@1", prompt), client.score("run@2", prompt)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert rollouts.max_distance(scores[a], scores[b]) > 1e-3
    client.unload("run@1")
    with pytest.raises(RequestRefused, match="404"):
        client.score("run@1", prompt)
    client.unload("run@1")  # what a restarted server has never seen is no error
    assert set(client.models()) == {BASE, "run@2"}


def test_completions_follow_the_seed_and_bring_their_log_probabilities(client, base):
    model, tokenizer = policies.load_policy(base, "transformers")
    prompt = tokenizer("12+30=")["input_ids"]
    how = {"n": 4, "max_tokens": 6, "temperature": 0.7, "logprobs": 0}
    first = client.complete(BASE, prompt, seed=3, **how)
    assert first == client.complete(BASE, prompt, seed=3, **how) != client.complete(BASE, prompt, seed=9, **how)
    trainer = SimpleNamespace(compute_loss_context_manager=torch.no_grad)
    for completion in first:
        own, = rollouts.own_logprobs(trainer, model, prompt, [completion.ids], 0.7)
        assert rollouts.max_distance(own, completion.logprobs) < 1e-4


def test_a_wrong_key_is_said_in_words(served):
    with pytest.raises(RuntimeError, match="refuses the key: set GRPO_NOISE_ROLLOUT_KEY"):
        Client(served.url, "wrong").models()


def test_a_server_that_dies_is_started_again_and_the_request_repeated(client, served):
    before = served.restarts
    os.kill(served.process.pid, signal.SIGKILL)
    assert client.models() == {BASE: 24} and served.restarts == before + 1


def test_a_server_that_does_not_start_shows_the_end_of_its_log(base, tmp_path, monkeypatch):
    monkeypatch.setenv(engines.SERVER_MODULE, "no_such_module")
    started = server.Server(server.Serving.of([base], 1), tmp_path / "s.log")
    with pytest.raises(RuntimeError, match="(?s)did not start.*No module named no_such_module"):
        started.wait()


def test_a_server_ends_with_the_process_that_started_it(base, tmp_path):
    """Also if that process is killed, as a sweep may be."""
    script = ("import sys, time; from pathlib import Path; from runner import parameters, server\n"
              f"p = parameters.resolve('tiny', model={base.model!r}, engine='server')\n"
              f"s = server.Server(server.Serving.of([p], 1), Path({str(tmp_path / 's.log')!r}))\n"
              "print(s.process.pid, flush=True); time.sleep(600)")
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=os.environ | STAND_IN,
                              stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    until = time.monotonic() + 30
    while running(pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert not running(pid)


def running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --- what a run refuses -----------------------------------------------------------------------------


class Trainer:
    """As much of TRL's trainer as a rollout function uses."""

    def __init__(self, params, step=0):
        self.model = get_peft_model(policies.load_policy(params, "transformers")[0], policies.lora(params))
        self.state, self.num_generations = SimpleNamespace(global_step=step), 2
        self.accelerator = SimpleNamespace(unwrap_model=lambda model: model)
        self.compute_loss_context_manager = torch.no_grad

    def train(self):
        """Pretend a step: B differs from zero."""
        self.state.global_step += 1
        for name, weight in self.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)


def rollouts_of(client, params):
    tokenizer = policies.tiny_tokenizer()
    return rollouts.Rollouts(client, "a-run", params, tokenizer, [tokenizer.eos_token_id])


def test_a_step_is_answered_by_its_own_adapter_and_agrees_with_the_trainer(client, base):
    trainer, rollout = Trainer(base), rollouts_of(client, base)
    prompts = ["1+1=", "1+1=", "20-3=", "20-3="]
    first = rollout(prompts, trainer)
    assert rollout.metrics["engine/moved_from_base"] == 0  # B is zero
    assert first["prompt_ids"][0] == first["prompt_ids"][1] != first["prompt_ids"][2]
    assert len(first["completion_ids"]) == 4
    trainer.train()
    rollout(prompts, trainer)
    assert rollout.metrics["engine/moved_from_base"] > 1e-3 < rollout.metrics["engine/moved_in_a_step"]
    assert rollout.metrics["engine/logprob_difference_max"] < 1e-3
    assert len(client.models()) == 2  # the adapter of the first step was forgotten


def test_a_restarted_run_removes_what_its_killed_process_left(client, base, tmp_path):
    client.load("a-run@7-abcd", save_adapter(base, tmp_path, 1))
    client.load("another-run@7-abcd", tmp_path)
    rollouts_of(client, base)
    assert set(client.models()) == {BASE, "another-run@7-abcd"}


def test_a_server_that_ignores_the_adapter_is_found_out(client, base, monkeypatch):
    trainer, rollout = Trainer(base), rollouts_of(client, base)
    score = client.score
    monkeypatch.setattr(client, "score", lambda model, prompt: score(BASE, prompt))
    rollout(["1+1=", "1+1="], trainer)
    trainer.train()
    with pytest.raises(RuntimeError, match="answers with the base policy instead of this run's adapter"):
        rollout(["1+1=", "1+1="], trainer)


def test_a_server_of_another_base_is_found_out(client, base, tmp_path):
    other = policies.tiny_model(1)
    for weight in other.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    other.save_pretrained(tmp_path)
    policies.tiny_tokenizer().save_pretrained(tmp_path)
    params = base.model_copy(update={"model": str(tmp_path)})
    with pytest.raises(RuntimeError, match=f"base policy of the rollout server is not this run's.*{tmp_path}"):
        rollouts_of(client, params)(["1+1=", "1+1="], Trainer(params))


def test_a_rank_above_the_servers_is_said_in_words(client, base):
    params = base.model_copy(update={"lora_rank": 64})
    with pytest.raises(RuntimeError, match="greater than 8.*lora_rank is 64.*--max-lora-rank"):
        rollouts_of(client, params)(["1+1=", "1+1="], Trainer(params))


def test_a_server_of_shorter_sequences_is_refused_before_training(client, base):
    with pytest.raises(ValueError, match="serves sequences of 24 tokens, and this run needs 116"):
        rollouts_of(client, base.model_copy(update={"max_completion_length": 100}))


@given(st.integers(0, 2**32 - 1), st.integers(0, 10**6), st.integers(0, 10**4))
def test_seeds_of_requests_are_a_pure_function_and_fit_the_engine(seed, step, prompt):
    found = request_seed(seed, step, prompt)
    assert found == request_seed(seed, step, prompt) and 0 <= found < 2**31
    assert found != request_seed(seed, step, prompt + 1) and found != request_seed(seed, step + 1, prompt)


# --- which GPU serves -------------------------------------------------------------------------------


@pytest.fixture
def four_gpus(monkeypatch):
    monkeypatch.delenv(engines.ROLLOUT_URL, raising=False)
    monkeypatch.setattr(engines, "gpu_query", lambda fields: [["0"], ["1"], ["2"], ["3"]])


def test_by_default_each_gpu_serves_and_trains_and_some_can_serve_alone(four_gpus, base):
    both = plan.split_gpus([base], None, None)
    assert both.serving == both.training == ["0", "1", "2", "3"] and both.server_memory == engines.SERVER_MEMORY
    apart = plan.split_gpus([base], None, 1)
    assert (apart.serving, apart.training) == (["0"], ["1", "2", "3"]) and apart.server_memory > 0.5
    assert plan.split_gpus([base], "10.0.0.7:6379", None) == plan.Gpus()


@pytest.mark.parametrize("runs, servers, adapters", [(1, 1, 1), (4, 1, 4), (5, 2, 3), (8, 2, 4), (9, 3, 3)])
def test_more_than_four_runs_on_a_gpu_have_several_servers(base, runs, servers, adapters):
    serving = server.Serving.of([base], runs)
    batch = base.prompts_per_step * base.num_generations
    assert (serving.on_a_gpu, serving.adapters) == (servers, adapters)
    assert serving.completions == min(1024, adapters * batch)


def test_servers_that_share_a_gpu_share_its_memory_and_do_not_measure_each_other(monkeypatch):
    monkeypatch.setattr(engines, "gpu_query", lambda fields: [["1000"]])  # MiB
    monkeypatch.setattr(engines, "vllm_on_cpu", lambda: False)

    def options(on_a_gpu):
        serving = server.Serving("model", length=64, rank=16, adapters=2, completions=8, on_a_gpu=on_a_gpu)
        return server.Server._options(SimpleNamespace(port=1), serving, 0.1)

    assert "--kv-cache-memory-bytes" not in options(1)
    shared = options(2)
    assert shared[shared.index("--kv-cache-memory-bytes") + 1] == str(50 * 2**20)  # half of its part


def test_runs_ask_a_server_on_their_own_gpu_and_neighbours_take_turns(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node"))
    servers = {"node": [{"gpu": gpu, "url": f"{gpu}-{number}"} for gpu in "01" for number in "ab"]}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [task.server_for(place, servers)["url"] for place in range(4)] == ["1-a", "1-b", "1-a", "1-b"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")  # it trains only, and others serve only
    assert [task.server_for(place, servers)["url"] for place in range(4)] == ["0-a", "0-b", "1-a", "1-b"]


@pytest.mark.parametrize("address, servers, words", [
    (None, 5, "--engines 5: this machine has 4 GPUs"), (None, 0, "--engines 0"),
    ("10.0.0.7:6379", 2, "not with --address")])
def test_engines_that_cannot_be_are_refused(four_gpus, base, address, servers, words):
    with pytest.raises(ValueError, match=words):
        plan.split_gpus([base], address, servers)


def test_engines_without_a_server_of_ours_are_refused(four_gpus, base, monkeypatch):
    with pytest.raises(ValueError, match="--engines is for runs with engine=server"):
        plan.split_gpus([parameters.resolve("tiny")], None, 1)
    monkeypatch.setenv(engines.ROLLOUT_URL, "http://127.0.0.1:1")
    with pytest.raises(ValueError, match="--engines is for"):
        plan.split_gpus([base], None, 1)
    with pytest.raises(ConnectionError, match="--rollout-url http://127.0.0.1:1: no rollout server answers"):
        plan.check_resources([base], None, 0)


def test_runs_of_two_base_policies_do_not_share_a_server(base, tmp_path):
    with pytest.raises(ValueError, match="a rollout server has one base policy, and these runs have 2"):
        server.Serving.of([base, base.model_copy(update={"model": str(tmp_path)})], 2)


# --- a study ----------------------------------------------------------------------------------------


def servers_in(work):
    """Processes of stand-in servers that were started in this workspace."""
    return [p for p in processes(work) if "stand_in_server" in " ".join(p.cmdline())]


def test_a_study_on_one_server_from_the_command_to_the_table(kernel, workspace, tmp_path):
    """Two runs share a server, ask it for the same draws as a run alone does, and are evaluated through one."""
    study = workspace / "served.yaml"
    study.write_text(STUDY)
    done = subprocess.run([sys.executable, "-m", "runner", str(study), "--cpus-per-run", "1", "--runs-only"], cwd=ROOT,
                          text=True, capture_output=True,
                          env=os.environ | STAND_IN | {"GRPO_NOISE_WORK": str(workspace)})
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    assert "Rollout servers: 1, started in" in done.stdout
    assert not servers_in(workspace)

    runs_of_study = sorted((workspace / "outputs/runs").glob("*-s0-*"))
    in_company = [run for run in runs_of_study if json.loads((run / "params.json").read_text())["engine"] == "server"]
    assert len(in_company) == 2
    for run in in_company:
        assert runs.status(run) == "done" and (run / "metrics.parquet").exists()
        metrics = pd.read_parquet(run / "metrics.parquet")
        assert metrics["engine/logprob_difference_max"].max() < 1e-3
        assert metrics["engine/moved_from_base"].iloc[-1] > 0

    kernel.execute("03_eval", tmp_path / "03_eval.ipynb", STAND_IN, study=str(study))
    kernel.execute("02_train", tmp_path / "alone.ipynb", STAND_IN, engine="server", max_steps=3, save_steps=3,
                   eval_interval=0, per_device_train_batch_size=32, output_dir="outputs/alone")
    assert not servers_in(workspace)
    assert pd.read_parquet(workspace / "outputs/served/eval.parquet").run_id.nunique() == 3  # the base policy, too
    clean = next(run for run in in_company if run.name.startswith("clean"))
    alone = pd.read_parquet(workspace / "outputs/alone/runs" / clean.name / "rewards.parquet")
    pd.testing.assert_frame_equal(alone, pd.read_parquet(clean / "rewards.parquet"))


def test_evaluation_asks_each_adapter_in_turn(client, base, tmp_path, monkeypatch, served):
    monkeypatch.setenv(engines.ROLLOUT_URL, served.url)
    monkeypatch.setenv(engines.ROLLOUT_KEY, served.key)
    model, tokenizer = policies.load_policy(base, "transformers")
    adapters = [save_adapter(base, tmp_path / name / "adapter", seed) for seed, name in enumerate("ab")]
    engine = evaluate.Served([base], tokenizer, model.generation_config.eos_token_id, seed=5)
    prompts = ["1+1=", "20-3=", "?-4=5"]
    found = {None: engine.ask(None, prompts, 1, 0.0)}
    for adapter in adapters:
        found[adapter] = engine.ask(adapter, prompts, 1, 0.0)
        with policies.adapted(model, adapter) as alone:
            assert found[adapter] == policies.sample(alone, tokenizer, prompts, base.max_completion_length,
                                                     temperature=0)
        assert engine.numbers(adapter, prompts[0]) != engine.numbers(None, prompts[0])
    assert found[adapters[0]] != found[adapters[1]]
    sampled = engine.ask(None, prompts, 3, 1.0)
    assert [len(texts) for texts in sampled] == [3, 3, 3] and sampled == engine.ask(None, prompts, 3, 1.0)
    engine.close()
    assert served.answers()  # it was not this evaluation that started it


@pytest.mark.parametrize("completions", [4, 300, 1024])
def test_the_largest_batch_of_a_server_has_a_cuda_graph_and_prompts_beside_it_too(completions):
    """A larger one would be computed without a graph."""
    serving = server.Serving(source="model", length=64, rank=16, adapters=2, completions=completions)
    options = server.Server._options(SimpleNamespace(port=1), serving, 0.2)
    sizes = json.loads(options[options.index("--compilation-config") + 1])["cudagraph_capture_sizes"]
    at_most = int(options[options.index("--max-num-seqs") + 1])
    assert sizes == sorted(set(sizes)) and completions in sizes and completions == at_most
    assert max(sizes) == 2048
